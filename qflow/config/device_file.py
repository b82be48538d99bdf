"""Device files for the Python interface: conf/device/<name>.yaml by name, or a user's file, read into checked records.

A file holds `march`, `oe_version`, `rules` (DeviceRules) and `cost` (CostModel). As in Hydra, it may start from another
file in its folder or from a shipped one: `defaults: [nash-m, _self_]`. The commands take the same file:

    mine/device/my-board.yaml:   defaults: [nash-m, _self_]
                                 rules: {float16_kinds: []}
    python -m qflow.tune --config-dir mine +experiment=int8_int16 device=my-board

A file is merged once, because that takes most of the time of a short analysis; it is merged again as soon as it, or one
that it starts from, has another content.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from qflow.config.command_schema import TuneSchema
from qflow.config.explain import explain
from qflow.config.keys import conf_dir
from qflow.config.yaml_file import mapping_text
from qflow.core.device_rules import DeviceRules
from qflow.core.errors import ConfigError
from qflow.core.nearest import did_you_mean
from qflow.core.record import digest
from qflow.core.temporary import TemporaryFolder

if TYPE_CHECKING:
    from qflow.cost_model.model import CostModel


def device_names() -> list[str]:
    """Return the names of the shipped device files."""
    return sorted(path.stem for path in (conf_dir() / "device").glob("*.yaml"))


def load_rules(name_or_path: str | Path) -> DeviceRules:
    """Return the dtype rules of a shipped device or of a device file. Raises ConfigError."""
    node = _load(name_or_path)
    return DeviceRules(
        march=_needed(node, "march", name_or_path),
        oe_version=_needed(node, "oe_version", name_or_path),
        **OmegaConf.to_container(node.rules),  # type: ignore[arg-type]
    )


def load_cost(name_or_path: str | Path) -> CostModel:
    """Return the cost model of a shipped device or of a device file. Raises ConfigError."""
    from qflow.cost_model.model import CostModel

    node = _load(name_or_path)
    require_cost(node, name_or_path)
    return CostModel(march=_needed(node, "march", name_or_path), **OmegaConf.to_container(node.cost))  # type: ignore[arg-type]


def rules_of(device: DictConfig) -> DeviceRules:
    """Return the dtype rules in the `device` of a configuration. Raises ConfigError."""
    rules: Any = OmegaConf.to_container(device.rules, resolve=True)
    return DeviceRules(march=device.march, oe_version=device.oe_version, **rules)


def cost_of(device: DictConfig) -> CostModel:
    """Return the cost model in the `device` of a configuration. Raises ConfigError, also where it has none."""
    from qflow.cost_model.model import CostModel

    require_cost(device, device.march)
    return CostModel(march=device.march, **OmegaConf.to_container(device.cost, resolve=True))  # type: ignore[arg-type]


def name_of(device: DictConfig) -> str:
    """Return a name or path for which `load_rules` and `load_cost` give this `device` of a configuration.

    A device that no shipped file describes is written to a file, which lasts as long as the process.
    """
    stated = _described(device)
    if device.march in device_names() and _described(_load(device.march)) == stated:
        return str(device.march)
    file = Path(_written().name) / f"{digest(stated)}.yaml"
    file.write_text(OmegaConf.to_yaml(OmegaConf.create(stated)))
    return str(file)


def _described(device: DictConfig) -> dict[str, Any]:
    found: Any = OmegaConf.to_container(device)
    return {key: found[key] for key in ("march", "oe_version", "rules", "cost")}


@functools.cache
def _written() -> TemporaryFolder:
    return TemporaryFolder()


def require_cost(device: DictConfig, name: object) -> None:
    """Raise ConfigError if a device has no whole cost section; its rules alone serve `check` and the library."""
    missing = sorted(key for key in device.cost if OmegaConf.is_missing(device.cost, key))
    if missing:
        raise ConfigError(
            f"A device file needs cost.{', cost.'.join(missing)}, but got none in {name}. Start from a shipped "
            "one: defaults: [nash-m, _self_]."
        )


@dataclass(frozen=True)
class _Source:
    """A file that a device was merged from: what asked for it, where it was found and what it held."""

    name: str | Path
    beside: Path | None
    path: Path
    content: str

    def unchanged(self) -> bool:
        try:
            return _find(self.name, self.beside) == self.path and self.path.read_text() == self.content
        except (ConfigError, OSError, UnicodeDecodeError):
            return False


_MERGED: dict[str, tuple[list[_Source], DictConfig]] = {}


def _load(name_or_path: str | Path) -> DictConfig:
    """Return a device file merged over its defaults, read-only. Raises ConfigError for unknown keys and wrong types."""
    sources, device = _MERGED.get(str(name_or_path), ([], None))
    if device is None or not all(source.unchanged() for source in sources):
        sources = []
        device = _merged(name_or_path, sources)
        _MERGED[str(name_or_path)] = sources, device
    return device


def _merged(name_or_path: str | Path, sources: list[_Source]) -> DictConfig:
    try:
        body = _body(name_or_path, None, (), sources)
        merged = OmegaConf.merge(OmegaConf.structured(TuneSchema), {"device": body})
        device = merged.device
        OmegaConf.to_container(device, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise ConfigError(f"Device file {name_or_path}: {explain(error)}") from error
    assert isinstance(device, DictConfig)
    OmegaConf.set_readonly(device, True)
    return device


def _find(name_or_path: str | Path, beside: Path | None = None) -> Path:
    shipped = conf_dir() / "device"
    given = Path(name_or_path)
    for place in [*([beside / f"{given}.yaml"] if beside else [given]), shipped / f"{given}.yaml"]:
        if place.suffix in (".yaml", ".yml") and place.is_file():
            return place
    raise ConfigError(
        f"A device is one of {', '.join(device_names())}, or the path of a .yaml file, but got {name_or_path}."
        f"{did_you_mean(name_or_path, device_names())}"
    )


def _body(name: str | Path, beside: Path | None, loading: tuple[Path, ...], sources: list[_Source]) -> Any:
    """Return the file's own keys merged over those of its defaults; the files are added to `sources`."""
    path = _find(name, beside)
    if path in loading:
        raise ConfigError(f"A device file starts from another one, but got a circle of defaults at {path}.")
    content = mapping_text(path, "A device file is YAML")
    try:
        loaded = OmegaConf.create(content or "{}")
    except (YAMLError, ValueError, TypeError) as error:  # a key twice, a number of 5000 digits
        raise ConfigError(
            f"A device file is YAML, but got {path}: {' '.join(str(error).split())[:200]}. Correct it."
        ) from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"A device file holds march, oe_version, rules and cost, but got another text in {path}.")
    sources.append(_Source(name, beside, path, content))
    own = OmegaConf.masked_copy(loaded, [str(key) for key in loaded if key != "defaults"])
    parents = [str(entry) for entry in loaded.get("defaults") or []]
    order = parents if "_self_" in parents else [*parents, "_self_"]
    parts = [own if e == "_self_" else _body(e, path.parent, (*loading, path), sources) for e in order]
    return OmegaConf.merge(*parts)


def _needed(node: DictConfig, key: str, name: object) -> Any:
    if OmegaConf.is_missing(node, key):
        raise ConfigError(f"A device file names its {key}, but got none in {name}. Add {key}: ... to it.")
    return node[key]
