"""Fixtures that several parts use: the digits task and an evaluator on it, built once."""

import os
import sys
from pathlib import Path

# Small networks gain nothing from threads, and on a busy machine they wait for each other: one, here and in commands.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items):
    """Fast tests first, so that most mistakes show within a minute.

    Processes that share the files (`--dist loadfile`) begin with those that hold slow tests: a long file that comes
    late leaves the other processes idle at the end.
    """
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.path not in slow)
    else:
        items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(scope="session", autouse=True)
def built_once(tmp_path_factory):
    """The folder of what is built once a session; the workers of a session share it."""
    from support.built_once import build_once

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    build_once(folder)
    return folder


@pytest.fixture(scope="session")
def digits_task():
    from qflow.tasks import digits
    from qflow.tasks.task import make_task

    return make_task(
        name="digits",
        model=digits.build_model(),
        data=digits.build_data(calibration_size=512),
        metric=digits.Accuracy(),
    )


@pytest.fixture(scope="session")
def nash_m():
    from qflow.core.device_rules import DeviceRules

    return DeviceRules(
        march="nash-m",
        oe_version="3.0.17",
        int8_inputs={"resize": [0], "max_pool": [0], "avg_pool": [0], "grid_sample": [0]},
        int8_outputs=["resize", "max_pool", "grid_sample"],
        float16_kinds=["layer_norm", "lut", "softmax", "add"],
    )


@pytest.fixture
def evaluator(digits_task, nash_m):
    from qflow.core.settings import CalibrationSettings, SensitivitySettings
    from qflow.cost_model.model import CostModel
    from qflow.trial.evaluator import Evaluator

    made = Evaluator(
        digits_task,
        nash_m,
        CostModel(),
        sensitivity_settings=SensitivitySettings(bad_cases=4, search_samples=32),
        default_calibration=CalibrationSettings(batch_size=16, steps=4),
        eval_batch=256,
    )
    made.measure_float()
    return made
