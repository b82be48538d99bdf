"""The files of a study's run that all its trials share: configuration, measured report, input example."""

from __future__ import annotations

import shutil
from pathlib import Path

from omegaconf import DictConfig

from qflow.bundle.example import write_example
from qflow.bundle.files import PROFILE
from qflow.config.settings import resolved_yaml
from qflow.core.errors import DataError
from qflow.trial.evaluator import Evaluator


def write_shared(folder: Path, config: DictConfig, evaluator: Evaluator) -> str:
    """Write the files into `folder`; return why the input example is not among them, or an empty text.

    A trial can then be loaded and rebuilt from its own run and its study's.
    """
    (folder / "config.yaml").write_text(resolved_yaml(config))
    if evaluator.profile:
        shutil.copy(evaluator.profile, folder / PROFILE)
    try:
        write_example(folder, evaluator.example)
    except DataError as error:
        return str(error)
    return ""
