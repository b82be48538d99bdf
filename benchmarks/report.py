"""Size of a study's report, and the time to make it, by number of trials and operators.

    python -m benchmarks.report [--trials 24 500] [--operators 77 300] [--keep FOLDER]

The studies are made up (tests/support/study_records.py). `importances` is the time of Optuna's evaluators, which is
part of making a report; reading the runs from the store, about 3 ms each, comes on top.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[24, 500])
    parser.add_argument("--operators", type=int, nargs="+", default=[77, 300])
    parser.add_argument("--keep", type=Path, help="folder for the pages")
    options = parser.parse_args()
    from support.study_records import SPACE, record, trials

    from qflow.report.study_page import study_page
    from qflow.search.importance import importances
    from qflow.search.objective import MINIMIZE

    importances(SPACE, trials(24), {"accuracy/drop": MINIMIZE})  # imports scikit-learn
    print(f"{'trials':>7}{'operators':>11}{'MB':>7}{'importances s':>15}{'page s':>8}")
    for count in options.trials:
        start = time.perf_counter()
        importances(SPACE, trials(count), {"accuracy/drop": MINIMIZE, "cost/latency_ms": MINIMIZE})
        shares = time.perf_counter() - start
        for operators in options.operators:
            made = record(count, operators, trained=True)
            start = time.perf_counter()
            text = study_page(made)
            seconds = time.perf_counter() - start
            print(f"{count:>7}{operators:>11}{len(text.encode()) / 1e6:>7.2f}{shares:>15.2f}{seconds:>8.2f}")
            if options.keep:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / f"report-{count}-{operators}.html").write_text(text)


if __name__ == "__main__":
    main()
