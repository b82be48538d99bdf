"""The public names of Horizon's plugin that an exported module uses, with their signatures, for tests.

It computes nothing: it holds what it was given, and a wrong name, argument or value raises. `installed()` puts it in
the place of `horizon_plugin_pytorch` while an exported module is executed.
"""

import runpy
import sys
from collections import namedtuple
from contextlib import contextmanager
from functools import partial
from types import ModuleType

import torch

ROOT = "horizon_plugin_pytorch"


class QuantDType(str):
    """A dtype that compares equal to its name."""


qint8, qint16 = QuantDType("qint8"), QuantDType("qint16")
INTEGER, FLOAT = (qint8, qint16), (torch.float16, torch.float32)


class Observer:
    def __init__(self, averaging_constant=0.01, ch_axis=-1, dtype=qint8):
        self.dtype, self.averaging_constant = dtype, averaging_constant


class MinMaxObserver(Observer):
    pass


class MSEObserver(Observer):
    def __init__(self, stride=1, **kwargs):
        super().__init__(**kwargs)


class FixedScaleObserver:
    def __init__(self, scale=1, zero_point=0, ch_axis=-1, dtype=qint8):
        assert isinstance(scale, float) and scale > 0 and zero_point == 0
        self.scale, self.dtype = scale, dtype


class FakeQuantize:
    def __init__(self, observer, dtype, **observer_kwargs):
        assert isinstance(dtype, QuantDType) and dtype in INTEGER
        self.dtype, self.observer = dtype, observer(dtype=dtype, **observer_kwargs)

    @classmethod
    def with_args(cls, **kwargs):
        return partial(cls, **kwargs)


class FakeCast:
    def __init__(self, dtype, enable_clip=None, check_overflow=None):
        assert dtype in FLOAT
        self.dtype = dtype


_QConfig = namedtuple("_QConfig", "activation weight input")


class QConfig(_QConfig):
    def __new__(cls, activation=None, weight=None, input=None, output=None):
        assert activation is None or output is None, "give only one of activation and output"
        activation = output if activation is None else activation
        for factory in (activation, weight, *(input if isinstance(input, list) else [input])):
            assert factory is None or isinstance(factory(), (FakeQuantize, FakeCast))
        return super().__new__(cls, activation, weight, input)


def get_qconfig(observer=MinMaxObserver, in_dtype=None, weight_dtype=qint8, out_dtype=qint8, fix_scale=False):
    assert observer in (MinMaxObserver, MSEObserver) and isinstance(fix_scale, bool)

    def factory(dtype, observer, **kwargs):
        if dtype is None:
            return None
        if dtype in FLOAT:
            return partial(FakeCast, dtype=dtype)
        return FakeQuantize.with_args(observer=observer, dtype=dtype, **kwargs)

    frozen = {"averaging_constant": 0} if fix_scale else {}
    return QConfig(
        activation=factory(out_dtype, observer, **frozen),
        weight=factory(weight_dtype, MinMaxObserver, ch_axis=0),
        input=factory(in_dtype, observer, **frozen),
    )


class ModuleNameQconfigSetter:
    def __init__(self, module_name_to_qconfig):
        assert all(isinstance(k, str) and isinstance(v, QConfig) for k, v in module_name_to_qconfig.items())
        self.module_name_to_qconfig = dict(module_name_to_qconfig)


class DefaultSetter:
    def __init__(self, name):
        self.name = name


# OpenExplorer 3.5 and later
def get_qconfig_35(observer=MinMaxObserver, in_dtype=qint8, weight_dtype=qint8, out_dtype=qint8, fix_scale=False):
    return get_qconfig(observer, in_dtype, weight_dtype, out_dtype, fix_scale)


