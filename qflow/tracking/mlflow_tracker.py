"""Runs in MLflow: one parent run per study, one child run per trial.

    params   settings to sort or group by                metrics  names with slashes, 6 significant digits
    tags     qflow.study, .trial, .label, .kind, .result  files    at the root of the run, tables marked
    inputs   the data sets, by digest                     steps    metrics of a training, by step

MLflow writes the params of a batch first, then its metrics, then its tags. So a tag in the same batch as the values is
stored only if they are, and the tag `qflow.result` can be the commit point of a trial.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qflow.core.credentials import masked
from qflow.core.names import trial_name
from qflow.core.stored_text import REASON, stored_text
from qflow.tracking import connect, limits
from qflow.tracking.connect import SCHEMA
from qflow.tracking.datasets import DataSet, dataset_inputs
from qflow.tracking.limits import NOTE, rounded
from qflow.tracking.patience import Patience
from qflow.tracking.tables import TABLES, find_tables, histories, tables_tag

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

Plain = str | int | float | bool | None
RESULT = "qflow.result"  # tag of a trial: the marker, with every metric exactly as it was computed
BATCH = 90  # params or tags; MLflow splits at 100 and would then send the marker before the rest
METRIC_BATCH = 800  # metrics; MLflow also splits at 1000 values in all
LAST_STEP = "qat/steps"  # of a trained trial: its other metrics were measured after this step


class MlflowTracker:
    """One experiment of one store; open it with `open`. `seconds` is the wall time spent in its calls.

    `datasets` are the inputs of the study's run and of all its trials, `source` are tags of every run that it creates.
    """

    def __init__(self, client: MlflowClient, uri: str, experiment_id: str, patience: Patience | None = None) -> None:
        self.client = client
        self.uri = uri
        self.experiment_id = experiment_id
        self.patience = patience or Patience()
        self.seconds = 0.0
        self.datasets: Sequence[DataSet] = ()
        self._depth = 0
        self.source = connect.source_tags()

    @classmethod
    def open(cls, uri: str | None, folder: Path, experiment: str, patience: Patience | None = None) -> MlflowTracker:
        """Open the store at `uri` (a server or a database), or the SQLite store in `folder`; calls have `patience`.

        Raises TrackingError if the server does not answer within 5 s, the store is of a kind that is not supported, or
        the experiment was written by a qflow with another schema.
        """
        limits.check_experiment_name(experiment)
        start, patience = time.monotonic(), patience or Patience()
        client, uri, experiment_id = connect.open_client(uri, folder, experiment, patience)
        tracker = cls(client, uri, experiment_id, patience)
        tracker.seconds = time.monotonic() - start
        return tracker

    def ui_command(self) -> str:
        """Return the command that shows the runs; for a server, its address."""
        if self.uri.startswith("http"):
            return f"open {masked(self.uri)}"
        return f"mlflow ui --workers 1 --backend-store-uri {shlex.quote(masked(self.uri))}"

    def open_study(self, name: str, *, tags: Mapping[str, str], params: Mapping[str, Plain], description: str) -> str:
        """Return the run id of the study `name`: a new run, or its existing one with the status RUNNING again.

        A param keeps the value of the first start, as MLflow demands; values that have changed since are in the tag
        `qflow.changed_params`.
        """
        every = {**tags, NOTE: description} if description else dict(tags)
        with self._call():
            run_id = self.find_study(name) or self.create_study(name)
            inputs = self._run(run_id).inputs
            if not (inputs and inputs.dataset_inputs):
                self._log_inputs(run_id)
            self._log(run_id, {}, self._new_params(run_id, params, every), every)
            self.client.update_run(run_id, status="RUNNING")
            return run_id

    def create_study(self, name: str) -> str:
        """Create a run for the study `name` that says no more than whose it is, and return its id."""
        tags = {"qflow.study": name, "qflow.kind": "study", "qflow.schema": SCHEMA, **self.source}
        with self._call():
            return str(self.client.create_run(self.experiment_id, tags=tags, run_name=name).info.run_id)

    def find_study(self, name: str) -> str | None:
        """Return the run id of the study `name`, found by tag; None if there is none. Of several it is the first."""
        with self._call():
            runs = self._search(limits.runs_of(name, "study"))
        found = sorted((run.info.start_time, str(run.info.run_id)) for run in runs)
        return found[0][1] if found else None

    def start_trial(self, study_run_id: str, study: str, number: int, label: str) -> str:
        """Create a run for trial `number`, a child of the study's run, and return its id."""
        tags = {
            "mlflow.parentRunId": study_run_id,
            "qflow.study": study,
            "qflow.trial": str(number),
            "qflow.label": stored_text(label, limits.KEY),
            "qflow.kind": "trial",
            "qflow.schema": SCHEMA,
            **self.source,
        }
        name = stored_text(trial_name(number, label), limits.KEY)
        with self._call():
            run_id = str(self.client.create_run(self.experiment_id, tags=tags, run_name=name).info.run_id)
            self._log_inputs(run_id)
        return run_id

    def _log_inputs(self, run_id: str) -> None:
        if self.datasets:
            self.client.log_inputs(run_id, dataset_inputs(self.datasets))

    def upload(self, run_id: str, folder: Path) -> list[str]:
        """Upload everything in `folder` at once; return the names of the files in it that are tables.

        The histories among them become metrics by step.
        """
        from mlflow.entities import Metric

        if not any(folder.iterdir()):
            return []
        tables, now = find_tables(folder), int(time.time() * 1000)
        steps = [Metric(key, rounded(value), now, step) for key, value, step in histories(folder, tables)]
        with self._call():
            self.client.log_artifacts(run_id, str(folder))
            for at in range(0, len(steps), METRIC_BATCH):
                self.client.log_batch(run_id, metrics=steps[at : at + METRIC_BATCH])
        return tables

    def commit(
        self,
        run_id: str,
        outcome_json: str,
        params: Mapping[str, Plain],
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        folder: Path | None = None,
        tables: Sequence[str] = (),
    ) -> None:
        """Write the results of a trial; `outcome_json` becomes visible only after everything else."""
        with self._call():
            found = self.upload(run_id, folder) if folder else []
            every = {**tags, **tables_tag([*found, *tables]), RESULT: outcome_json}
            self._log(run_id, metrics, params, every)

    def result(self, run_id: str) -> str | None:
        """Return the `outcome_json` of a committed run, or None for another run."""
        return self.run_tags(run_id).get(RESULT)

    def find_trial(self, study: str, number: int) -> str | None:
        """Return the id of the newest run of a trial, found by tag."""
        query = f"tags.`qflow.study` = {limits.quoted(study)} and tags.`qflow.trial` = '{number}'"
        with self._call():
            found = self._search(query, 1)
        return str(found[0].info.run_id) if found else None

    def running_trials(self, study: str) -> list[str]:
        """Return the ids of the trial runs that were not ended, by a query for these only."""
        query = f"{limits.runs_of(study, 'trial')} and attributes.status = 'RUNNING'"
        with self._call():
            return [str(run.info.run_id) for run in self._search(query)]

    def trial_runs(self, study: str) -> list[tuple[str, int, str, str | None]]:
        """Return (run id, trial number, status, marker) of every trial run; it takes 2.5 ms per run."""
        with self._call():
            runs = self._search(limits.runs_of(study, "trial"))
        found = [(r.info, limits.joined(r.data.tags)) for r in runs]
        return [(info.run_id, int(tags["qflow.trial"]), info.status, tags.get(RESULT)) for info, tags in found]

    def end(self, run_id: str, status: str, reason: str | None = None) -> None:
        """End a run as FINISHED, FAILED or KILLED; the reason is stored in the tag `qflow.end_reason`."""
        with self._call():
            if reason:
                text = stored_text(reason, REASON)
                self._log(run_id, {}, {}, {"qflow.end_reason": text, NOTE: f"{status.lower()}: {text}"})
            self.client.set_terminated(run_id, status)

    def log_study(
        self,
        run_id: str,
        *,
        metrics: Mapping[str, float] | None = None,
        params: Mapping[str, Plain] | None = None,
        tags: Mapping[str, str] | None = None,
        folder: Path | None = None,
        tables: Sequence[str] = (),
    ) -> None:
        """Add files and values to a study's run; may be called several times."""
        with self._call():
            found, every = self.upload(run_id, folder) if folder else [], dict(tags or {})
            if found or tables:
                kept = [entry["path"] for entry in json.loads(self.run_tags(run_id).get(TABLES, "[]"))]
                every |= tables_tag([*kept, *found, *tables])
            self._log(run_id, metrics or {}, self._new_params(run_id, params or {}, every), every)

    def clear(self, run_id: str) -> None:
        """Delete a run's files, because those that are written next need not replace all of them."""
        with self._call():
            if self.client.list_artifacts(run_id):
                place = self.client.get_run(run_id).info.artifact_uri
                self.patience.call(self.uri, lambda: connect.delete_artifacts(place))
                self.client.set_tag(run_id, TABLES, "[]")

    def download(self, run_id: str, path: str, into: Path) -> Path:
        """Fetch a file or folder of a run's artifacts into `into`. Raises TrackingError when it is absent."""
        into.mkdir(parents=True, exist_ok=True)
        with self._call():
            return Path(self.client.download_artifacts(run_id, path, str(into)))

    def run_params(self, run_id: str) -> dict[str, str]:
        """Return the params of a run, as text."""
        return dict(self._run(run_id).data.params)

    def run_metrics(self, run_id: str) -> dict[str, float]:
        """Return the metrics of a run, the last value of each."""
        return dict(self._run(run_id).data.metrics)

    def run_tags(self, run_id: str) -> dict[str, str]:
        """Return the tags of a run."""
        return limits.joined(self._run(run_id).data.tags)

    def keeping(self, place: Path) -> AbstractContextManager[None]:
        """Inside, a store that is away raises a StoreAwayError: the caller keeps its results in `place` meanwhile."""
        return self.patience.keeping(place)

    @contextmanager
    def calling(self) -> Iterator[MlflowClient]:
        """Yield the client; count the time inside, and turn MLflow's errors into one line."""
        with self._call():
            yield self.client

    def _run(self, run_id: str) -> Run:
        with self._call():
            return self.client.get_run(run_id)

    def _search(self, query: str, limit: int | None = None) -> list[Run]:
        runs: list[Run] = []
        token = None
        while True:
            page = self.client.search_runs([self.experiment_id], query, max_results=limit or 1000, page_token=token)
            runs += page
            token = page.token
            if not token or (limit and len(runs) >= limit):
                return runs

    def _new_params(self, run_id: str, params: Mapping[str, Plain], tags: dict[str, str]) -> dict[str, Plain]:
        """Return the params that a run does not have yet; add those with changed values to `tags` as one tag."""
        if not params:
            return {}
        kept = self.run_params(run_id)
        changed = {k: v for k, v in params.items() if k in kept and kept[k] != limits.param_value(v)}
        if changed:
            tags["qflow.changed_params"] = json.dumps(changed, sort_keys=True)
        return {k: v for k, v in params.items() if k not in kept}

    def _log(
        self, run_id: str, metrics: Mapping[str, float], params: Mapping[str, Plain], tags: Mapping[str, str]
    ) -> None:
        """Write one batch. If it is too large, the tags follow in a batch of their own."""
        from mlflow.entities import Metric, Param, RunTag

        now, step = int(time.time() * 1000), int(metrics.get(LAST_STEP, 0))
        values = [Metric(key, rounded(value), now, step) for key, value in metrics.items()]
        texts = [Param(key, limits.param_value(value)) for key, value in params.items()]
        marks = [RunTag(key, part) for key, part in limits.tag_parts(tags).items()]
        if len(texts) > BATCH or len(values) > METRIC_BATCH:
            self.client.log_batch(run_id, metrics=values, params=texts)
            values, texts = [], []
        self.client.log_batch(run_id, metrics=values, params=texts, tags=marks)

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Count the time once for nested calls, and turn MLflow's errors into one line."""
        start = time.monotonic()
        self._depth += 1
        try:
            with connect.plain_errors(self.uri):
                yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.seconds += time.monotonic() - start
