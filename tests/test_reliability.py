"""The proofs of benchmarks/reliability.py in miniature: the whole takes tens of minutes."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # starts a search again and again, in processes of its own


def test_a_search_that_is_stopped_or_fails_at_a_call_to_a_store_loses_nothing():
    command = [sys.executable, "-m", "benchmarks.reliability", "stops", "faults", "--every", "60"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rounds: {'killed': 2}" in done.stdout
    assert "2 rounds: {'ended with an error': 2}" in done.stdout
