"""What executors cost and bear: `python -m benchmarks.executors [part ...]`.

throughput  trials of 2 s with 1 and 2 workers, processes and Ray, against the ideal; the driver's time a trial from
            these, what it predicts for 2 workers beside what was measured, and for up to 64 workers
flat        2,000 trials: processor time a trial and memory, by hundreds
analysis    bad cases and sensitivities of a task in one process and in two: seconds, equal tables
nodes       a Ray cluster of two nodes, one of which is killed in the middle: the results are those of one process

Trials sleep, so that these parts measure the executors and not the cores; `analysis` needs a core for each worker.
`ray` is needed for `nodes`, and is left out of `throughput` where it is missing. The exit code is 1 if a part fails.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from benchmarks.sleeping import DIRECTIONS, Sleeping, make, results, sample, study
from qflow.config.command_schema import register_schema
from qflow.config.keys import conf_dir
from qflow.config.overrides import rewrite
from qflow.core.dtype import QDtype
from qflow.executor.pool import Pool
from qflow.executor.processes import Processes
from qflow.executor.ray_nodes import RayNodes
from qflow.executor.ray_runtime import Runtime
from qflow.search.standing import Standing
from qflow.study.assemble import make_evaluator
from qflow.study.worker import executor_of

SECONDS, TRIALS = 2.0, 12
SIMULATED = (1, 2, 4, 8, 16, 32, 64)
WORKED = 0.9  # share of the ideal that two workers must reach


def resident_mb() -> float:
    """Return the resident memory of this process in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def pool(kind: str, workers: int, seconds: float) -> Sleeping:
    """Return an executor of trials that sleep."""
    shared = {"seconds": seconds}
    backend: Any = Processes(make, shared) if kind == "process" else RayNodes(make, shared, Runtime(cpus=workers))
    return Sleeping(Pool(backend, workers), seconds, [])


def measured(folder: Path, kind: str, workers: int, trials: int) -> float:
    """Return the seconds that `trials` trials take once the workers have started."""
    executor = pool(kind, workers, SECONDS)
    with study(folder / f"{kind}{workers}", executor) as driver:
        sample(driver, workers)  # starts them
        start = time.monotonic()
        sample(driver, workers + trials)
        return time.monotonic() - start


def simulated(workers: int, trials: int, seconds: float, driver: float, spread: float = 0.0) -> float:
    """Return the seconds of `trials` trials that each take the driver's own time `driver` beside their `seconds`.

    The driver begins a trial, or commits one, in `driver` / 2 each, and does one thing at a time; trial n begins when
    those up to n - `workers` are committed, and trials are committed in the order of their numbers. The lengths of
    trials vary evenly by `spread` of their mean.
    """
    drawn = [1.0 + spread * random.Random(n).uniform(-1.0, 1.0) for n in range(trials)]
    lengths = [seconds * one / statistics.fmean(drawn) for one in drawn]
    now, ends = 0.0, list[float]()
    for number in range(trials + workers):
        if number >= workers:  # the first that runs is waited for and committed
            now = max(now, ends[number - workers]) + driver / 2
        if number < trials:
            now += driver / 2
            ends.append(now + lengths[number])
    return now


def driver_time(took: float, trials: int) -> float:
    """Return the driver's time a trial, from what trials took with one worker."""
    return took / trials - SECONDS


def throughput(folder: Path, trials: int) -> list[str]:
    """Measure each executor with 1 and 2 workers, in turns; print shares of the ideal, and simulate more workers."""
    kinds = ["process", *(["ray"] if find_spec("ray") else [])]
    failed = []
    for kind in kinds:
        took = {workers: measured(folder, kind, workers, trials) for workers in (1, 2)}
        own = driver_time(took[1], trials)
        for workers, wall in took.items():
            share = trials * SECONDS / workers / wall
            model = simulated(workers, trials, SECONDS, own)
            print(
                f"{kind:<8} {workers} workers: {trials} trials of {SECONDS:g} s in {wall:.1f} s, {share:.3f} of the "
                f"ideal; the model says {model:.1f} s with {own * 1e3:.0f} ms of the driver a trial",
                flush=True,
            )
            failed += [f"{kind}: {share:.3f} of the ideal"] if workers == 2 and share < WORKED else []
    print_simulated(own)
    return failed


def print_simulated(own: float) -> None:
    """Print the simulated share of the ideal by workers and length of trials, even and varying by a half."""
    print(
        f"simulated share of the ideal with {own * 1e3:.0f} ms of the driver a trial (lengths equal / varying by half)"
    )
    print("seconds  " + "".join(f"{workers:>14}" for workers in SIMULATED))
    for seconds in (2.0, 10.0, 60.0, 600.0):
        cells = []
        for workers in SIMULATED:
            ideal = 1000 * seconds / workers
            cells.append([ideal / simulated(workers, 1000, seconds, own, spread) for spread in (0.0, 0.5)])
        print(f"{seconds:>7g}  " + "".join(f"{even:>7.2f} /{wide:>5.2f}" for even, wide in cells))


