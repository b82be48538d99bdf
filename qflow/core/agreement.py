"""How a metric against the float model is called, and what is said beside its figures."""

PREFIX = "agreement_"
"""With it begins the name of each metric that compares outputs with those of the float model."""


def meaning(metric_name: str) -> str:
    """Return what an agreement is, for the lines beside its figures; "" for a metric of the task's own."""
    if not metric_name.startswith(PREFIX):
        return ""
    return f"{metric_name} is agreement with the float model, not accuracy; float's own is 1 by definition"
