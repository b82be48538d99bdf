"""The configuration: Hydra schemas, composition, the search grammar, and building a task from `_target_`s.

No other package imports hydra. A configuration is checked in three steps before any heavy import: Hydra composes it
against the schemas (unknown keys, types), `trial_settings` builds the records of core/settings.py (illegal values), and
every value that the search space can propose goes through the same two steps.
"""

__all__ = [
    "build",
    "command",
    "command_schema",
    "command_table",
    "completion",
    "compose",
    "device_cost",
    "device_file",
    "executor_schema",
    "explain",
    "foreign",
    "help",
    "json_output",
    "json_schema",
    "key_limits",
    "keys",
    "overrides",
    "quoting",
    "results",
    "schema",
    "settings",
    "space",
    "study_results",
]