def flat(folder: Path, trials: int, sampler: str) -> list[str]:
    """Run a study of `trials` trials that do nothing, with its front after each; print its growth by tenths."""
    stamps: list[tuple[float, float]] = []
    rows: list[tuple[float, float]] = []
    part = max(trials // 10, 20)
    standing = Standing(ways=DIRECTIONS)

    def note(_: object) -> None:
        start = time.process_time()
        assert standing.after(driver.trials).front
        stamps.append((time.process_time(), time.process_time() - start))
        if len(stamps) % part == 0:
            group = stamps[-part:]
            each = statistics.median(b[0] - a[0] for a, b in zip(group, group[1:], strict=False))
            rows.append((each, resident_mb()))
            print(f"trials up to {len(stamps):>5}: {each * 1e3:6.1f} ms of processor time a trial, of it "
                  f"{statistics.median(s[1] for s in group) * 1e3:5.2f} ms for front and best; {rows[-1][1]:.0f} MB",
                  flush=True)  # fmt: skip

    with study(folder, None, note, sampler) as driver:
        sample(driver, trials)
    grown, more = rows[-1][0] / rows[1][0], rows[-1][1] - rows[1][1]
    print(f"{sampler}: from the second tenth to the last, time x{grown:.2f}, memory +{more:.0f} MB")
    return [f"time a trial grows by {grown:.2f}"] * (grown > 1.5) + [f"memory grows by {more:.0f} MB"] * (more > 200)


def analysis(folder: Path, arguments: Sequence[str]) -> list[str]:
    """Find bad cases and rank the operators in this process and in two workers; print the seconds."""
    register_schema("tune")
    found = {}
    for workers in (1, 2):
        own = ["executor=process", f"executor.workers={workers}", f"root={folder / str(workers)}", *arguments]
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = compose("tune", overrides=rewrite(["+experiment=int8_int16", "repair=none", *own]))
        evaluator = make_evaluator(config)
        evaluator.keep_in(folder / str(workers), print)
        evaluator.measure_float()
        executor = executor_of(config, evaluator, {}, folder / str(workers), print)
        assert executor is not None
        try:
            evaluator.workers = executor
            evaluator.find_badcases()  # starts the workers
            applied, start = evaluator.template(QDtype.qint16)[1], time.monotonic()
            cases = evaluator.find_badcases(applied=applied)
            middle = time.monotonic()
            ranked = evaluator.rank(applied=applied)
            took = middle - start, time.monotonic() - middle
        finally:
            executor.close()
        found[workers] = cases, ranked, took
        print(
            f"{workers} workers: bad cases {took[0]:.2f} s, {len(ranked.rows)} sensitivities {took[1]:.2f} s",
            flush=True,
        )
    faster = [one / two for one, two in zip(found[1][2], found[2][2], strict=True)]
    print(f"two workers are faster by {faster[0]:.2f} and {faster[1]:.2f}")
    return [] if found[1][:2] == found[2][:2] else ["the tables differ"]


def nodes(folder: Path, trials: int) -> list[str]:
    """Run a study on two nodes, end one as a lost machine would; compare with the study in one process."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second = cluster.add_node(num_cpus=1)
        backend = RayNodes(make, {"seconds": 0.3}, Runtime(cluster.address))
        executor = Sleeping(Pool(backend, 2), 0.3, [])
        told = 0

        def note(_: object) -> None:
            nonlocal told
            told += 1
            if told == trials // 2:
                start = time.monotonic()
                cluster.remove_node(second, allow_graceful=False)
                print(f"a node is killed after {told} trials ({time.monotonic() - start:.1f} s)", flush=True)

        with study(folder / "nodes", executor, note) as driver:
            sample(driver, trials)
            there = results(driver)
    finally:
        cluster.shutdown()
    with study(folder / "here", None) as driver:
        sample(driver, trials)
        here = results(driver)
    used = {place: executor.places.count(place) for place in sorted({*executor.places})}
    print(f"{len(there)} trials, by node: {', '.join(map(str, used.values()))}")
    found = [] if there == here else ["the results differ from those of one process"]
    return found + ([] if len(used) == 2 else ["one node did nothing"])


def main() -> int:
    """Run the parts; return 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="all without a name")
    parser.add_argument("--trials", type=int, help="of each measurement: 12, and 2,000 of flat")
    parser.add_argument(
        "--set", nargs="*", default=(), help="settings of qflow.tune for analysis, task=... for example"
    )
    parser.add_argument("--sampler", default="random", help="of flat; tpe and gp themselves grow with the trials")
    options = parser.parse_args()
    parts = {
        "throughput": lambda folder: throughput(folder, options.trials or TRIALS),
        "flat": lambda folder: flat(folder, options.trials or 2000, options.sampler),
        "analysis": lambda folder: analysis(folder, options.set),
        "nodes": lambda folder: nodes(folder, options.trials or TRIALS),
    }
    if unknown := sorted(set(options.parts) - set(parts)):
        parser.error(f"a part is one of {', '.join(parts)}, but got {', '.join(unknown)}")
    failed = []
    for name in options.parts or parts:
        print(f"--- {name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            failed += parts[name](Path(folder))
    print("\n".join(failed))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
