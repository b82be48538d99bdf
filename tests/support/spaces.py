"""Random spaces whose keys depend on each other."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from qflow.search.domain import Choice, Condition, Domain, Interval, Range

FINITE = st.one_of(
    st.lists(st.sampled_from(("x", "y", 2, True, None)), min_size=1, max_size=3, unique_by=str).map(
        lambda values: Choice(tuple(values))
    ),
    st.integers(1, 3).map(lambda n: Range(0, 5 * n, 5)),
    st.integers(0, 2).map(lambda n: Interval(1, 1 + n, integer=True)),
)
ANY = st.one_of(FINITE, st.sampled_from((Interval(0, 1), Interval(1e-6, 1e-2, log=True), Range(0.1, 0.5, 0.1))))


def _condition(draw, key: str, parent: Domain) -> Condition:
    points = parent.points()
    if not points:
        middle = (parent.low * parent.high) ** 0.5 if parent.log else (parent.low + parent.high) / 2
        return Condition(key, Interval(parent.low, middle))
    allowed = draw(st.lists(st.sampled_from(points), min_size=1, unique_by=str))
    return Condition(key, Choice(tuple(allowed)))


@st.composite
def spaces(draw, domains=ANY) -> dict[str, Domain]:
    """One to six keys; each may depend on one or two others, in any order of the mapping."""
    space: dict[str, Domain] = {}
    for i in range(draw(st.integers(1, 6))):
        parents = draw(st.lists(st.sampled_from(sorted(space)), max_size=2, unique=True)) if space else []
        when = tuple(_condition(draw, key, space[key]) for key in parents)
        space[f"k{i}"] = replace(draw(domains), when=when)
    return dict(draw(st.permutations(list(space.items()))))
