"""The space from its configuration: conditions, switches by module, every searchable key, the shipped files."""

import pytest
from support.compose import BASE, compose, run

from qflow.config.settings import load_resolved, plain, resolved_yaml, trial_settings, with_params
from qflow.config.space import configured, module_settings, search_space
from qflow.core.errors import ConfigError
from qflow.search.domain import Choice, Condition, Interval, Range

PERCENTILE = [BASE, "calibration.percentile=choice(99.9,99.99)"]
WHEN = "search.when={calibration.percentile: {calibration.method: percentile}}"
ON_PERCENTILE = (Condition("calibration.method", Choice(("percentile",))),)


def space_of(*overrides):
    return search_space(compose(*overrides))


def test_a_condition_takes_a_value_a_list_or_a_domain():
    assert space_of(*PERCENTILE, WHEN)["calibration.percentile"] == Choice((99.9, 99.99), when=ON_PERCENTILE)
    both = "calibration.method: [percentile, mix], qconfig.int16_ratio: 'interval(0.1,1)'"
    many = f"search.when={{calibration.percentile: {{{both}}}}}"
    assert space_of(*PERCENTILE, many)["calibration.percentile"].when == (
        Condition("calibration.method", Choice(("percentile", "mix"))),
        Condition("qconfig.int16_ratio", Interval(0.1, 1.0)),
    )


def test_a_condition_on_a_fixed_key_is_decided_by_its_value():
    assert space_of(*PERCENTILE, WHEN, "calibration.method=percentile")["calibration.percentile"] == Choice(
        (99.9, 99.99)
    )
    assert "calibration.percentile" not in space_of(*PERCENTILE, WHEN, "calibration.method=mse")
    device = "search.when={calibration.percentile: {device.march: nash-e}}"
    assert "calibration.percentile" not in space_of(*PERCENTILE, device)
    assert space_of(*PERCENTILE, device, "device=nash-e")["calibration.percentile"].when == ()


def test_what_depends_on_a_dropped_key_is_dropped_and_a_fixed_key_needs_no_condition():
    chain = f"{WHEN[:-1]}, calibration.sampling: {{calibration.percentile: 99.9}}}}"
    found = space_of(*PERCENTILE, "calibration.sampling=choice(1,7)", chain, "calibration.method=mse")
    assert not {"calibration.percentile", "calibration.sampling"} & set(found)
    assert "calibration.percentile" not in space_of(*PERCENTILE, WHEN, "search.space.calibration.percentile=null")
    assert "calibration.percentile" not in space_of("search=wide", BASE, "calibration.percentile=99.9")


