"""The runs of a study as data and files, from one store and into another.

MLflow gives an imported run an id of its own: the old ids are replaced in the tags. The tags that make a run known as a
study or trial are written last, so that a half-imported study is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qflow.core.errors import TrackingError
from qflow.tracking.artifacts import Opened, Store
from qflow.tracking.lease import CLAIMS
from qflow.tracking.limits import quoted
from qflow.tracking.mlflow_tracker import BATCH, METRIC_BATCH, MlflowTracker

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric, Param, Run, RunTag

KNOWN = ("qflow.kind", "qflow.study")
"""Tags by which a run is found."""
IMPORTING = "qflow.importing"
"""Tag of a run whose import has not ended, with the name of its study."""


def run_records(store: Store, study_run: str) -> list[dict[str, Any]]:
    """Return the study's run and then its trials, oldest first, as builtins; `address` is where their files lie.

    Raises TrackingError while one of them runs.
    """
    with store.calling() as client:
        study = client.get_run(study_run)
        query = f"tags.`mlflow.parentRunId` = '{study_run}'"
        found, token = [study], None
        while True:
            page = client.search_runs([study.info.experiment_id], query, page_token=token)
            found += page
            token = page.token
            if not token:
                break
        if running := [run for run in found if run.info.status == "RUNNING"]:
            by_hand = running[0].data.tags.get("qflow.trial", "").startswith("-")
            way_out = (
                "Wait for this trial by hand; if its process is gone, qflow doctor --fix ends it."
                if by_hand
                else "Start its qflow.tune once more: it ends what is open."
            )
            raise TrackingError(
                f"A study is bundled when it has ended, but got run {running[0].info.run_id} running. {way_out}"
            )
        head, *trials = found
        ordered = [head, *sorted(trials, key=lambda run: (run.info.start_time, run.info.run_id))]
        return [_record(store, run) for run in ordered]


def unfinished(store: Opened, study: str) -> list[str]:
    """Return the ids of the runs that an import of this study has left behind when its process was killed."""
    with store.calling() as client:
        places = [experiment.experiment_id for experiment in client.search_experiments()]
        return [str(r.info.run_id) for r in client.search_runs(places, f"tags.`{IMPORTING}` = {quoted(study)}")]


def restore_runs(
    tracker: MlflowTracker, records: Sequence[Mapping[str, Any]], folders: Sequence[Path]
) -> dict[str, str]:
    """Create the runs with their values and files, and return old id -> new id; `publish` makes them known.

    Runs that were created are deleted if one fails.
    """
    made: dict[str, str] = {}
    with tracker.calling() as client, withdrawn_on_error(tracker, made):
        for record in records:
            run = client.create_run(
                tracker.experiment_id,
                start_time=record["start"],
                run_name=record["name"],
                tags={IMPORTING: record["tags"]["qflow.study"]},
            )
            made[str(record["id"])] = str(run.info.run_id)
        for record, folder in zip(records, folders, strict=True):
            _fill(tracker, made[str(record["id"])], record, made)
            if any(folder.iterdir()):
                client.log_artifacts(made[str(record["id"])], str(folder))
    return made


def publish(tracker: MlflowTracker, records: Sequence[Mapping[str, Any]], made: Mapping[str, str]) -> None:
    """Write the tags by which the runs are found, the study's last."""
    with tracker.calling() as client:
        for record in reversed(records):
            for key in KNOWN:
                client.set_tag(made[record["id"]], key, record["tags"][key])
        for run in made.values():
            client.delete_tag(run, IMPORTING)


@contextmanager
def withdrawn_on_error(tracker: MlflowTracker, made: Mapping[str, str]) -> Iterator[None]:
    """Delete the runs of an import, if the block fails."""
    try:
        yield
    except BaseException:
        withdraw_runs(tracker, made.values())
        raise


def withdraw_runs(store: Opened, runs: Iterable[str]) -> None:
    """Delete runs of an import that has not ended."""
    with store.calling() as client:
        for run in runs:
            client.set_terminated(run, "KILLED")  # MLflow keeps deleted runs, with their status
            client.delete_run(run)


def renamed(text: str, made: Mapping[str, str]) -> str:
    """Return `text` with the new ids of runs in place of the old ones."""
    for old, new in made.items():
        text = text.replace(old, new)
    return text


def _record(store: Store, run: Run) -> dict[str, Any]:
    info = run.info
    history = {
        key: [[_number(m.value), m.timestamp, m.step] for m in store.client.get_metric_history(info.run_id, key)]
        for key in sorted(run.data.metrics)
    }
    return {
        "id": info.run_id,
        "name": info.run_name,
        "status": info.status,
        "start": info.start_time,
        "end": info.end_time,
        "params": dict(run.data.params),
        "metrics": history,
        "tags": dict(run.data.tags),
        "inputs": [_data_set(found) for found in (run.inputs.dataset_inputs if run.inputs else ())],
        "address": info.artifact_uri,
    }


def _fill(tracker: MlflowTracker, run_id: str, record: Mapping[str, Any], made: Mapping[str, str]) -> None:
    metrics, params, tags, inputs = _values(record, made)
    client = tracker.client
    for start in range(0, len(metrics), METRIC_BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + METRIC_BATCH])
    for start in range(0, max(len(params), len(tags)), BATCH):
        client.log_batch(run_id, params=params[start : start + BATCH], tags=tags[start : start + BATCH])
    client.log_inputs(run_id, datasets=inputs)
    client.set_terminated(run_id, record["status"], end_time=record["end"])


def _values(
    record: Mapping[str, Any], made: Mapping[str, str]
) -> tuple[list[Metric], list[Param], list[RunTag], list[DatasetInput]]:
    """Return metrics, params, tags and inputs of a run, with the new ids in the tags."""
    from mlflow.entities import Metric, Param, RunTag

    return (
        [Metric(k, float(v), int(t), int(s)) for k, rows in record["metrics"].items() for v, t, s in rows],
        [Param(key, str(value)) for key, value in record["params"].items()],
        [
            RunTag(k, renamed(str(v), made))
            for k, v in record["tags"].items()
            if k not in KNOWN and not k.startswith(CLAIMS)
        ],
        [_input(found) for found in record["inputs"]],
    )


def _data_set(found: DatasetInput) -> dict[str, Any]:
    data = found.dataset
    fields = {name: getattr(data, name) for name in ("name", "digest", "source_type", "source", "profile")}
    return {**fields, "tags": {tag.key: tag.value for tag in found.tags}}


def _input(record: Mapping[str, Any]) -> DatasetInput:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    fields = {name: value for name, value in record.items() if name != "tags"}
    return DatasetInput(Dataset(**fields), [InputTag(key, value) for key, value in record["tags"].items()])


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