class ModuleNameTemplate:
    PORTS = frozenset({"input", "weight", "output"})

    def __init__(self, config_mapping, freeze=False):
        assert isinstance(freeze, bool)
        for name, value in config_mapping.items():
            assert isinstance(name, str)
            self._check(value)
        self.config_mapping, self.freeze = dict(config_mapping), freeze

    def _check(self, value):
        if not isinstance(value, dict):
            assert value in (*INTEGER, *FLOAT)
        elif set(value) <= {"dtype", "threshold"}:
            assert value and value.get("dtype", qint8) in (*INTEGER, *FLOAT)
            assert isinstance(value.get("threshold", 1.0), float) and value.get("threshold", 1.0) > 0
        else:
            assert set(value) <= self.PORTS and value
            for port, dtype in value.items():
                for one in dtype if port == "input" and isinstance(dtype, list) else [dtype]:
                    assert one in (None, *INTEGER, *FLOAT)


class ConvDtypeTemplate:
    def __init__(self, input_dtype, weight_dtype, prefix=None):
        assert {input_dtype, weight_dtype} <= {*INTEGER, *FLOAT}


class MatmulDtypeTemplate:
    def __init__(self, input_dtypes, prefix=None):
        pair = input_dtypes if isinstance(input_dtypes, (list, tuple)) else [input_dtypes]
        assert len(pair) in (1, 2) and {*pair} <= {*INTEGER, *FLOAT}


class QconfigSetter:
    def __init__(
        self,
        reference_qconfig,
        templates,
        enable_optimize=True,
        save_dir="./qconfig_setting",
        custom_qconfig_mapping=None,
    ):
        assert isinstance(reference_qconfig, QConfig)
        first = templates[0]
        assert isinstance(first, ModuleNameTemplate) and "" in first.config_mapping, "the global default comes first"
        self.templates, self.reference_qconfig = list(templates), reference_qconfig


OBSERVERS = {c.__name__: c for c in (MinMaxObserver, MSEObserver, FixedScaleObserver)}
OE_3_0 = {
    "quantization": {"get_qconfig": get_qconfig, "qint8": qint8, "qint16": qint16},
    "quantization.fake_quantize": {"FakeQuantize": FakeQuantize},
    "quantization.observer_v2": OBSERVERS,
    "quantization.qconfig": {"QConfig": QConfig},
    "quantization.qconfig_template": {
        "ModuleNameQconfigSetter": ModuleNameQconfigSetter,
        **{
            name: DefaultSetter(name)
            for name in (
                "default_calibration_qconfig_setter",
                "default_qat_qconfig_setter",
                "default_qat_fixed_act_qconfig_setter",
            )
        },
    },
}
OE_3_5 = {
    "quantization": {
        "QconfigSetter": QconfigSetter, "get_qconfig": get_qconfig_35, "qint8": qint8, "qint16": qint16,
    },
    "quantization.observer_v2": OBSERVERS,
    "quantization.qconfig_setter": {
        c.__name__: c for c in (ModuleNameTemplate, ConvDtypeTemplate, MatmulDtypeTemplate)
    },
}  # fmt: skip
TEMPLATES = {"quantization.qconfig_template": OE_3_0["quantization.qconfig_template"]}
OTHER_PLACES = {
    "all in quantization": {
        "quantization": {**OE_3_0["quantization"], "FakeQuantize": FakeQuantize, "QConfig": QConfig, **OBSERVERS},
        **TEMPLATES,
    },
    "nothing in quantization": {
        "dtype": {"qint8": qint8, "qint16": qint16},
        "quantization.fake_quantize": {"FakeQuantize": FakeQuantize},
        "quantization.observer_v2": OBSERVERS,
        "quantization.qconfig": {"QConfig": QConfig, "get_qconfig": get_qconfig},
        **TEMPLATES,
    },
}
"""Where 3.0.x may keep the names whose modules are not documented."""


@contextmanager
def installed(release):
    """The names of a release (OE_3_0 or OE_3_5) in `horizon_plugin_pytorch`."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == ROOT}
    made = {ROOT: ModuleType(ROOT), f"{ROOT}.quantization": ModuleType(f"{ROOT}.quantization")}
    for place, names in release.items():
        module = made.setdefault(f"{ROOT}.{place}", ModuleType(f"{ROOT}.{place}"))
        vars(module).update(names)
    for name in before:
        del sys.modules[name]
    sys.modules.update(made)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]
        sys.modules.update(before)


def executed(path, release):
    """The names of an exported module after it was executed against a release."""
    with installed(release):
        return runpy.run_path(str(path))