REFUSED = {
    "unknown key": (
        ["search.when={calibration.percentil: {calibration.method: mse}}"],
        "search.when.calibration.percentil is on a key of the configuration, but got calibration.percentil",
    ),
    "unknown parent": (
        ["search.when={calibration.steps: {calibration.metod: mse}}"],
        "search.when.calibration.steps is on a key of the configuration, but got calibration.metod",
    ),
    "a module that is neither searched nor set": (
        ["search.when={calibration.steps: {qconfig.modules.head: qint8}}"],
        "is on a key that is searched or set, but got qconfig.modules.head",
    ),
    "a value the parent cannot take": (
        ["search.when={calibration.steps: {calibration.method: [mse, clip]}}"],
        "on values that calibration.method can take, but got clip, and it is choice(minmax, percentile, mse, kl, mix)",
    ),
    "ends the parent cannot take": (
        ["search.when={calibration.steps: {qconfig.int16_ratio: 'interval(2,3)'}}"],
        "but got interval(2,3), and it is interval(0.0..1.0)",
    ),
    "a value no setting can take": (
        ["qconfig.ranking=choice(score,score_per_ms)", "search.when={qconfig.ranking: {qconfig.counting: lines}}"],
        "qconfig.counting is one of operators, rows, but got 'lines'",
    ),
    "a cycle": (
        ["search.when={calibration.steps: {calibration.method: mse}, calibration.method: {calibration.steps: 8}}"],
        "one direction, but got calibration.method -> calibration.steps -> calibration.method",
    ),
    "no mapping": (["search.when={calibration.steps: mse}"], "is a mapping of a key to its values, but got 'mse'"),
    "the task": (["task.data.augment=choice(true,false)"], "got task.data.augment: the task is built once"),
    "the loss": (["qat.optimizer._target_=choice(a,b)"], "but got qat.optimizer._target_, built once for all"),
    "an illegal switch": (["qconfig.modules.head=choice(qint8,int4)"], "qconfig.modules.head is one of"),
    "a rate that is none": (["qat.rates.head=choice(1e-4,much)"], "is a number, but got 'much'"),
    "a searched training without a loss": (["qat.steps=choice(0,50)"], "QAT needs a loss, but got none"),
    "a direction": (["objective.optimize={accuracy/drop: down}"], "is one of maximize, minimize, but got 'down'"),
    "a share above 1": (["objective.max_int16_mac_share=50"], "lies between 0 and 1, but got 50"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_gets_one_line(case, capsys):
    arguments, message = REFUSED[case]
    code, error = run(capsys, BASE, *arguments)
    assert (code, error.count("\n")) == (2, 1), error
    assert message in error, error


def test_a_modules_name_is_one_key_however_it_is_written():
    config = compose(
        BASE, "root=/nowhere", "search.space.qconfig.modules.layer1=choice(qint8, qint16)",
        "qconfig.modules.layer1.0.conv=choice(qint8, qint16@0..200)",
        "qat.rates.layer1.0=tag(log, interval(1e-6,1e-3))",
        "qconfig.modules={layer1.0: qint8, other: qint16}",
    )  # fmt: skip
    space = search_space(config)
    assert space["qconfig.modules.layer1.0.conv"] == Choice(("qint8", "qint16@0..200"))
    assert space["qat.rates.layer1.0"] == Interval(1e-6, 1e-3, log=True)
    point = {"qconfig.modules.layer1": "qint16", "qconfig.modules.layer1.0.conv": "qint8", "qat.rates.layer1.0": 1e-5}
    changed = with_params(config, point)
    settings = trial_settings(changed)
    assert list(settings.qconfig.modules.items()) == [
        ("layer1.0.conv", "qint8"), ("layer1.0", "qint8"), ("layer1", "qint16"), ("other", "qint16"),
    ]  # fmt: skip
    assert settings.qat.rates == {"layer1.0": 1e-5}
    again = trial_settings(load_resolved(resolved_yaml(changed)))  # as promote rebuilds it
    assert list(again.qconfig.modules) == list(settings.qconfig.modules)
    assert plain(config.qconfig.modules) == {"layer1.0": "qint8", "other": "qint16"}
    assert len(module_settings(config, space)) == 4


def test_a_switch_that_gets_one_value_is_no_longer_searched(tmp_path):
    """Also where its name was written in a file, with its dots in one key, and parts of it are searched beside it."""
    (tmp_path / "search").mkdir()
    modules = "{neck: 'choice(qint8,qint16)', neck.fuse: 'choice(qint8,qint16)'}"
    text = f"defaults: [int16_ratio, _self_]\nspace: {{qconfig: {{modules: {modules}}}}}"
    (tmp_path / "search" / "mine.yaml").write_text(text)
    both = {"qconfig.modules.neck", "qconfig.modules.neck.fuse"}
    mine = [BASE, "search=mine", f"hydra.searchpath=[file://{tmp_path}]"]
    assert both <= set(space_of(*mine))
    fixed = compose(*mine, "qconfig.modules.neck.fuse=qint16")
    assert both & set(search_space(fixed)) == {"qconfig.modules.neck"}
    assert plain(fixed.qconfig.modules) == {"neck.fuse": "qint16"}
    assert both & set(space_of(*mine, "search.space.qconfig.modules.neck=null")) == {"qconfig.modules.neck.fuse"}
    assert space_of(*mine, "qconfig.modules.neck.fuse=choice(qint16)")["qconfig.modules.neck.fuse"] == Choice(
        ("qint16",)
    )


KEYS = {
    "calibration.method": ("choice(minmax,kl)", Choice(("minmax", "kl"))),
    "calibration.percentile": ("interval(99,100)", Interval(99.0, 100.0)),
    "calibration.batch_size": ("choice(8,16)", Choice((8, 16))),
    "calibration.steps": ("range(4,20,4)", Range(4, 20, 4)),
    "qconfig.int16_ratio": ("interval(0,1)", Interval(0.0, 1.0)),
    "qconfig.ranking": ("choice(score,score_per_ms)", Choice(("score", "score_per_ms"))),
    "qat.steps": ("int(interval(0,200))", Interval(0, 200, integer=True)),
    "qat.learning_rate": ("tag(log, interval(1e-6, 1e-3))", Interval(1e-6, 1e-3, log=True)),
    "qat.weight_decay": ("choice(0.0,0.01)", Choice((0.0, 0.01))),
    "qat.moving": ("choice(true,false)", Choice((True, False))),
    "qat.mode": ("choice(fuse_bn,with_bn)", Choice(("fuse_bn", "with_bn"))),
}


@pytest.mark.slow
@pytest.mark.parametrize("key", KEYS)
def test_each_key_parses_and_its_values_reach_the_trial(key):
    text, domain = KEYS[key]
    config = compose(BASE, f"{key}={text}")
    assert search_space(config)[key] == domain
    group, name = key.split(".")
    for value in domain.points() or (domain.low, domain.high):
        found = getattr(getattr(trial_settings(config, {key: value}), group), name)
        assert (found, type(found)) == (value, type(getattr(getattr(trial_settings(config), group), name)))


@pytest.mark.slow
def test_the_wide_space():
    space = space_of(BASE, "search=wide")
    assert set(space) == {k for k in KEYS if not k.startswith("qat.")}
    assert space["calibration.percentile"].when == ON_PERCENTILE
    assert "calibration.percentile" not in space_of(BASE, "search=wide", "calibration.method=kl")
    assert "qconfig.ranking" not in space_of(BASE, "search=wide", "qconfig.int16_ratio=0")


@pytest.mark.slow
def test_the_space_of_qat(capsys):
    space = space_of(BASE, "search=qat", "qat=perception")
    assert set(space) == {k for k in KEYS if k.startswith("qat.")} | {"qconfig.int16_ratio", "qat.learned_scales"}
    assert space["qat.moving"].when[1].key == "qat.learned_scales", "scales that are learned do not move"
    assert all(space[k].when[0].key == "qat.steps" for k in space if k not in ("qat.steps", "qconfig.int16_ratio"))
    assert set(space_of(BASE, "search=qat", "qat.steps=0")) == {"qconfig.int16_ratio"}
    assert set(space_of(BASE, "search=qat", "qat.steps=60")) == set(space) - {"qat.steps"}
    assert run(capsys, BASE, "search=qat", "qat=perception")[0] == 0
    assert "QAT needs a loss" in run(capsys, BASE, "search=qat")[1]


def test_the_configured_point_of_a_space():
    config = compose(
        BASE,
        "search=wide",
        "calibration.averaging_constant=null,0.01",
        "qconfig.modules.head=choice(qint8,qint16)",
    )
    point = configured(config, search_space(config))
    assert (point["calibration.method"], point["qconfig.ranking"]) == ("mse", "score")
    assert point["calibration.averaging_constant"] is None
    assert point["qconfig.modules.head"] == "qint8"


def test_objectives_by_name_come_from_the_command_line():
    config = compose(BASE, "objective.optimize={accuracy/drop: minimize, cost/traffic_mb: minimize}")
    assert list(plain(config.objective.optimize)) == ["accuracy/drop", "cost/traffic_mb"]


def test_an_unknown_search_value_of_a_condition_is_refused():
    with pytest.raises(ConfigError, match="Correct the brackets"):
        space_of(*PERCENTILE, "search.when={calibration.percentile: {qconfig.int16_ratio: 'interval(0.1'}}")
