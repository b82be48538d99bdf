"""How this process's threads wait for each other on a CPU.

torch's threads meet at the end of every operator; those of libgomp, which torch's wheels bring, spin there for
milliseconds before they sleep. Where somebody else needs the cores, a thread that spins keeps the one it waits for
from running: of two studies on one machine each operator then takes a time slice of the scheduler. A door has them
spin as briefly as libgomp itself does once it knows of more threads than cores. Numbers do not change
(docs/decisions.md, `python -m benchmarks.waiting`).
"""

from __future__ import annotations

import os
import sys

SPINS = "1000"  # libgomp's own count where it has more threads than cores; 300,000 where not


def wait_briefly() -> bool:
    """Have threads that wait sleep soon, from torch's import on; False where the user decides, or torch is there.

    The user: OMP_WAIT_POLICY or GOMP_SPINCOUNT, which libgomp reads once, as it is loaded.
    """
    if "torch" in sys.modules or "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return False
    os.environ["GOMP_SPINCOUNT"] = SPINS
    return True
