"""The stand-in of Horizon's plugin as an installed package, for tests and for the commands that they start."""

import sys
from contextlib import contextmanager
from pathlib import Path

STAND_IN = Path(__file__).with_name("stand_in")
ROOT = "horizon_plugin_pytorch"


def _forget():
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == ROOT}


@contextmanager
def installed():
    """`import horizon_plugin_pytorch` finds the stand-in."""
    before = _forget()
    sys.path.insert(0, str(STAND_IN))
    try:
        yield
    finally:
        sys.path.remove(str(STAND_IN))
        _forget()
        sys.modules.update(before)
