"""The search space of a configuration: the domains by dotted key, their conditions, and the keys that may be searched.

    search:
      space:
        calibration: {method: "choice(mse, percentile)", percentile: "interval(99.9, 100)"}
        qconfig:
          modules:
            backbone.stem: choice(qint8, qint16)   # the whole name is one key
      when:
        calibration.percentile: {calibration.method: percentile}   # a value, a list, or interval(...), range(...)

A condition on a key that is not searched is decided here by the key's value in the configuration. If it holds, the
condition is removed; otherwise the dependent key is removed from the space.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from qflow.config.settings import SEARCHABLE, current, owner, trial_settings
from qflow.core.errors import ConfigError
from qflow.core.settings import QConfigSettings
from qflow.search.domain import Choice, Condition, Domain, Interval, Range, Scalar, applies, parents_first

NOT_SEARCHED = ("qat.loss", "qat.optimizer", "qat.scheduler")  # these are built once for all trials
Conditions = dict[str, tuple[Condition, ...]]


def search_space(config: DictConfig) -> dict[str, Domain]:
    """Return `search.space` with the conditions of `search.when`. Raises ConfigError for an illegal value."""
    space = {key: parse_domain(key, text) for key, text in _flat(config.search.space)}
    for key in space:
        _require_searchable(key)
    when = _when(config, space)
    for key, domain in space.items():
        parents = {c.key: _some(space[c.key], c.allowed) for c in when.get(key, ()) if c.key in space}
        for value in _extremes(domain):
            trial_settings(config, {**parents, key: value})
    return _decided(config, space, when)


def configured(config: DictConfig, space: Mapping[str, Domain]) -> dict[str, Scalar]:
    """Return the searched keys at their configured values; a module without one gets its first searched value."""
    found = {key: current(config, key) for key in space}
    return {k: _extremes(space[k])[0] if v is None and owner(k) else v for k, v in found.items()}


def module_settings(config: DictConfig, space: Mapping[str, Domain]) -> list[QConfigSettings]:
    """Return settings for each value of each searched module; only with the model can they be checked further."""
    modules = [key for key in space if owner(key) == "qconfig.modules"]
    return [trial_settings(config, {key: value}).qconfig for key in modules for value in _extremes(space[key])]


def _require_searchable(key: str) -> None:
    """Raise ConfigError for keys that a trial does not read."""
    group = key.split(".")[0]
    if group == "task":
        raise ConfigError(
            f"A search varies keys of calibration, qconfig, qat or repair, but got {key}: the task is built once for "
            "all trials. Give each setting of it a study of its own: study=<name>."
        )
    if group not in SEARCHABLE:
        raise ConfigError(f"A search varies keys of calibration, qconfig, qat or repair, but got {key}. Remove it.")
    if any(key == fixed or key.startswith(f"{fixed}.") for fixed in NOT_SEARCHED):
        raise ConfigError(f"A search varies what each trial reads anew, but got {key}, built once for all. Remove it.")


# ---- conditions


def _when(config: DictConfig, space: Mapping[str, Domain]) -> Conditions:
    """Return `search.when` as conditions by key. Raises ConfigError for keys and values that do not exist."""
    entries: Any = OmegaConf.to_container(config.search.when, resolve=True)
    found: Conditions = {}
    for key, conditions in entries.items():
        if conditions is None:
            continue
        if not isinstance(conditions, Mapping):
            raise ConfigError(
                f"search.when.{key} is a mapping of a key to its values, but got {conditions!r}. Correct it."
            )
        if key not in space:
            current(config, key, f"search.when.{key}")  # the key may be fixed, but it must exist
            continue
        found[key] = tuple(
            Condition(parent, _allowed(config, space, key, parent, value)) for parent, value in conditions.items()
        )
    return found


def _allowed(config: DictConfig, space: Mapping[str, Domain], key: str, parent: str, value: Any) -> Domain:
    """Return the values of `parent` at which `key` is searched; `parent` must be able to take each of them."""
    where = f"search.when.{key}"
    if isinstance(value, str) and "(" in value:
        allowed = parse_domain(parent, value)
    else:
        allowed = Choice(tuple(value) if isinstance(value, (list, tuple)) else (value,))
    if parent in space:
        lost = [v for v in allowed.points() if not space[parent].contains(v)] if isinstance(allowed, Choice) else []
        if lost or not _overlap(space[parent], allowed):
            raise ConfigError(
                f"{where} is on values that {parent} can take, but got {lost[0] if lost else value}, and it is "
                f"{_text(space[parent])}. Correct it, or take the key out: search.space.{key}=null."
            )
        return allowed
    _require_known(config, parent, where)
    if isinstance(allowed, Choice) and parent.split(".")[0] in SEARCHABLE:
        for value in allowed.values:
            trial_settings(config, {parent: value})
    return allowed


def _require_known(config: DictConfig, key: str, where: str) -> None:
    if current(config, key, where) is None and owner(key):
        raise ConfigError(f"{where} is on a key that is searched or set, but got {key}, which is neither. Set {key}.")


def _decided(config: DictConfig, space: Mapping[str, Domain], when: Conditions) -> dict[str, Domain]:
    """Return the space with the conditions on fixed keys decided, so that only conditions on its own keys remain."""
    fixed = {c.key: current(config, c.key) for conditions in when.values() for c in conditions if c.key not in space}
    whole = {key: replace(domain, when=when.get(key, ())) for key, domain in space.items()}
    known = {**whole, **{key: Choice((value,)) for key, value in fixed.items()}}
    dropped: set[str] = set()
    for key in parents_first(known):
        if not applies(known, key, fixed, dropped):
            dropped.add(key)
    return {
        key: replace(domain, when=tuple(c for c in domain.when if c.key in space))
        for key, domain in whole.items()
        if key not in dropped
    }


def _overlap(parent: Domain, allowed: Domain) -> bool:
    """Return whether `parent` can take a value of `allowed`; for two continuous intervals, whether they overlap."""
    listed, other = (parent, allowed) if parent.count() is not None else (allowed, parent)
    if listed.count() is not None:
        return any(other.contains(value) for value in listed.points())
    return (
        isinstance(parent, Interval)
        and isinstance(allowed, Interval)
        and (parent.low <= allowed.high and allowed.low <= parent.high)
    )


# ---- domains


def _some(parent: Domain, allowed: Domain) -> Scalar:
    """Return a value of `parent` at which the condition holds."""
    points = parent.points() if isinstance(parent, Choice) else _extremes(parent)
    return next((v for v in points if allowed.contains(v)), parent.normal(_extremes(allowed)[0]))


def _extremes(domain: Domain) -> tuple[Scalar, ...]:
    """Return the values that are checked for the domain: every choice, or both ends."""
    if isinstance(domain, Choice):
        return domain.values
    if isinstance(domain, Interval):
        return (domain.normal(domain.low), domain.normal(domain.high))
    return (domain.normal(domain.start), domain.normal(domain.start + (domain.count() - 1) * domain.step))


def _flat(node: Any) -> list[tuple[str, Any]]:
    """Return the leaves by dotted key, whether a key was written dotted or nested; null removes a key."""
    found: dict[str, Any] = {}
    for key, value in _leaves(OmegaConf.to_container(node, resolve=True), ""):
        found.pop(key, None)
        found[key] = value
    return [(key, value) for key, value in found.items() if value is not None]


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def parse_domain(key: str, text: Any) -> Domain:
    """Parse `choice(...)`, `interval(...)`, `range(...)`, with `tag(log, ...)` or `int(...)`. Raises ConfigError."""
    rule = f"A search value is choice(...), interval(...), range(...) or tag(log, interval(...)), but got {text!r}"
    try:
        override = OverridesParser.create().parse_override(f"key={text}")  # Hydra does not accept module names as keys
    except HydraException:
        raise ConfigError(f"{rule} for {key}. Correct the brackets.") from None
    value = override.value()
    if isinstance(value, ChoiceSweep):
        return Choice(tuple(_scalar(v) for v in value.list))
    if isinstance(value, IntervalSweep):
        whole = isinstance(value.start, int) and isinstance(value.end, int)  # only after int(...)
        return Interval(value.start, value.end, log="log" in value.tags, integer=whole)  # type: ignore[arg-type]
    if isinstance(value, RangeSweep):
        return Range(value.start, value.stop, value.step)  # type: ignore[arg-type]
    raise ConfigError(f"{rule} for {key}. To fix the value, set {key} itself.")


def _scalar(value: Any) -> Scalar:
    text = getattr(value, "text", None)  # Hydra's quoted strings
    return text if isinstance(text, str) else value


def _text(domain: Domain) -> str:
    if isinstance(domain, Choice):
        return f"choice({', '.join(map(str, domain.values))})"
    low, high = _extremes(domain)[0], _extremes(domain)[-1]
    return f"{'interval' if isinstance(domain, Interval) else 'range'}({low}..{high})"
