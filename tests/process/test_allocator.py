"""Freed memory stays with the process of a command: a second forward pass faults no pages in again."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from qflow.process.allocator import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else None
def touch():
    parts = [bytearray(20_000_000) for _ in range(4)]  # 80 MB at the end of the heap
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    touch()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, **environment: str) -> tuple[str, int]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | environment
    done = subprocess.run([sys.executable, "-c", FAULTS, how], env=env, check=True, capture_output=True, text=True)
    kept, count = done.stdout.split()
    return kept, int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_that_is_freed_is_not_faulted_in_again() -> None:
    kept, count = faults("keep")
    if kept == "False":
        pytest.skip("the C library is not glibc")
    assert count < 1000
    assert faults("leave")[1] > 20 * max(count, 100)


def test_the_users_own_settings_stand() -> None:
    assert faults("keep", MALLOC_TOP_PAD_="1000000")[0] == "False"
    assert faults("keep", GLIBC_TUNABLES="glibc.malloc.top_pad=1000000")[0] == "False"
