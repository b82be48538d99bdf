"""Held-out samples and the scores of single samples, as the gate of promote reads them."""

from dataclasses import replace
from types import SimpleNamespace

from torch.utils.data import Subset

from qflow.study.gate import has_held_out, score


def test_scores_of_a_split_are_those_of_its_samples(digits_task):
    whole = digits_task.data.evaluation
    data = SimpleNamespace(
        calibration=digits_task.data.calibration,
        evaluation=Subset(whole, range(40)),
        held_out=Subset(whole, range(40, 100)),
        sample_classes=digits_task.data.sample_classes,
    )
    task = replace(digits_task, data=data)
    assert has_held_out(task) and not has_held_out(digits_task)
    seen, unseen = (score(task, task.model, split, 16) for split in ("evaluation", "held_out"))
    assert (len(seen.scores), len(unseen.scores)) == (40, 60)
    assert unseen.classes == tuple(int(whole[i][1]) for i in range(40, 100))
    assert abs(unseen.metric - sum(unseen.scores) / 60) < 1e-12
    assert score(task, task.model, "evaluation", 7).scores == seen.scores
