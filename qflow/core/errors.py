"""The exceptions that qflow raises.

Every message has three parts: the rule, the value that broke it, and what to do. A `QflowError` is a mistake of the
user or a refusal; commands print it as one line and exit with 2 (`QFLOW_DEBUG=1` shows the traceback). Any other
exception is a defect of qflow and keeps its traceback.
"""


class QflowError(Exception):
    """The base class of all errors that qflow raises on purpose."""


class ConfigError(QflowError):
    """A configuration key or value is not allowed."""


class ModelError(QflowError):
    """The model cannot be traced, prepared or run."""


class NotFiniteError(ModelError):
    """An output of the model is NaN or infinite."""


class DataError(QflowError):
    """The data are empty, too few, not finite, or not in the form that the model takes."""


class TrialError(QflowError):
    """One trial cannot be evaluated; the trial fails and the study continues."""

    lasting = False
    """True if the trial itself is the cause, so that another try would fail too."""


class BrokenMixError(TrialError):
    """The outputs of a quantized model are not finite where those of the float model are: the mix misses any goal."""

    lasting = True


class TrackingError(QflowError):
    """The tracking store cannot be reached, belongs to another qflow version, or is in use."""


class StoreAwayError(TrackingError):
    """The tracking store does not answer now, and the caller goes on without it (tracking/patience.py)."""


class BundleError(QflowError):
    """A run, model version, folder or archive is not what qflow wrote, so nothing is built from it."""


class PromotionError(QflowError):
    """A trial cannot be promoted; the message holds every reason."""
