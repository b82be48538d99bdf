"""The owner of a study: a lease in tags of the study's run, because that run is what all folders and hosts share.

MLflow has no compare-and-set, but a tag is an atomic register. Every claimant has a tag of its own, and they exclude
each other by Lamport's bakery algorithm (A new solution of Dijkstra's concurrent programming problem, CACM 17, 1974):
it marks itself as choosing, takes a ticket above all that it reads, and owns the study once nobody else is choosing or
has a lower ticket.

The owner counts up a heartbeat. It is dead if its process is known to be gone (same host), or if the heartbeat has not
changed for so many seconds on the watcher's clock; clocks of two hosts are never compared. The claim of one that may
still wake up is revoked by a tag that stays, and the owner reads it before each commit.
"""

from __future__ import annotations

import json
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qflow.core import record
from qflow.core.errors import QflowError, TrackingError
from qflow.process.running import Process, is_running, this_process
from qflow.tracking import limits
from qflow.tracking.mlflow_tracker import MlflowTracker

LEASE = "qflow.lease."
"""Start of the tag of a claim; the owner's id follows."""
REVOKED = "qflow.revoked."
"""Start of the tag that revokes a claim; the id of the one who revoked it is its value."""
CLAIMS = (LEASE, REVOKED)
"""Starts of tags that say nothing of the study itself."""
SECONDS = 60.0
"""Without a heartbeat for so long an owner on another host counts as dead."""
BEAT = 10.0  # seconds between heartbeats
POLL = 0.25  # seconds between two looks at a claim that is not decided yet


@dataclass(frozen=True)
class Claim:
    """The content of a claimant's tag."""

    owner: str
    process: Process
    folder: str
    since: str
    """When it was made, by the owner's clock; it is shown and never compared."""
    seconds: float
    beat: int = 0
    ticket: int = 0
    """0 while the claimant is choosing its ticket."""

    @property
    def rank(self) -> tuple[float, str]:
        """Claims are served in this order."""
        return self.ticket, self.owner

    def __str__(self) -> str:
        where = f"host {self.process.host}, folder {self.folder}, since {self.since}"
        return f"{where} (process {self.process.pid})"


def claims_of(tags: dict[str, str]) -> list[Claim]:
    """Return the claims among the tags of a study's run that are not revoked; a tag of another form is none."""
    found = []
    for key, text in tags.items():
        owner = key.removeprefix(LEASE)
        if key.startswith(LEASE) and f"{REVOKED}{owner}" not in tags:
            with suppress(QflowError, ValueError, TypeError):
                found.append(record.from_dict(Claim, json.loads(text)))
    return sorted(found, key=lambda claim: claim.rank)


def require_free(study: str, tags: Mapping[str, str]) -> None:
    """Raise TrackingError if a process of this host owns the study of these tags; of other hosts `owned` finds out."""
    for claim in claims_of(dict(tags)):
        if claim.ticket and is_running(claim.process):
            raise _met(study, claim)


def _met(study: str, claim: Claim) -> TrackingError:
    return TrackingError(
        f"A study has one owner at a time, but got a start of {study} while another drives it: {claim}. Wait for it or "
        "end it; the same command then continues the study."
    )


@contextmanager
def owned(
    tracker: MlflowTracker, study: str, folder: Path, *,
    say: Callable[[str], None] = lambda _: None,
    seconds: float = SECONDS,
    beat: float = BEAT,
) -> Iterator[Callable[[], None]]:  # fmt: skip
    """Own the study inside the block; yield the check that it is still owned, to be called before each commit.

    The run of a new study is made first, and deleted again if the start is refused before it was opened. While it waits
    for the claim of another host to expire, it says so. Raises TrackingError if a living owner is met; the check raises
    it if another start has taken the study over.
    """
    run, made = _run_of(tracker, study)
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    claim = Claim(uuid.uuid4().hex, this_process(), str(folder), now, seconds)
    lease = _Lease(tracker, study, run, claim, say)
    try:
        lease.choose()
        with lease.renewed(beat):
            lease.wait()
            yield lease.require
    finally:
        with suppress(Exception):  # a claim that stays in a store that is away ends with the process, or expires
            lease.leave()
            left = tracker.run_tags(run)
            if made and "qflow.fingerprint" not in left and not claims_of(left):  # another may own it by now
                tracker.client.delete_run(run)


def _run_of(tracker: MlflowTracker, study: str) -> tuple[str, bool]:
    """Return the study's run, and whether it was made; only the first of several at once is kept."""
    if found := tracker.find_study(study):
        return found, False
    made = tracker.create_study(study)
    first = tracker.find_study(study) or made
    if first != made:
        with tracker.calling() as client:
            client.delete_run(made)
    return first, first == made


