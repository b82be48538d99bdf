"""What repairs give back before int16: `python -m benchmarks.repair [networks...] [--small] [--peer-python PYTHON]`.

Each network is measured with int8 weights and, as a stress, with weights at 6 bits: the loss of the metric with all
operators at int8, after each step of `qflow.repair_model` alone and after all of them; the passes over the calibration
samples (FFE); the fewest int16 operators that keep the loss within `--goal`, without a repair, with that of
`repair=basic`, and with all steps; and for
detectors and segmenters the share of the int8 loss that is recovered at 1.10 times the predicted time of all int8.

Networks are trained once, in one thread, and kept in qflow_out/benchmarks (ignored by git). R-Net needs `--wheels`, a
folder with the two wheels named in repair_networks/faces.py; without it, it is left out. `--peer-python` is a Python
with AIMET (and this environment's torch), which then repairs the same networks. `--records FILE` keeps what is measured
and prints the table of all that the file holds. `--small` runs everything in miniature to test the benchmark; its
numbers are meaningless.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.repair_networks.cases import CASES, SMALL, Case, Places, Size
from benchmarks.repair_networks.faces import missing
from benchmarks.repair_networks.mixes import mixes
from benchmarks.repair_networks.peer import measure_peer
from benchmarks.repair_networks.records import Record, Result, append, read
from benchmarks.repair_networks.states import State, Subject
from benchmarks.repair_networks.table import summary, tables
from qflow.repair.steps import STEPS

WEIGHTS = Path("qflow_out/benchmarks")  # trained networks; ignored by git
BITS = (8, 6)
BASIC = ("equalize", "observers")
"""The steps of `repair=basic`, which a study tries by itself."""
TRAINING = ("reconstruction",)
"""Steps that train weights; all others together are `without training` in the table."""


def measure(name: str, case: Case, size: Size, places: Places, bits: int, goal: float) -> Record:
    """All figures of one network at one number of bits."""
    start = time.process_time()
    subject = Subject(case.build(size, places), bits)
    before = subject.state(())
    analytic = tuple(step for step in STEPS if step not in TRAINING)
    alone = {step: (step,) for step in STEPS}
    sets = {**alone, "basic": BASIC, "without training": analytic, "all": tuple(STEPS)}
    found: dict[str, State] = {}
    known: dict[tuple[str, ...], State] = {}
    for label, steps in sets.items():
        known[steps] = found[label] = known[steps] if steps in known else subject.state(steps)
    results = {label: _result(subject, state, before) for label, state in found.items()}
    searched = [mixes(subject, state, goal, case.located) for state in (before, found["basic"], found["all"])]
    return Record(
        network=name,
        words=case.words,
        bits=bits,
        located=case.located,
        metric=subject.task.metric_name,
        float_metric=subject.float_metric,
        samples=len(subject.float_scores),
        calibration=subject.samples,
        drop=before.drop,
        noise=float((before.scores - subject.float_scores).std()) / len(before.scores) ** 0.5,
        error=before.error,
        results=results,
        int16=tuple(mix.int16 for mix in searched),
        int16_drop=tuple(mix.int16_drop for mix in searched),
        least=tuple(mix.least for mix in searched),
        seconds=time.process_time() - start,
    )


def _result(subject: Subject, state: State, before: State) -> Result:
    return Result(state.drop, state.noise(before), state.error, subject.passes(state))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", choices=[*CASES, []], default=list(CASES))
    parser.add_argument("--bits", nargs="+", type=int, choices=BITS, default=list(BITS))
    parser.add_argument("--goal", type=float, default=0.01, help="largest drop of a mix, in units of the metric")
    parser.add_argument("--wheels", type=Path, help="folder of the wheels of R-Net")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of trained networks")
    parser.add_argument("--peer-python", type=Path, help="a Python with AIMET")
    parser.add_argument("--records", type=Path, help="file to add the records to")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread\n")
    with tempfile.TemporaryDirectory() as folder:
        size = SMALL if options.small else Size()
        places = Places(Path(folder) if options.small else options.weights, options.wheels)
        records: list[Record] = read(options.records) if options.records else []
        for name in options.networks or CASES:
            lack = missing(options.wheels) if name == "rnet" else ""
            if lack:
                print(f"rnet is left out: {lack}")
                continue
            for bits in options.bits:
                record = measure(name, CASES[name], size, places, bits, options.goal)
                if options.peer_python:
                    record = measure_peer(record, size, places, options.peer_python)
                records = [r for r in records if (r.network, r.bits) != (name, bits)] + [record]
                if options.records:
                    append(options.records, record)
                print(f"{name}, {bits} bits: {record.seconds:.0f} CPU s", flush=True)
    print("\n".join(["", *tables(records), "", *summary(records)]))


if __name__ == "__main__":
    main()
