"""The sample of the zoo of real models goes through the whole library; `make zoo` takes all models."""

import pytest
from zoo_real.registry import entries
from zoo_real.through import STEPS, Passage

pytestmark = pytest.mark.slow  # half a minute in all, and libraries that take seconds to load

ZOO = entries()
SAMPLE = [entry for entry in ZOO.values() if entry.sample]


@pytest.fixture(scope="module")
def passages():
    """The last model and its way so far: the steps of a model follow each other."""
    return {}


STEPPED = [pytest.param(entry, step, id=f"{entry.name}-{step}") for entry in SAMPLE for step in STEPS]


@pytest.mark.parametrize(("entry", "step"), STEPPED)
def test_a_real_model_passes(entry, step, passages):
    if entry.missing:
        pytest.skip(f"needs {entry.missing}: pip install 'qflow[zoo]'")
    if entry.name not in passages:
        passages.clear()
        passages[entry.name] = Passage(entry)
    passages[entry.name].run(step)


def test_the_zoo_and_its_sample_are_large():
    assert len(SAMPLE) >= 12
    assert len(ZOO) == len({entry.name for entry in ZOO.values()}) >= 25
