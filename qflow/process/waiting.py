"""Settings of libgomp for how the threads of this process wait for each other on a CPU.

torch's threads wait for each other at the end of every operator. With libgomp, which torch's wheels contain, they spin
for milliseconds before they sleep. If other processes need the cores, a spinning thread keeps the thread that it waits
for from running: with two studies on one machine, each operator takes a time slice of the scheduler. The commands of
qflow therefore let threads spin as briefly as libgomp does when it has more threads than cores. Numbers do not change
(docs/decisions.md, `python -m benchmarks.waiting`).
"""

from __future__ import annotations

import os
import sys

SPINS = "1000"  # libgomp's own count if it has more threads than cores; otherwise 300,000


def wait_briefly() -> bool:
    """Let waiting threads sleep soon, from the import of torch on, and return True.

    Change nothing and return False if torch is imported already, or if the user has set OMP_WAIT_POLICY or
    GOMP_SPINCOUNT. libgomp reads these only once, when it is loaded.
    """
    if "torch" in sys.modules or "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return False
    os.environ["GOMP_SPINCOUNT"] = SPINS
    return True
