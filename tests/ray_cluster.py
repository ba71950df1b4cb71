"""A Ray cluster of two nodes with a core each, on this machine."""

import os
from contextlib import contextmanager

from tests.service import ROOT

STORE_BYTES = 80 * 2**20
TRIES = 4  # Ray gives a node 30 s to start, which a busy machine may not keep


@contextmanager
def two_nodes():
    """Yield the environment with which a process finds the cluster, and the package."""
    changes = {
        "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)  # the nodes inherit it
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    try:
        for left in range(TRIES, 0, -1):
            try:
                while len(cluster.list_all_nodes()) < 2:
                    cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES, include_dashboard=False)
            except Exception:
                if left == 1:
                    raise
        yield os.environ | {"RAY_ADDRESS": cluster.address}
    finally:
        cluster.shutdown()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
