"""AIMET beside qflow: it repairs the same networks in a Python of its own, which aimet_run.py is run with."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

from benchmarks.repair_networks.cases import Places, Size
from benchmarks.repair_networks.records import Record

ROOT = Path(__file__).parents[2]
SECONDS = 900
WORDS = "AIMET: CLE is its cross-layer equalization, AdaRound trains the rounding; both with its own int8 scheme"


def measure_peer(record: Record, size: Size, places: Places, python: Path) -> Record:
    """`record` with the drops that AIMET gives, or as it is, with a line that says why."""
    wheels = [str(places.wheels)] if places.wheels else []
    call = [str(python), "-m", "benchmarks.repair_networks.aimet_run", record.network, str(record.bits)]
    call += [str(size.calibration), str(size.evaluation), str(places.weights), *wheels]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    try:
        ran = subprocess.run(call, env=environment, capture_output=True, timeout=SECONDS)
        out, words = ran.stdout, ran.stderr
    except subprocess.TimeoutExpired as late:
        out, words = late.stdout or b"", f"it took longer than {SECONDS} s".encode()
    lines = [line for line in out.decode().splitlines() if line.startswith("{")]
    if not lines:
        print(f"{record.network}: AIMET gave no figures: {(words.decode().strip() or 'no message').splitlines()[-1]}")
        return record
    return replace(record, peer=json.loads(lines[-1]))
