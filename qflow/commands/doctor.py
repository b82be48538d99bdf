"""python -m qflow.doctor: whether studies, runs, leases, cache and registry agree; fix=true mends what is safe.

Exit code 0: all is well (with fix=true: after the mending); 1: something is wrong, and each thing is named; 2: a
mistake in the command line, or a store that does not open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qflow.config.command import Result, run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """Entry point."""
    run_command("doctor", doctor)


def doctor(config: DictConfig) -> Result:
    """Examine the stores and the folder, mend with `fix`, and print a line for each invariant."""
    from qflow.config.settings import patience, root_dir
    from qflow.study.doctor import Doctor
    from qflow.tracking.artifacts import Store

    root = root_dir(config)
    store = Store.open(config.tracking.uri, root, patience(config))
    found = Doctor(store, root, config.search.storage or root, config.fix).findings()
    for finding in found:
        print(f"{finding.about:<12}{finding.told}")
        for text in finding.wrong:
            print(f"{'wrong':<12}{text}")
        for text in finding.mended:
            print(f"{'mended':<12}{text}")
    record = {f.about: {"ok": not f.wrong, "told": f.told, "wrong": f.wrong, "mended": f.mended} for f in found}
    return int(any(finding.wrong for finding in found)), {"findings": record, "fix": bool(config.fix)}
