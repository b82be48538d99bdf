"""The repair of the float weights, before the calibration, the analysis and the baselines."""

from __future__ import annotations

from pathlib import Path

from qflow.core.record import to_json
from qflow.core.temporary import TemporaryFolder
from qflow.repair.base.contract import KEPT, REFUSED, RepairTable, Row
from qflow.report.files import REPAIR
from qflow.study.kept import log_study
from qflow.study.session import Session

NAMED = 3  # reasons that a decision names for each step


def repair(session: Session) -> None:
    """Repair the float weights with the configured steps, for all that follows, and record what was tried and why."""
    settings = session.evaluator.default_repair
    if not settings.steps:
        return
    with session.console.stage("repair") as say:
        found = session.evaluator.repair()
        assert found is not None  # there are steps
        table = found.table
        say(table.view().title + _passes(table))
    with TemporaryFolder() as folder:
        (Path(folder) / REPAIR).write_text(to_json(table, indent=1))
        (Path(folder) / "repair.txt").write_text(table.view().text(len(table.rows)))
        log_study(session, folder=Path(folder))
    for step in settings.steps:
        session.decide("repair", f"{step}: {_said([row for row in table.rows if row.step == step])}")


def _passes(table: RepairTable) -> str:
    samples = table.samples + table.held_out
    return f", {table.forwards / samples:.1f} passes over {samples} samples" if samples else ""


def _said(rows: list[Row]) -> str:
    """Return what was kept and what was not, with the reasons, the most frequent first."""
    kept = [row for row in rows if row.verdict == KEPT]
    parts = [_kept(row) for row in kept]
    reasons: dict[str, int] = {}
    for row in rows:
        if row.verdict != KEPT:
            reason = row.reason if row.verdict == REFUSED else f"{row.reason}, taken back"
            reasons[reason] = reasons.get(reason, 0) + max(len(row.parts), 1)
    named = sorted(reasons.items(), key=lambda pair: -pair[1])
    some = [f"{reason} ({count} parts)" if count > 1 else reason for reason, count in named[:NAMED]]
    more = f" and {len(named) - NAMED} more reasons" if len(named) > NAMED else ""
    if some:
        parts.append(f"not {'elsewhere' if kept else 'kept'}: {'; '.join(some)}{more}")
    return "; ".join(parts) if parts else "nothing to repair"


def _kept(row: Row) -> str:
    first, *others = row.parts
    more = f" and {len(others)} more" if others else ""
    error = f"{row.before:.4g} -> {row.after:.4g}" if row.before is not None and row.after is not None else "finite now"
    what = row.changed.get(first, "")
    return f"kept on {first}{more}{f' ({what})' if what else ''}, error of the outputs {error}"
