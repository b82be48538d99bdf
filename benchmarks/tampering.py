"""Random changes to a stored trial, to an archive of its study, and to the cache; a part of benchmarks/reliability.py.

Whoever changes files cannot change the digest on the run. Whoever owns the run puts a function of their choice in the
place of a `_target_` and writes a new digest. The function would leave a file behind.
"""

from __future__ import annotations

import collections
import importlib
import json
import os
import random
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import mlflow.store.tracking.sqlalchemy_store  # noqa: F401  # imported before the forks, which then need no time for it

from benchmarks.store_calls import in_child
from qflow.bundle.files import DIGEST, digests, files_digest
from qflow.tracking.artifacts import Store

STUDY = ["+experiment=int8_int16", "task=digits", "search.n_trials=4", "repair=none", "executor.threads=1"]
FOREIGN = (
    "os.system", "subprocess.getoutput", "builtins.eval", "torch.utils.collect_env.run", "torch.hub.load",
    "hydra.utils.get_method", "qflow.tasks.digits.torch.load", "importlib.import_module", "shutil.copy",
)  # fmt: skip


def command(name: str, *arguments: str) -> tuple[int, str]:
    """Run a command of qflow in a forked process, which has its imports; return its exit code and what it printed."""
    with tempfile.TemporaryFile() as said:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            weakref.finalize._registry.clear()  # type: ignore[attr-defined]  # folders of the parent, which stay
            os._exit(_exit_code(name, arguments))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        return code, said.read().decode(errors="replace")


def _exit_code(name: str, arguments: Sequence[str]) -> int:
    sys.argv = [f"qflow.{name}", *arguments]
    try:
        importlib.import_module(f"qflow.commands.{name}").main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def flip(rng: random.Random, file: Path) -> None:
    """Change one bit of a file."""
    data = bytearray(file.read_bytes() or b"\0")
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def cut(rng: random.Random, file: Path) -> None:
    """Keep the beginning of a file."""
    file.write_bytes(file.read_bytes()[: rng.randrange(max(file.stat().st_size, 1))])


def link(rng: random.Random, file: Path) -> None:
    """Replace a file by a link to its copy elsewhere."""
    aside = file.parents[1] / f"aside-{rng.randrange(10**9)}"
    file.rename(aside)
    file.symlink_to(aside)


def drop(_: random.Random, file: Path) -> None:
    """Delete a file."""
    file.unlink()


def add(rng: random.Random, file: Path) -> None:
    """Write one more file."""
    (file.parent / f"more{rng.randrange(10)}.json").write_text("{}")


def swap(rng: random.Random, file: Path) -> None:
    """Exchange a file with another one of its folder; flip a bit of one that is alone."""
    others = [other for other in sorted(file.parent.iterdir()) if other.is_file() and other != file]
    if not others:
        return flip(rng, file)
    other, aside = rng.choice(others), file.parent / "aside"
    file.rename(aside)
    other.rename(file)
    aside.rename(other)


CHANGES = (flip, cut, link, drop, add, swap)


class Target:
    """A study of digits below `folder` with the run of one of its trials, which is put back after each change."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        code, text = command("tune", *STUDY, f"root={self.root}")
        if code != 0:
            raise SystemExit(f"the study must succeed, but ended with {code}: {text[-500:]}")
        self.best = json.loads((self.root / "studies/digits/int8_int16/best.json").read_text())
        self.run = str(self.best["run"])
        self.archive = folder / "study.zip"
        place = (f"root={self.root}", "tracking.experiment=digits")
        code, text = command("export", "study=digits/int8_int16", f"bundle={self.archive}", *place)
        if code != 0:
            raise SystemExit(f"the export must succeed, but ended with {code}: {text[-500:]}")
        self.kept = folder / "kept"
        shutil.copytree(self.root, self.kept)

    @property
    def files(self) -> Path:
        """Folder of the trial's files."""
        return self.root / "artifacts" / self.run / "artifacts"

    def put_back(self) -> None:
        """Undo all changes."""
        shutil.rmtree(self.root)
        shutil.copytree(self.kept, self.root)

    def promoted(self) -> tuple[int, str]:
        """Promote the trial."""
        return command("promote", f"run={self.run}", f"root={self.root}", "tracking.registered_model=digits")


