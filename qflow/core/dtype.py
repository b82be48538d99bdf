"""The precisions of the Journey 6 tool chain and their integer limits."""

from __future__ import annotations

from enum import Enum

from qflow.core.errors import ConfigError
from qflow.core.nearest import did_you_mean


class QDtype(str, Enum):
    """A precision under the plugin's name for it; it compares equal to the string of this name.

    Integers are symmetric with zero point 0: qint8 spans -128..127, qint16 spans -32768..32767.
    """

    qint8 = "qint8"
    qint16 = "qint16"
    float16 = "float16"
    float32 = "float32"

    def __str__(self) -> str:
        return self.value

    @classmethod
    def parse(cls, value: object, where: str) -> QDtype:
        """Return the dtype of this name, or of a torch or plugin dtype of this name. Raises ConfigError."""
        text = str(value).removeprefix("torch.")
        try:
            return cls(text)
        except ValueError:
            known = ", ".join(d.value for d in cls)
            near = did_you_mean(text, cls.__members__)
            raise ConfigError(f"{where} is one of {known}, but got {text!r}.{near}") from None

    @property
    def bits(self) -> int:
        """Storage width in bits."""
        return {"qint8": 8, "qint16": 16, "float16": 16, "float32": 32}[self.value]

    @property
    def is_integer(self) -> bool:
        """True for qint8 and qint16, which need a scale."""
        return self in (QDtype.qint8, QDtype.qint16)

    @property
    def qmin(self) -> int:
        """Smallest code of an integer dtype. Raises ValueError for a float dtype."""
        if not self.is_integer:
            raise ValueError(f"Only integer dtypes have codes, but got {self.value}.")
        return int(-(2 ** (self.bits - 1)))

    @property
    def qmax(self) -> int:
        """Largest code of an integer dtype."""
        return -self.qmin - 1

    @property
    def rank(self) -> int:
        """Order of precision: qint8 < qint16 < float16 < float32."""
        return list(QDtype).index(self)
