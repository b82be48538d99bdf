"""Which learning rates are tried first, and which drops of short trainings are one and the same."""

from omegaconf import OmegaConf

from qflow.search.noise import Margin, Noise, difference_noise
from qflow.study.train_rate import alike, rates


def test_the_configured_rate_is_tried_first_and_then_its_neighbours():
    config = {"qat": {"learning_rate": 3e-5}, "search": {"rates": [1e-3, 1e-4, 1e-5, 1e-6]}}
    assert rates(OmegaConf.create(config)) == [3e-5, 1e-5, 1e-4, 1e-6, 1e-3]
    config["qat"]["learning_rate"] = 1e-5
    assert rates(OmegaConf.create(config))[:2] == [1e-5, 1e-4]


def test_one_sample_does_not_choose_a_rate_and_twenty_do():
    least = [1.0] * 90 + [0.0] * 10
    one, twenty = [0.0, *least[1:]], [0.0] * 20 + least[20:]
    gaps = {
        rate: Margin(lost / 100, difference_noise(0.9, 0.9 - lost / 100, 100, (least, scores)))
        for rate, lost, scores in ((1e-4, 1, one), (1e-3, 20, twenty))
    }
    assert alike(gaps) == [1e-4]
    assert alike({1e-4: Margin(0.01, Noise(float("inf"), "not known"))}) == []