class _Lease:
    """One claim on the run of a study."""

    def __init__(self, tracker: MlflowTracker, study: str, run: str, claim: Claim, say: Callable[[str], None]) -> None:
        self._tracker, self._study, self._run, self._claim, self._say = tracker, study, run, claim, say
        self._seen: dict[str, tuple[int, float]] = {}  # owner -> (heartbeat, when this process saw it first)
        self._ended = threading.Event()

    def choose(self) -> None:
        """Take a ticket. Raises TrackingError if a living owner has the study, before anything is written."""
        self._pass_others((math.inf, ""))
        self._write()
        highest = max((claim.ticket for claim in self._claims()), default=0)
        self._claim = replace(self._claim, ticket=highest + 1)
        self._write()

    def wait(self) -> None:
        """Wait until no claim is before the own one. Raises TrackingError if one of them is alive."""
        self._pass_others(self._claim.rank)

    def require(self) -> None:
        """Raise TrackingError unless this claim is still the owner of the study's first run; one call to the store."""
        with self._tracker.calling() as client:
            found = client.search_runs([self._tracker.experiment_id], limits.runs_of(self._study, "study"))
        runs = sorted(found, key=lambda run: (run.info.start_time, run.info.run_id))
        claims = claims_of(runs[0].data.tags) if runs else []
        if not any(claim.owner == self._claim.owner for claim in claims):
            other = next((f": {claim}" for claim in claims if claim.ticket), "")
            raise TrackingError(
                f"The owner of a study commits to it, but got another one for {self._study} while this process gave no "
                f"sign of life{other}. Nothing more is written here; the same command continues when the other ends."
            )

    @contextmanager
    def renewed(self, beat: float) -> Iterator[None]:
        """Count up the heartbeat every `beat` seconds inside the block, in a thread."""
        thread = threading.Thread(target=self._renew, args=(beat,), name="qflow-lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join(0.5)  # longer only if the store hangs; a tag that it still writes names a process that is gone

    def leave(self) -> None:
        """Remove the own tags."""
        for start in (LEASE, REVOKED):
            self._remove(f"{start}{self._claim.owner}")

    def _renew(self, beat: float) -> None:
        while not self._ended.wait(beat):
            self._claim = replace(self._claim, beat=self._claim.beat + 1)
            with suppress(Exception):  # the next one may succeed; whether the study is still owned, `require` reads
                self._tracker.client.set_tag(self._run, f"{LEASE}{self._claim.owner}", record.to_json(self._claim))

    def _pass_others(self, rank: tuple[float, str]) -> None:
        """Wait for, or remove, each claim before `rank`. Raises TrackingError for one that is alive."""
        said: set[str] = set()
        while True:
            before = [claim for claim in self._claims() if claim.rank < rank]
            if rank[0] == math.inf:
                before = [claim for claim in before if claim.ticket]
            for claim in before:
                alive = self._alive(claim)
                if alive is False:
                    self._revoke(claim)
                elif alive and claim.ticket:
                    raise _met(self._study, claim)
                elif claim.ticket and claim.owner not in said:
                    said.add(claim.owner)
                    self._say(
                        f"{'owner':<12} {claim}: waiting for a sign of life, for at most {claim.seconds:.0f} s; "
                        "without one this start continues the study"
                    )
            if not before:
                return
            time.sleep(POLL)

    def _alive(self, claim: Claim) -> bool | None:
        """Return whether the owner of a claim lives; None if that is not known yet."""
        running = is_running(claim.process)
        if running is not None:
            return running
        now = time.monotonic()
        beat, at = self._seen.setdefault(claim.owner, (claim.beat, now))
        if beat != claim.beat:
            return True
        return False if now - at > claim.seconds else None

    def _revoke(self, claim: Claim) -> None:
        """End the claim of a dead owner; one that may only be suspended finds the mark when it wakes."""
        if is_running(claim.process) is None:
            with self._tracker.calling() as client:
                client.set_tag(self._run, f"{REVOKED}{claim.owner}", self._claim.owner)
        self._remove(f"{LEASE}{claim.owner}")

    def _claims(self) -> list[Claim]:
        return [c for c in claims_of(self._tracker.run_tags(self._run)) if c.owner != self._claim.owner]

    def _write(self) -> None:
        with self._tracker.calling() as client:
            client.set_tag(self._run, f"{LEASE}{self._claim.owner}", record.to_json(self._claim))

    def _remove(self, key: str) -> None:
        with suppress(TrackingError), self._tracker.calling() as client:  # a tag that is not there is an error
            client.delete_tag(self._run, key)
