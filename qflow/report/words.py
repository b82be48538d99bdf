"""What stored terms mean, in words for readers of a page who have not read the documentation."""

from __future__ import annotations

import re

from qflow.analysis.measures.advice import Advice
from qflow.core.qconfig import OpQConfig
from qflow.search.strategies import DEMOTED

CAUSES = {
    "rounding": "rounding: the steps of int8 are too coarse for its values",
    "truncation": "truncation: values beyond the range are cut off",
    "known range": "known range: its range follows from the model, and was estimated",
    "dual int16": "dual int16: input and weight both need int16",
    "shared module": "shared module: its calls have different ranges and one scale",
    "constant": "constant: a constant of the model with a range of its own",
    "huge mask value": "huge mask value: a mask stretches the range",
    "values inside": "values inside: those between its steps",
}


def cause_words(cause: str) -> str:
    """Return a cause of the advisor with what it means."""
    return CAUSES.get(cause, cause)


def rule_words(rule: str) -> str:
    """Return in words which rule decided a precision."""
    rule = re.sub(r"assigned int16: (\d+) of (\d+)", r"the search chose it, as number \1 of \2", rule)
    return rule.replace("assigned int16 weight", "the search chose an int16 weight")


def label_words(label: str) -> str:
    """Return in words what the label of a trial says."""
    number = label.removeprefix(DEMOTED).strip()
    return f"fewer int16 operators, attempt {number}" if label.startswith(DEMOTED) else label


def is_followed(advice: Advice, op: OpQConfig | None) -> bool:
    """Return whether an operator of a mix has the precision that a piece of advice asks for."""
    output, _, weight = advice.spec.partition("/")
    if op is None or not advice.spec or "@" in advice.spec:
        return False
    return str(op.output) == output and (not weight or str(op.weight) == weight)
