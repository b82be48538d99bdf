"""What can go wrong, as one small family.

Every message follows one form: the rule, what came, the way out. A `QflowError` is a user's mistake or a
refusal; doors print it as one line and exit with 2 (`QFLOW_DEBUG=1` shows the traceback). Anything else that
is raised is a defect of qflow and keeps its traceback.
"""


class QflowError(Exception):
    """Root of all errors that qflow raises on purpose."""


class ConfigError(QflowError):
    """A configuration key or value is not allowed."""


class ModelError(QflowError):
    """The model cannot be traced, prepared or run."""


class DataError(QflowError):
    """The data are empty, too few, not finite, or not what the model takes."""


class TrialError(QflowError):
    """One trial cannot be evaluated; the study goes on and the trial has failed."""

    lasting = False
    """True where the trial itself is the cause, so that another try ends alike."""


class TrackingError(QflowError):
    """The tracking store cannot be reached, belongs to another qflow version, or is in use."""


class PromotionError(QflowError):
    """A qconfig is refused at the gate; the message holds every reason."""
