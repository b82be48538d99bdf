"""Integer dtypes: texts with a range."""


class QuantDType(str):
    def __new__(cls, name, low, high):
        made = super().__new__(cls, name)
        made.min, made.max = low, high
        return made

    def __reduce__(self):
        return QuantDType, (str(self), self.min, self.max)


qint8 = QuantDType("qint8", -128, 127)
qint16 = QuantDType("qint16", -32768, 32767)
