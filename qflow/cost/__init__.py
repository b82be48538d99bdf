"""What a precision choice costs on the device. Called as `qflow.cost(prepared)` it predicts a prepared model."""

from qflow.core.callable_module import call_as

call_as(__name__, "qflow.library.cost")
