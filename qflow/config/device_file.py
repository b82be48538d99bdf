"""Device files for the Python interface: conf/device/<name>.yaml by name, or a user's file, read into checked records.

A file holds `march`, `oe_version`, `rules` (DeviceRules) and `cost` (CostModel). As in Hydra, it may start from another
file in its folder or from a shipped one: `defaults: [nash-m, _self_]`. The commands take the same file:

    mine/device/my-board.yaml:   defaults: [nash-m, _self_]
                                 rules: {float16_kinds: []}
    python -m qflow.tune --config-dir mine +experiment=int8_int16 device=my-board
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from qflow.config.command import explain
from qflow.config.command_schema import TuneSchema, conf_dir
from qflow.core.device import DeviceRules
from qflow.core.errors import ConfigError

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
    missing = sorted(key for key in node.cost if OmegaConf.is_missing(node.cost, key))
    if missing:
        raise ConfigError(
            f"A device file needs cost.{', cost.'.join(missing)}, but got none in {name_or_path}. Start from a shipped "
            "one: defaults: [nash-m, _self_]."
        )
    return CostModel(march=_needed(node, "march", name_or_path), **OmegaConf.to_container(node.cost))  # type: ignore[arg-type]


def _load(name_or_path: str | Path) -> DictConfig:
    """Load a device file over its defaults. Raises ConfigError for unknown keys and wrong types."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(TuneSchema), {"device": _body(_find(name_or_path), ())})
        device = merged.device
        OmegaConf.to_container(device, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise ConfigError(f"Device file {name_or_path}: {explain(error)}") from error
    assert isinstance(device, DictConfig)
    return device


def _find(name_or_path: str | Path, beside: Path | None = None) -> Path:
    shipped = conf_dir() / "device"
    given = Path(name_or_path)
    for place in [*([beside / f"{given}.yaml"] if beside else [given]), shipped / f"{given}.yaml"]:
        if place.suffix in (".yaml", ".yml") and place.is_file():
            return place
    raise ConfigError(
        f"A device is one of {', '.join(device_names())}, or the path of a .yaml file, but got {name_or_path}."
    )


def _body(path: Path, loading: tuple[Path, ...]) -> Any:
    """Return the file's own keys merged over those of its defaults."""
    if path in loading:
        raise ConfigError(f"A device file starts from another one, but got a circle of defaults at {path}.")
    try:
        loaded = OmegaConf.load(path)
    except (YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"A device file is YAML, but got {path}: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"A device file holds march, oe_version, rules and cost, but got a list in {path}.")
    own = OmegaConf.masked_copy(loaded, [str(key) for key in loaded if key != "defaults"])
    parents = [str(entry) for entry in loaded.get("defaults") or []]
    order = parents if "_self_" in parents else [*parents, "_self_"]
    parts = [own if e == "_self_" else _body(_find(e, path.parent), (*loading, path)) for e in order]
    return OmegaConf.merge(*parts)


def _needed(node: DictConfig, key: str, name: object) -> Any:
    if OmegaConf.is_missing(node, key):
        raise ConfigError(f"A device file names its {key}, but got none in {name}. Add {key}: ... to it.")
    return node[key]
