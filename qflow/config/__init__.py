"""The only home of Hydra: schemas, composition, the sweep grammar, and building a task from `_target_`s.

A configuration is checked in three steps before any heavy import: Hydra composes it against the schemas
(unknown keys, types), `trial_settings` builds the records of qflow/core/settings.py (illegal values), and every
value that the search space can propose goes through the same two steps.
"""

from qflow.config.build import build_task, build_training, get_function
from qflow.config.door import explain, run_door
from qflow.config.overrides import rewrite
from qflow.config.schema import GROUPS, conf_dir, register_schemas
from qflow.config.settings import (
    SAMPLERS,
    check_executor,
    load_resolved,
    owner,
    plain,
    required,
    resolved_yaml,
    root_dir,
    sensitivity_settings,
    trial_settings,
    with_params,
)
from qflow.config.space import configured, module_settings, parse_domain, search_space

__all__ = [
    "GROUPS",
    "SAMPLERS",
    "build_task",
    "build_training",
    "check_executor",
    "conf_dir",
    "configured",
    "explain",
    "get_function",
    "load_resolved",
    "module_settings",
    "owner",
    "parse_domain",
    "plain",
    "register_schemas",
    "required",
    "resolved_yaml",
    "rewrite",
    "root_dir",
    "run_door",
    "search_space",
    "sensitivity_settings",
    "trial_settings",
    "with_params",
]
