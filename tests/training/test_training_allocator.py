"""Tests of the allocator setting, in a new process because it cannot be undone."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
from quarterview.training.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        b"x" * (32 << 20)  # written, then freed
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
assert keep_freed_memory()
faults()
print(given_back, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is the GNU C library's")
def test_freed_memory_is_reused_without_page_faults():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 10_000
    assert kept < 100
