"""A temporary folder that does not outlive the process that made it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from qflow.core.temporary import held_folder

_HELD: list[Any] = []
"""Pipes whose end tells that this process has ended."""


def own_folder() -> Path:
    """Make a folder that is removed after this process has ended, however that happens.

    What removes it waits for the end of a pipe that this process holds. It is no child of this process, because Ray
    ends the children of an actor with it. If it is ended too, the next process that makes a temporary folder does it.
    """
    folder, _ = held_folder()
    wait_and_remove = 'exec 3<&0; (cat <&3; sleep 0.5; rm -rf -- "$0") >/dev/null 2>&1 &'
    command = ["sh", "-c", wait_and_remove, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as shell:
        _HELD.append(shell.stdin)
        shell.stdin = None  # stays open when the shell has ended
    return folder
