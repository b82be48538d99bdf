"""A saved view of the MLflow UI that shows accuracy against latency, where the UI would show a collapsed run list.

The UI stores a shared view as an experiment tag, `mlflow.sharedViewState.<key>`, whose state is
`deflate;` + base64(zlib(JSON)). The format is not documented (it works on 3.17.2), so a failure to write it is ignored;
the address without a view still filters and sorts. The view sorts by the trials' rank, so by a metric, because the UI
then lists all trials; sorted by time, it nests them under their study and plots the studies only.
"""

from __future__ import annotations

import base64
import json
import logging
import time
import zlib
from collections.abc import Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from qflow.core import record
from qflow.core.credentials import masked, without_user
from qflow.core.errors import TrackingError

if TYPE_CHECKING:
    from qflow.tracking.mlflow_tracker import MlflowTracker

TAG = "mlflow.sharedViewState."
DROP, LATENCY, INT16 = "accuracy/drop", "cost/latency_ms", "qconfig/int16_ratio"
RANK, MEETS = "goal/rank", "goal/meets"
LOCAL_UI = "http://127.0.0.1:5000"
_log = logging.getLogger(__name__)


def save_view(
    tracker: MlflowTracker,
    study: str,
    *,
    metrics: Sequence[str] = (),
    params: Sequence[str] = (),
    largest: float | None = None,
    x: str = LATENCY,
    y: str = DROP,
) -> str | None:
    """Save the view of a study's trials and return its key, or None if that failed.

    `x` and `y` are the metrics of the scatter plot. The parallel coordinates also show `params` and the int16 share.
    `metrics` and `params` are further columns. The filter leaves out runs whose `y` is above `largest`, because the UI
    scales its charts to all runs that it lists, and does not keep from a saved view which of them are hidden.
    """
    state = view_state(study, metrics, params, largest, x, y)
    key = record.digest([study, list(metrics), list(params), x, y])
    now = int(time.time() * 1000)
    name = f"{study}: {y} against {x}" + (f", {y} up to {largest:.3g}" if largest is not None else "")
    value = {"name": name, "createdAt": now, "updatedAt": now, "state": pack(state)}
    try:
        with tracker.calling() as client:
            client.set_experiment_tag(tracker.experiment_id, TAG + key, json.dumps(value))
    except TrackingError as error:  # a study must not fail because of its view
        _log.info("The view of %s was not saved: %s", study, error)
        return None
    return key


def known_view(tracker: MlflowTracker, study: str, x: str = LATENCY, y: str = DROP) -> str | None:
    """Return the key of the view that was saved for a study last; None if there is none."""
    with tracker.calling() as client:
        tags = client.get_experiment(tracker.experiment_id).tags
    views = {key.removeprefix(TAG): json.loads(value) for key, value in tags.items() if key.startswith(TAG)}
    own = {
        key: view["updatedAt"] for key, view in views.items() if view["name"].startswith(f"{study}: {y} against {x}")
    }
    return max(own, key=own.__getitem__, default=None)


def study_url(host: str, experiment_id: str, study: str, key: str | None = None, *, charts: bool = True) -> str:
    """Return the address of a study's trials, with the saved view `key` or with a filter and an order."""
    # the UI opens in its mode for language models by default
    query = {"workflowType": "machine_learning"}
    if key:
        query["viewStateShareKey"] = key
    else:
        query |= {"searchFilter": _filter(study), "orderByKey": _metric(RANK), "orderByAsc": "true"}
    if charts:
        query["compareRunsMode"] = "CHART"
    return f"{host.rstrip('/')}/#/experiments/{experiment_id}/runs?{urlencode(query)}"


def runs_url(uri: str, experiment_id: str) -> str:
    """Return the address below which each run of an experiment has its page, on the server or under `mlflow ui`."""
    return f"{ui_host(uri).rstrip('/')}/#/experiments/{experiment_id}/runs"


def ui_host(uri: str) -> str:
    """Return where the UI of a store is: at the server, or where `mlflow ui` puts it."""
    if not uri.startswith(("http://", "https://")):
        return LOCAL_UI
    return masked(without_user(uri))  # it is printed and stored


def view_state(
    study: str, metrics: Sequence[str], params: Sequence[str], largest: float | None, x: str, y: str
) -> dict[str, Any]:
    """Return the page state: the study's trials sorted by rank, a scatter plot and parallel coordinates."""
    columns = [_metric(name) for name in dict.fromkeys((RANK, MEETS, y, x, INT16, *metrics))]
    section = "qflow-charts"
    card = {"metricSectionId": section, "deleted": False, "isGenerated": False}
    scatter = {
        **card, "type": "SCATTER", "uuid": "qflow-scatter", "runsCountToCompare": 100,
        "xaxis": {"key": x, "type": "METRIC"}, "yaxis": {"key": y, "type": "METRIC"},
    }  # fmt: skip
    parallel = {
        **card, "type": "PARALLEL", "uuid": "qflow-parallel", "runsCountToCompare": 100, "showAllRuns": False,
        "selectedParams": list(params), "selectedMetrics": [INT16, x, y],
    }  # fmt: skip
    return {
        "searchFilter": _filter(study) + (f" and {_metric(y)} <= {_exact(largest)}" if largest is not None else ""),
        "orderByKey": _metric(RANK),
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": [*columns, *(f"params.`{name}`" for name in params)],
        "runsHiddenMode": "SHOW_ALL",
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "compareRunCharts": [scatter, parallel],
        "compareRunSections": [
            {"uuid": section, "name": "qflow", "display": True, "isReordered": False, "deleted": False,
             "isGenerated": False},
        ],
    }  # fmt: skip


def pack(state: dict[str, Any]) -> str:
    """Return the text form of a state."""
    return "deflate;" + base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()


def unpack(text: str) -> dict[str, Any]:
    """Return the state in a text that `pack` made."""
    state: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(text.removeprefix("deflate;"))))
    return state


def _exact(value: float) -> str:
    """Return every digit, without an exponent: a rounded bound could leave out the run that it was made from."""
    return f"{Decimal(repr(float(value))):f}"


def _filter(study: str) -> str:
    return f"tags.`qflow.study` = '{study}' and tags.`qflow.kind` = 'trial'"


def _metric(name: str) -> str:
    return f"metrics.`{name}`"
