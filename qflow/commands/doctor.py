"""python -m qflow.doctor: whether studies, runs, leases, cache and registry agree; fix=true mends what is safe.

`doctor plugin` checks an installed horizon_plugin_pytorch against what engine=plugin relies on, and prints what
differs. Exit code 0: all is well (with fix=true: after the mending); 1: something is wrong, and each thing is named; 2:
a mistake in the command line, a store that does not open, or no plugin.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from qflow.config.command import Result, run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig

WORDS = {"plugin": "plugin=true"}
"""What may be written instead of an override."""


def main() -> None:
    """Entry point."""
    run_command("doctor", doctor, [WORDS.get(word, word) for word in sys.argv[1:]])


def doctor(config: DictConfig) -> Result:
    """Examine the stores and the folder, mend with `fix`, and print a line for each invariant."""
    if config.plugin:
        return check_plugin()
    from qflow.config.settings import patience, root_dir
    from qflow.study.doctor import Doctor
    from qflow.tracking.artifacts import Store

    root = root_dir(config)
    store = Store.open(config.tracking.uri, root, patience(config))
    found = Doctor(store, root, config.search.storage or root, config.fix).findings()
    for finding in found:
        print(f"{finding.about:<12}{finding.told}")
        for text in finding.wrong:
            print(f"{'wrong':<12}{text}")
        for text in finding.mended:
            print(f"{'mended':<12}{text}")
    record = {f.about: {"ok": not f.wrong, "told": f.told, "wrong": f.wrong, "mended": f.mended} for f in found}
    return int(any(finding.wrong for finding in found)), {"findings": record, "fix": bool(config.fix)}


def check_plugin() -> Result:
    """Check the installed plugin against the contract of engine=plugin. Raises ConfigError if none is installed."""
    from qflow.config.compose import require_only
    from qflow.core.record import plain
    from qflow.plugin.contract import check_contract
    from qflow.plugin.public import Public

    require_only(("plugin",), "doctor plugin checks the installed plugin alone")
    public = Public()
    print(f"{'plugin':<12}horizon_plugin_pytorch {public.version}")
    found = check_contract(public)
    wrong = [one for one in found if not one.ok]
    for one in wrong:
        print(f"{'differs':<12}{one.what}: the contract has {one.expected}, the plugin {one.got}")
    for call in public.calls if wrong else []:
        if call.failed:
            print(f"{'failed':<12}{call.name}({call.arguments}): {call.failed}")
    print(f"{'contract':<12}{len(found) - len(wrong)} of {len(found)} checks agree")
    return int(bool(wrong)), {"plugin": public.version, "checks": list(map(plain, found))}
