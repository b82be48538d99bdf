"""The model registry: numbered versions, and the alias that marks the promoted one.

MLflow has no compare-and-set, so two promotions at once agree by their versions: each is created with a claim on the
alias as it was found, version numbers only grow, and of equal claims that of the lowest number wins. A claim is
withdrawn once the alias has moved; one that a killed process left does not count on its host, and elsewhere for STALE
seconds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qflow.core.errors import ConfigError, PromotionError
from qflow.core.names import shown_name
from qflow.core.record import to_json
from qflow.process.running import this_process
from qflow.tracking.ended import has_ended

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from qflow.tracking.artifacts import Opened
    from qflow.tracking.model_files import Logged

CLAIM = "qflow.claim"
"""Tag of a version that is being promoted: the alias, the version that it pointed at, and the process."""
BY = " by "
BEFORE = "qflow.before"
"""Tag of a version: the version that its alias pointed at before; empty for the first."""
STALE = 60.0


@dataclass(frozen=True)
class Version:
    """A version of a registered model."""

    number: int
    run_id: str
    tags: Mapping[str, str]


def register(
    store: Opened, name: str, model: Logged, alias: str, before: Version | None,
    tags: Mapping[str, str], description: str,
) -> int:  # fmt: skip
    """Create a version of model `name` from a logged model, move `alias` from `before` to it, and return its number.

    Raises PromotionError if another promotion wins, which leaves the new version without the alias; ConfigError for an
    alias that MLflow reserves, TrackingError if the store fails.
    """
    check_alias(alias)
    was = str(before.number) if before else ""
    claim = f"{alias} after {was}"
    with store.calling() as client:
        _create_model(store, name)
        made = client.create_model_version(
            name,
            source=model.address,  # models:/ID would be looked up in the store of MLflow's global settings
            run_id=model.run_id,
            model_id=model.model_id,
            tags={**tags, CLAIM: f"{claim}{BY}{to_json(this_process())}", BEFORE: was},
            description=description,
        )
        version = int(made.version)  # text over HTTP
        rival = _rival(store, name, made, claim) or _moved(store, name, alias, before)
        if rival is None:
            client.set_registered_model_alias(name, alias, str(version))
            rival = _moved(store, name, alias, Version(version, "", {}))
        client.set_model_version_tag(name, str(version), CLAIM, "" if rival is None else f"lost to {rival}")
    if rival is not None:
        raise PromotionError(
            f"One promotion at a time moves an alias, but got another one, which gave {alias} of {name} to version "
            f"{rival}. Compare the two, and promote again if this one is better."
        )
    return version


def move_back(store: Opened, name: str, alias: str, tags: Mapping[str, str]) -> tuple[Version, Version]:
    """Move `alias` to the version that it pointed at before; return (left, now). `tags` are set on the one left.

    Raises PromotionError if there is no version before, or if another process moves the alias meanwhile.
    """
    left = champion(store, name, alias)
    before = version_before(name, alias, left)
    assert left is not None
    with store.calling() as client:
        found = client.get_model_version(name, before)
        now = Version(int(found.version), str(found.run_id), dict(found.tags))
        if (rival := _moved(store, name, alias, left)) is None:
            client.set_registered_model_alias(name, alias, str(now.number))
            rival = _moved(store, name, alias, now)
        if rival is not None:
            raise PromotionError(f"{name}@{alias} was moved to version {rival} meanwhile. Look at it, and run again.")
        for key, value in tags.items():
            client.set_model_version_tag(name, str(left.number), key, value)
    return left, now


def version_before(name: str, alias: str, present: Version | None) -> str:
    """Return the version that `alias` pointed at before `present`. Raises PromotionError if there is none."""
    if present is None or not present.tags.get(BEFORE):
        what = f"version {present.number}, the first" if present else "none"
        raise PromotionError(f"A rollback has a version before the present one, but {name}@{alias} is {what}.")
    return present.tags[BEFORE]


def champion(store: Opened, name: str, alias: str) -> Version | None:
    """Return the version that `alias` points at, or None if model or alias do not exist."""
    check_alias(alias)
    from mlflow.exceptions import MlflowException

    with store.calling() as client:
        try:
            found = client.get_model_version_by_alias(name, alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None  # the second is for a missing alias of a model that exists
            raise
    return Version(int(found.version), str(found.run_id), dict(found.tags))


def versions(store: Opened) -> list[tuple[str, int, Mapping[str, str]]]:
    """Return (model, number, tags) of every version that was promoted."""
    with store.calling() as client:
        found = [v for model in client.search_registered_models() for v in _of_model(client, model.name)]
    return [(shown_name(str(v.name)), int(v.version), dict(v.tags)) for v in found if "qflow.verdict" in v.tags]


def check_alias(alias: str) -> None:
    """Raise ConfigError for an alias that MLflow does not allow."""
    if not re.fullmatch(r"[\w-]{1,255}", alias):
        raise ConfigError(f"An alias is letters, digits, _ and -, but got {alias!r}. Rename it.")
    if alias.lower() == "latest" or re.fullmatch(r"v\d+", alias, re.IGNORECASE):
        raise ConfigError(
            f"An alias is a name that MLflow does not reserve (latest, v1, v2, ...), but got "
            f"{alias!r}. Take another, such as champion."
        )


def _of_model(client: MlflowClient, name: str) -> list[ModelVersion]:
    quoted = name.replace("'", "''")
    return list(client.search_model_versions(f"name = '{quoted}'"))


def _rival(store: Opened, name: str, made: Any, claim: str) -> int | None:
    """Return the number of an earlier version that claims the same, or None."""
    found = [
        int(v.version)
        for v in _of_model(store.client, name)
        if (held := v.tags.get(CLAIM, "").partition(BY))[0] == claim
        and not has_ended(held[2])
        and int(v.version) < int(made.version)
        and made.creation_timestamp - v.creation_timestamp < 1000 * STALE
    ]
    return min(found, default=None)


def _moved(store: Opened, name: str, alias: str, expected: Version | None) -> int | None:
    """Return the version that `alias` points at if it is not the expected one; 0 if it points nowhere."""
    found = champion(store, name, alias)
    now, wanted = (found.number if found else 0), (expected.number if expected else 0)
    return None if now == wanted else now


def _create_model(store: Opened, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        store.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
