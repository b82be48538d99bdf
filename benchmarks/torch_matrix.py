"""Runs the engine's fast tests under several versions of torch and Python: `python -m benchmarks.torch_matrix`.

For each pair it makes a virtual environment in `--folder`, installs that torch from the configured package index (or
from `--index`, as https://download.pytorch.org/whl/cpu for builds without CUDA), then qflow with its test extra, and
runs `--tests`. One environment exists at a time, because a CUDA build of torch takes 5 GB. Prints one row for each
pair: what was installed, the tests, or why the pair could not be tried. Exits with 1 if a test fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAD = ("torch", "python", "build", "tests", "seconds")
VERSION = "import torch; print(torch.__version__, torch.version.cuda or 'cpu')"


def interpreter(name: str) -> str | None:
    """An interpreter that runs: one on the path, or pyenv's."""
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    own = sorted(versions.glob(f"{name.removeprefix('python')}.*/bin/python"))
    for found in (shutil.which(name), *map(str, own)):
        if found and subprocess.run([found, "--version"], capture_output=True).returncode == 0:
            return found
    return None


def installed(python: str, place: Path, torch: str, index: str | None) -> tuple[str, str, str]:
    """(torch's version, its build, "" or why there is none). The environment is made at `place`."""
    own = str(place / "bin" / "python")
    subprocess.run([python, "-m", "venv", str(place)], check=True, capture_output=True)
    pip = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    wanted = "torch" if torch == "newest" else f"torch=={torch}"
    done = subprocess.run([*pip, wanted, *(["--index-url", index] if index else [])], capture_output=True, text=True)
    if done.returncode:
        return "", "", _last(done)
    shown = subprocess.run([own, "-c", VERSION], capture_output=True, text=True)
    if shown.returncode:
        return "", "", _last(shown)
    version, build = shown.stdout.split()
    pinned = place / "constraints.txt"
    pinned.write_text(f"torch=={version.partition('+')[0]}\n")
    done = subprocess.run([*pip, "-c", str(pinned), "-e", f"{ROOT}[test]"], capture_output=True, text=True)
    return version, build, "" if done.returncode == 0 else _last(done)


def _last(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def tried(torch: str, name: str, folder: Path, index: str | None, tests: Sequence[str]) -> tuple[tuple[str, ...], bool]:
    """(the row of one pair, whether no test failed)."""
    begun, python = time.perf_counter(), interpreter(name)
    if python is None:
        return (torch, name, "-", "not tried: no such interpreter here", "0"), True
    place = folder / f"torch-{torch}-{name}"
    try:
        version, build, reason = installed(python, place, torch, index)
        if reason:
            return (torch, name, build or "-", f"not tried: {reason[:200]}", f"{time.perf_counter() - begun:.0f}"), True
        command = [
            str(place / "bin" / "python"),
            "-m",
            "pytest",
            "-m",
            "not slow",
            "-p",
            "no:cacheprovider",
            *tests,
        ]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        print("\n".join(failed), file=sys.stderr)
        last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1].strip("= ")
        return (version, name, build, last, f"{time.perf_counter() - begun:.0f}"), done.returncode == 0
    finally:
        shutil.rmtree(place, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--torches", nargs="+", default=["2.6.0", "2.8.0", "2.10.0", "newest"])
    parser.add_argument("--pythons", nargs="+", default=["python3.10", "python3.11"])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "torch-matrix")
    parser.add_argument("--index", help="package index for torch alone")
    parser.add_argument("--tests", nargs="+", default=["tests/quant"])
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
    good = True
    for torch in options.torches:
        for name in options.pythons:
            row, passed = tried(torch, name, options.folder, options.index, options.tests)
            good = good and passed
            print(f"| {' | '.join(row)} |", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
