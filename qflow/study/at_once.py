"""Several points of a strategy at once, as far as there are workers and the budget has room."""

from __future__ import annotations

from collections.abc import Sequence

from qflow.search.domain import Values
from qflow.search.strategies import AtOnce
from qflow.study.session import Session


def at_once(session: Session) -> AtOnce:
    """Return what measures points of a strategy at once, with a budget that holds exactly: running trials count."""
    driver = session.driver
    assert driver is not None

    def measure_all(points: Sequence[tuple[Values, str]]) -> None:
        driver.measure_all([({**session.base(), **point}, label) for point, label in points], session.room)

    return AtOnce(driver.executor.workers, measure_all)
