"""The data sets of a study, as inputs of its runs: MLflow lists which runs used which data, by digest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qflow.core.record import digest
from qflow.core.stored_text import stored_text

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput

CONTEXT = "mlflow.data.context"  # the tag that the UI shows beside the name
NAME, DIGEST = 500, 36  # characters that MLflow keeps


@dataclass(frozen=True)
class DataSet:
    """One split of a task's data."""

    name: str
    context: str
    """What it is used for: calibration or evaluation."""
    content: str
    """What identifies every sample; runs on equal data have an equal text."""
    source: str
    """Name of the code that gives the data: `my_package.data.Pictures`."""
    samples: int


def dataset_inputs(datasets: Sequence[DataSet]) -> list[DatasetInput]:
    """Return `datasets` as MLflow takes them, with their source as code."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return [
        DatasetInput(
            Dataset(
                name=stored_text(found.name, NAME),
                digest=digest(found.content)[:DIGEST],
                source_type="code",
                source=json.dumps({"tags": {"mlflow.source.type": "LOCAL", "mlflow.source.name": found.source}}),
                profile=json.dumps({"num_rows": found.samples}),
            ),
            [InputTag(CONTEXT, found.context)],
        )
        for found in datasets
    ]
