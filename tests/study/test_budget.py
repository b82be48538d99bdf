"""The time that a study has left, as its lines say it."""

import random
from types import SimpleNamespace

import pytest

from qflow.study.budget import Budget

PACES = {
    "one by one": (1, 10.0, 0.2),
    "as long in the driver as in the model": (1, 0.2, 0.2),
    "four at once": (4, 10.0, 0.2),
    "more workers than the driver can serve": (16, 1.0, 0.2),
}


@pytest.mark.parametrize(("workers", "seconds", "driver"), PACES.values(), ids=PACES)
def test_the_time_left_is_right_within_a_factor_of_one_and_a_half(workers, seconds, driver):
    draw, budget, running, now, ends = random.Random(0), Budget(60), [], 0.0, []
    for number in range(60):
        if len(running) == workers:
            now = max(now, running.pop(0)) + driver / 2
            ends.append(now)
        now += driver / 2 + (100.0 if number == 30 else 0.0)  # a stage of its own
        running.append(now + seconds * draw.uniform(0.7, 1.3))
    for at in (15 if workers < 16 else 25, 40):
        budget.ends = ends[:at]
        done = [SimpleNamespace(seconds=seconds)] * (60 - len(ends) + at)
        expected = ends[-1] - ends[at - 1] - (100.0 if at < 30 - workers else 0.0)
        said = budget.seconds_left(done, workers)
        assert said == pytest.approx(expected, rel=0.5) and expected <= 1.5 * said, (said, expected)
