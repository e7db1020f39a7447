"""What the allocator keeps, in a process of its own: it cannot be told to forget it again."""

import platform
import subprocess
import sys

import pytest

import margin_kernels

STEPS = """
import resource
import torch
import margin_kernels as mk

torch.set_num_threads(1)
told = mk.keep_freed_memory()
for _ in range(60):  # until the heap has its size
    torch.ones(12 << 20).mul(2)  # 48 MB each: glibc by itself gives back whatever is above 32
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(12 << 20).mul(2)  # 48 MB each: glibc by itself gives back whatever is above 32
print(told, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_that_is_kept_is_not_paged_in_again():
    run = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True)
    told, faults = run.stdout.split()
    assert told == "True" and int(faults) < 16_384  # of 491,520 pages that are touched


@pytest.mark.skipif(platform.libc_ver()[0] == "glibc", reason="glibc is there")
def test_another_c_library_is_left_alone():
    assert margin_kernels.keep_freed_memory() is False
