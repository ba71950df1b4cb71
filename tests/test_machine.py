"""Device, precision and memory choices, checked against what the hardware documents say."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from deepfake_utils import machine
from deepfake_utils.conventions import ConfigError


def test_cpu_is_chosen_with_a_reason_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    chosen = machine.pick_device()
    assert chosen.device.type == "cpu" and "no CUDA GPU" in chosen.reason
    with pytest.raises(ConfigError, match="sees no CUDA GPU"):
        machine.pick_device("cuda")
    with pytest.raises(ConfigError, match="expected auto, cpu"):
        machine.pick_device("gpu")
    with pytest.raises(ConfigError, match="device 'cuda:x' is unknown"):
        machine.pick_device("cuda:x")


def test_a_p100_that_claims_to_be_available_is_refused_in_words(monkeypatch):
    """Kaggle's wheel (cu128) has no sm_60, yet is_available() is True on a P100."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_70", "sm_75", "sm_80", "sm_90", "sm_120"])
    chosen = machine.pick_device()
    assert chosen.device.type == "cpu"
    assert "P100" in chosen.reason and "cu126" in chosen.reason
    with pytest.raises(ConfigError, match="compute capability 6.0"):
        machine.pick_device("cuda")
    with pytest.raises(ConfigError, match="'cuda:3' was asked for, but there are 1 GPUs"):
        machine.pick_device("cuda:3")


@pytest.mark.parametrize(
    ("capability", "architectures", "works"),
    [
        ((8, 6), ["sm_80"], True),  # same major, later minor
        ((8, 0), ["sm_86"], False),  # machine code does not run on an earlier minor
        ((12, 0), ["sm_90", "compute_90"], True),  # PTX is compiled forward
        ((6, 0), ["sm_75", "compute_75"], False),  # PTX never runs backward
        ((9, 0), ["sm_90a"], True),
        ((9, 0), ["gfx90a", "gfx942"], True),  # ROCm's names: nothing is known against them
    ],
)
def test_architecture_rules(capability, architectures, works):
    assert (machine.unsupported_architecture("GPU", capability, architectures) is None) == works


def test_precision_requests():
    cpu = torch.device("cpu")
    assert machine.pick_precision(cpu).name == "fp32"
    assert machine.pick_precision(cpu, "bf16").autocast_dtype is torch.bfloat16
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        machine.pick_precision(cpu, "fp16")
    with pytest.raises(ConfigError, match="unknown"):
        machine.pick_precision(cpu, "int8")
    assert machine.precision_for_capability((7, 5)).needs_scaler


def test_memory_follows_the_smaller_of_machine_and_cgroup(tmp_path):
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\ninactive_file 150000\n")
    assert machine.memory_limit_bytes(tmp_path) == 1_000_000
    assert machine.free_memory_bytes(tmp_path) == 450_000

    (tmp_path / "memory.max").write_text("max\n")  # unlimited: the machine decides
    assert machine.memory_limit_bytes(tmp_path) > 1_000_000

    version_1 = tmp_path / "memory"
    version_1.mkdir()
    (version_1 / "memory.limit_in_bytes").write_text("2000000")
    (version_1 / "memory.usage_in_bytes").write_text("500000")
    assert machine.memory_limit_bytes(tmp_path) == 2_000_000
    assert machine.free_memory_bytes(tmp_path) == 1_500_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives large blocks back one by one")
def test_freed_memory_is_kept_for_the_next_block():
    faults = """
import resource, numpy
from deepfake_utils.machine import keep_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        a, b = numpy.ones(2**21), numpy.ones(2**21)  # 16 MiB each
        del a, b
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = page_faults()
keep_freed_memory()
page_faults()
print(before, page_faults())
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    child = subprocess.run([sys.executable, "-c", faults], capture_output=True, text=True, check=True, env=environment)
    before, after = map(int, child.stdout.split())
    assert after < 0.2 * before