def changed_file(target: Target, rng: random.Random, violations: list[str]) -> str:
    """A file of the run is changed, its digest is not: the promotion is refused in one line."""
    files = sorted(path for path in target.files.rglob("*") if path.is_file())
    file, change = rng.choice(files), rng.choice(CHANGES)
    change(rng, file)
    code, text = target.promoted()
    if code != 2 or "Traceback" in text:
        violations.append(f"{change.__name__} of {file.name}: promote ended with {code}: {text[-300:]}")
    return "files of a run"


def foreign_code(target: Target, rng: random.Random, violations: list[str]) -> str:
    """The owner of the run has another function called: it is not executed, and nothing is registered."""
    canary, file = target.root.parent / "canary", target.files / "config.yaml"
    text, function = file.read_text(), rng.choice(FOREIGN)
    places = list(re.finditer(r"^( *)_target_: ['\w.]+$", text, re.MULTILINE))
    place = rng.choice(places)
    word = rng.choice(("command", "cmd", "name", "path", "f", "_args_"))
    argument = f"[touch {canary}]" if word == "_args_" else f"touch {canary}"
    new = f"{place[1]}_target_: {function}\n{place[1]}{word}: {argument}"
    file.write_text(text[: place.start()] + new + text[place.end() :])

    def forge() -> None:
        store = Store.open(f"sqlite:///{target.root}/mlflow.db", target.root)
        store.client.set_tag(target.run, DIGEST, files_digest(digests(target.files)))

    in_child(forge)
    code, said = target.promoted()
    if code != 2 or "Traceback" in said or canary.exists():
        violations.append(f"{function}: promote ended with {code}, executed: {canary.exists()}: {said[-300:]}")
    canary.unlink(missing_ok=True)
    return "foreign code"


def changed_archive(target: Target, rng: random.Random, violations: list[str]) -> str:
    """A changed archive is refused, or it holds what it held before; it never ends in a traceback."""
    archive = target.root.parent / "changed.zip"
    shutil.copy(target.archive, archive)
    rng.choice((flip, cut))(rng, archive)
    elsewhere = target.root.parent / "elsewhere"
    code, text = command("export", f"import={archive}", f"root={elsewhere}", "tracking.experiment=digits")
    unchanged = code == 0 and "digits/int8_int16" in text
    if not (code == 2 or unchanged) or "Traceback" in text:
        violations.append(f"an archive: the import ended with {code}: {text[-300:]}")
    shutil.rmtree(elsewhere, ignore_errors=True)
    return "archives"


def changed_cache(target: Target, rng: random.Random, violations: list[str]) -> str:
    """A study that finds changed files in its cache computes them again, and has the same result."""
    files = sorted(path for path in (target.root / "cache").rglob("*") if path.is_file())
    for file in rng.sample(files, min(5, len(files))):
        if file.exists():
            rng.choice((flip, cut, drop, swap))(rng, file)
    (target.root / "optuna.db").unlink()
    again = f"study=again{rng.randrange(10**6)}"
    code, text = command("tune", *STUDY, again, f"root={target.root}")
    found = target.root / "studies" / again.removeprefix("study=") / "best.json"
    same = code == 0 and json.loads(found.read_text())["metrics"] == target.best["metrics"]
    if not same or "Traceback" in text:
        violations.append(f"the cache: tune ended with {code}, the same mix: {same}: {text[-300:]}")
    return "caches"


PARTS: tuple[tuple[float, Callable[[Target, random.Random, list[str]], str]], ...] = (
    (0.45, changed_file),
    (0.25, foreign_code),
    (0.22, changed_archive),
    (0.08, changed_cache),
)


def tampered(folder: Path, times: int, rng: random.Random) -> list[str]:
    """Change something at random, `times` times; return the violations, one sentence each."""
    target, violations = Target(folder), list[str]()
    code, said = target.promoted()
    if code != 0:  # then a refusal below would say nothing
        return [f"the trial as it was stored is promoted, but promote ended with {code}: {said[-300:]}"]
    target.put_back()
    done: collections.Counter[str] = collections.Counter()
    shares, changes = zip(*PARTS, strict=True)
    for _ in range(times):
        change = rng.choices(changes, shares)[0]
        done[change(target, rng, violations)] += 1
        target.put_back()
    print(f"changed: {dict(done)}")
    return violations
