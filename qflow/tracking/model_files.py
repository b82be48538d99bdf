"""A folder as an MLflow model of the flavor python_function: MLmodel, signature, input example, requirements.txt.

MLflow imports the loader module and calls its `_load_pyfunc(folder)`. Nothing is pickled.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qflow.core.errors import TrackingError
from qflow.core.record import to_json
from qflow.process.running import this_process
from qflow.tracking.ended import PROCESS, has_ended

if TYPE_CHECKING:
    from collections.abc import Iterator

    from qflow.tracking.artifacts import Opened

TensorSpecs = Sequence[tuple[str, Any, tuple[int, ...]]]
"""(name, numpy dtype, shape with -1 for the batch axis) of each tensor."""


@dataclass(frozen=True)
class ModelFiles:
    """What an MLflow model says of itself, beside the files that its loader reads."""

    loader: str
    """Dotted name of the module with `_load_pyfunc`."""
    config: Mapping[str, str]
    """Defaults of what a caller may set with `model_config`."""
    inputs: TensorSpecs
    outputs: TensorSpecs
    example: Mapping[str, Any]
    """Input name -> array."""
    requirements: Sequence[str]


@dataclass(frozen=True)
class Logged:
    """An uploaded MLflow model: its id, the run that it came from, and the address of its files."""

    model_id: str
    run_id: str
    address: str


def write_model(folder: Path, data: Path, files: ModelFiles) -> None:
    """Write the MLflow model into the new folder `folder`, with a copy of `data` in `folder/data`."""
    from mlflow import pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    def schema(specs: TensorSpecs) -> Any:
        return Schema([TensorSpec(dtype, shape, name) for name, dtype, shape in specs])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # hints for Databricks, and that integers cannot hold missing values
        pyfunc.save_model(
            str(folder),
            loader_module=files.loader,
            data_path=str(data),
            model_config=dict(files.config),
            signature=ModelSignature(schema(files.inputs), schema(files.outputs)),
            input_example=dict(files.example),
            pip_requirements=list(files.requirements),
        )


@contextmanager
def logged_model(store: Opened, folder: Path, name: str, run_id: str, tags: Mapping[str, str]) -> Iterator[Logged]:
    """Upload an MLflow model as the result of a run, and yield it; it is marked as failed if the block raises.

    One of this run that a killed process has left pending is marked so too.
    """
    process, made = to_json(this_process()), None
    with store.calling() as client:
        experiment = client.get_run(run_id).info.experiment_id  # raises for a run that does not exist
    _fail_pending(store, experiment, run_id, has_ended)
    try:
        with store.calling() as client:
            every = {**tags, PROCESS: process}
            made = client.create_logged_model(
                experiment, name=name, source_run_id=run_id, tags=every, model_type="qflow"
            )
            client.log_model_artifacts(made.model_id, str(folder))
            client.finalize_logged_model(made.model_id, "READY")
        yield Logged(str(made.model_id), run_id, str(made.artifact_location))
    except BaseException:
        with suppress(TrackingError):  # the first error is the one to report
            if made is None:  # an interrupt may come right after it was created
                _fail_pending(store, experiment, run_id, lambda text: text == process)
            else:
                with store.calling() as client:
                    client.finalize_logged_model(made.model_id, "FAILED")
        raise


def _fail_pending(store: Opened, experiment: str, run_id: str, of: Callable[[str], bool]) -> None:
    """Mark the models of a run as failed that are pending and whose process fulfils `of`."""
    with store.calling() as client:
        for left in client.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
            if left.status == "PENDING" and of(left.tags.get(PROCESS, "")):
                client.finalize_logged_model(left.model_id, "FAILED")
