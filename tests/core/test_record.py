import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qflow.core.dtype import QDtype
from qflow.core.errors import QflowError
from qflow.core.qconfig import OpQConfig, QConfig
from qflow.core.record import digest, from_dict, plain, to_json

dtypes = st.sampled_from(list(QDtype))
ops = st.builds(
    OpQConfig,
    output=st.none() | dtypes,
    weight=st.none() | dtypes,
    input=st.none() | st.lists(st.none() | dtypes, min_size=1, max_size=3).map(tuple),
    observer=st.none() | st.sampled_from(["mse", "minmax"]),
    fixed_scale=st.none() | st.floats(1e-6, 1e6),
    known_range=st.none() | st.tuples(st.floats(-9, 0), st.floats(1, 9)),
    frozen=st.booleans(),
    weight_axis=st.none() | st.integers(-1, 3),
    rule=st.text(max_size=9),
    fallback=st.text(max_size=9),
)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=8), ops, max_size=5))
def test_a_qconfig_survives_json(entries):
    qconfig = QConfig(march="nash-m", ops=entries)
    back = from_dict(QConfig, plain(qconfig))
    assert back == qconfig
    assert back.digest == qconfig.digest


def test_the_digest_names_what_is_computed_not_who_decided():
    a = QConfig("nash-m", {"conv": OpQConfig(QDtype.qint8, rule="template")})
    b = QConfig("nash-m", {"conv": OpQConfig(QDtype.qint8, rule="sensitive 0.1", fallback="int8 only")})
    c = QConfig("nash-m", {"conv": OpQConfig(QDtype.qint16)})
    assert a.digest == b.digest != c.digest


@dataclass(frozen=True)
class Measured:
    value: float


def test_infinity_is_text_and_nan_is_refused():
    assert to_json(Measured(math.inf)) == '{"value":"inf"}'
    assert from_dict(Measured, {"value": "inf"}).value == math.inf
    with pytest.raises(QflowError, match="NaN for value"):
        to_json(Measured(math.nan))


def test_unknown_and_missing_keys_are_named():
    with pytest.raises(QflowError, match=r"has the keys \['value'\], but got \['extra'\]"):
        from_dict(Measured, {"value": 1.0, "extra": 2})
    with pytest.raises(QflowError, match=r"needs the keys \['value'\]"):
        from_dict(Measured, {})


def test_the_order_of_keys_does_not_change_a_digest():
    assert digest({"a": 1, "b": 2.0}) == digest({"b": 2.0, "a": 1})


@dataclass(frozen=True)
class Held:
    number: float = 1.0
    count: int = 1
    name: str = ""
    sure: bool = False
    dtype: QDtype | None = None
    pair: tuple[float, float] = (0.0, 1.0)
    values: tuple[int, ...] = ()
    inside: Measured = Measured(1.0)


OTHERS = {
    "number": (10**400, -(10**4000), "1", "nan", None, True, [1.0], {}),
    "count": (1.0, "1", None, True),
    "name": (1, None, ["a"]),
    "sure": (1, "true", None),
    "dtype": ("int9", 8, []),
    "pair": ((1.0,), (1.0, 2.0, 3.0), 5, None),
    "values": (7, None, ("a",), {"a": 1}),
    "inside": (1.0, [], {"value": "much"}),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in OTHERS.items() for value in values])
def test_a_value_of_another_type_is_refused_in_one_line(key, value):
    with pytest.raises(QflowError) as raised:
        from_dict(Held, {key: value})
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 200
