"""`qflow.tune` on a disk that gets full; a part of benchmarks/reliability.py.

The folder of the study is a file system in memory (tmpfs) of a size that is too small, larger in every round. What the
command writes then fails somewhere else each time. With enough space the same command has to finish the study.
"""

from __future__ import annotations

import collections
import subprocess
from pathlib import Path

from benchmarks.tampering import STUDY, command

KILOBYTES = 3200
"""Space that the whole study needs, about."""


def full_disk(folder: Path, rounds: int) -> list[str]:
    """Run the study on `rounds` disks; return the violations, one sentence each. Needs the right to mount."""
    disk, violations = folder / "disk", list[str]()
    disk.mkdir()
    ends: collections.Counter[str] = collections.Counter()
    for turn in range(rounds):
        size = 64 + KILOBYTES * turn // rounds
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)], capture_output=True, check=False
        )
        if done.returncode:
            print(f"not run: {done.stderr.decode().strip()}")
            return violations
        try:
            violations += [f"with {size} kB: {text}" for text in _filled(disk, ends)]
        finally:
            subprocess.run(["umount", "--lazy", str(disk)], check=False)
    print(f"first starts: {dict(ends)}")
    return violations


def _filled(disk: Path, ends: collections.Counter[str]) -> list[str]:
    code, text = command("tune", *STUDY, f"root={disk}/root")
    ends[f"exit code {code}"] += 1
    found = [f"ended with {code}: {text[-400:]}"] if code not in (0, 2) or "Traceback" in text else []
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    again, said = command("tune", *STUDY, f"root={disk}/root")
    if again != 0 or "Traceback" in said:
        found.append(f"ended with {code}, and with enough space with {again}: {said[-400:]}")
    return found
