"""A Ray cluster of two nodes on this machine."""

import os
from contextlib import contextmanager

from deepfake_utils.serving.hurry import IN_PROXIES
from tests.service import ROOT

STORE_BYTES = 80 * 2**20
TRIES = 4  # at starting a node in the time given, which a busy machine may not keep


@contextmanager
def two_nodes(*, n_cores: int = 2):
    """Yield the environment with which a process finds the cluster, and the package.

    n_cores: that it is told to have; the second node has one of them.
    """
    changes = {
        "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "",
        "RAY_worker_niceness": "0",  # not 15: beside anything else on the machine, tests would wait for minutes
        IN_PROXIES[0]: IN_PROXIES[1],
        "RAY_raylet_start_wait_time_s": "100", "RAY_worker_register_timeout_seconds": "300",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)  # the nodes inherit it
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for left in range(TRIES, 0, -1):
            try:
                while (n_nodes := len(cluster.list_all_nodes())) < 2:
                    n_cpus = 1 if n_nodes else n_cores - 1
                    cluster.add_node(num_cpus=n_cpus, object_store_memory=STORE_BYTES, include_dashboard=False)
            except Exception:
                if left == 1:
                    raise
                cluster.shutdown()  # a head that came too late would be taken for one that is there
                cluster = Cluster()
        yield os.environ | {"RAY_ADDRESS": cluster.address}
    finally:
        cluster.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
