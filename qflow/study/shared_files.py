"""The files of a study's run with which it begins, and which all its trials share."""

from __future__ import annotations

import shutil
from pathlib import Path

from omegaconf import DictConfig

from qflow.bundle.example import write_example
from qflow.bundle.files import PROFILE
from qflow.config.settings import resolved_yaml
from qflow.core.errors import DataError
from qflow.core.record import to_json
from qflow.report.files import SCORES
from qflow.search.domain import Space, space_dict
from qflow.trial.evaluator import Evaluator


def write_shared(folder: Path, config: DictConfig, evaluator: Evaluator, space: Space) -> str:
    """Write the files into `folder`; return why the input example is not among them, or an empty text.

    A trial can then be loaded and rebuilt from its own run and its study's. The study can be reported: graph, space,
    and the float model's score of each evaluation sample.
    """
    (folder / "config.yaml").write_text(resolved_yaml(config))
    parts = {"graph.json": evaluator.graph, "space.json": space_dict(space), SCORES: evaluator.float_scores}
    for name, part in parts.items():
        (folder / name).write_text(to_json(part))
    if evaluator.profile:
        shutil.copy(evaluator.profile, folder / PROFILE)
    try:
        write_example(folder, evaluator.example)
    except DataError as error:
        return str(error)
    return ""
