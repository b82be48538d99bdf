"""A temporary folder that does not outlive the process that made it."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Any

_HELD: list[Any] = []
"""Pipes whose end tells that this process has ended."""


def own_folder(prefix: str) -> Path:
    """Make a folder that is removed after this process has ended, however that happens.

    What removes it waits for the end of a pipe that this process holds. It is no child of this process, because Ray
    ends the children of an actor with it.
    """
    folder = tempfile.mkdtemp(prefix=prefix)
    wait_and_remove = 'exec 3<&0; (cat <&3; sleep 0.5; rm -rf -- "$0") >/dev/null 2>&1 &'
    command = ["sh", "-c", wait_and_remove, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as shell:
        _HELD.append(shell.stdin)
        shell.stdin = None  # stays open when the shell has ended
    return Path(folder)
