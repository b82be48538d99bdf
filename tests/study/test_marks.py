"""Which trials a chart leaves out: those whose drop would flatten the differences of all others."""

from qflow.search.outcome import FinishedTrial, Outcome
from qflow.study.marks import largest_shown


def trial(number, drop, **tags):
    outcome = Outcome(
        (0.0,), {"accuracy_drop": drop - 0.01}, {}, {"accuracy/drop": drop}, {f"qflow.{k}": "" for k in tags}
    )
    return FinishedTrial(number, f"run{number}", {}, "", outcome, 1.0)


def left_out(*drops):
    most = largest_shown([trial(number, drop) for number, drop in enumerate(drops)])
    return [] if most is None else [number for number, drop in enumerate(drops) if drop > most]


def test_a_diverged_trial_is_left_out_of_the_chart():
    assert left_out(0.001, 0.004, 0.012, 0.02, 0.035, 0.9) == [5]


def test_trials_of_one_spread_are_all_shown():
    assert left_out(0.0, 0.1, 0.2, 0.3, 0.4) == []
    assert left_out(0.001, 0.9) == []  # too few to say which of them is usual
    assert left_out() == []


def test_what_meets_the_goal_is_always_shown():
    assert left_out(-0.9, 0.0, 0.0, 0.0, 0.0, 0.009) == []


def test_a_trial_that_ended_early_has_no_drop_of_its_own():
    whole = [trial(number, 0.02 + 0.001 * number) for number in range(4)]
    assert largest_shown([*whole, trial(9, 1.0, stopped=True)]) < 0.05
