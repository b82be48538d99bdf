"""Groups: the producers, consumers and pairs that have to be scaled together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qflow.repair.equalization.channel_weights import Consumer, Pair, Producer, Read
from qflow.repair.equalization.channels import Channels

Member = Producer | Consumer | Pair


@dataclass
class Group:
    """Producers, consumers and pairs that a free variable joins, directly or through others, in order of execution."""

    producers: list[Producer] = field(default_factory=list)
    consumers: list[Consumer] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)

    @property
    def name(self) -> str:
        """First producer and first reader; how many more there are."""
        return f"{_first(self.producers)} -> {_first([*self.consumers, *self.pairs])}"

    def reads(self) -> list[Read]:
        """The tensors whose ranges the factors depend on."""
        found = [read for consumer in self.consumers for read in consumer.reads]
        found += [read for pair in self.pairs for read in pair.reads]
        sources = [s for consumer in self.consumers for s in consumer.sources]
        sources += [s for pair in self.pairs for side in pair.sources for s in side]
        return [*found, *(source.read for source in sources)]


def _first(members: Sequence[Member]) -> str:
    return members[0].path + (f" and {len(members) - 1} more" if len(members) > 1 else "")


def groups(channels: Channels) -> list[Group]:
    """All groups that have producers, and consumers or pairs."""
    members: list[Member] = [*channels.producers.values(), *channels.consumers.values(), *channels.pairs]
    free = [set(channels.variables.free_roots(member.ids).tolist()) for member in members]
    apart: list[set[int]] = []
    for roots in free:
        touched = [known for known in apart if not known.isdisjoint(roots)]
        apart = [known for known in apart if known.isdisjoint(roots)] + [roots.union(*touched)]
    found: dict[int, Group] = {}
    for member, roots in zip(members, free, strict=True):
        if not roots:
            continue
        group = found.setdefault(next(i for i, known in enumerate(apart) if roots <= known), Group())
        if isinstance(member, Producer):
            group.producers.append(member)
        elif isinstance(member, Consumer):
            group.consumers.append(member)
        else:
            group.pairs.append(member)
    return [group for group in found.values() if group.producers and (group.consumers or group.pairs)]
