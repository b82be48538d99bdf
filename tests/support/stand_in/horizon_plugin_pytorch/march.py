"""The march that models are prepared for."""


class March:
    NASH_E, NASH_M, NASH_B, NASH_P, NASH_H = "nash-e", "nash-m", "nash-b", "nash-p", "nash-h"


_march = None


def set_march(march):
    global _march
    if march not in vars(March).values():
        raise ValueError(f"unknown march {march}")
    _march = march


def get_march():
    if _march is None:
        raise RuntimeError("set_march must be called before a model is prepared")
    return _march
