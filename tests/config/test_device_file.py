"""Device files: the shipped ones, and a user's own through the library or through --config-dir."""

from time import perf_counter

import pytest

from qflow.config.command import run_command
from qflow.config.command_schema import register_schema
from qflow.config.device_file import device_names, load_cost, load_rules
from qflow.config.keys import conf_dir
from qflow.config.settings import plain
from qflow.core.errors import ConfigError
from qflow.cost_model.model import CostModel


@pytest.mark.parametrize("name", device_names())
def test_every_shipped_file_loads_as_hydra_composes_it(name):
    from hydra import compose, initialize_config_dir

    register_schema("tune")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        node = plain(compose("tune", overrides=["+experiment=int8_int16", f"device={name}"]).device)
    rules, cost = load_rules(name), load_cost(name)
    assert {"march": rules.march, "oe_version": rules.oe_version} == {k: node[k] for k in ("march", "oe_version")}
    assert all(getattr(rules, key) == value for key, value in node["rules"].items())
    assert cost == CostModel(march=node["march"], **node["cost"])


@pytest.mark.parametrize("march", ["nash-m", "nash-e"])
def test_dual_int16_is_off_for_3_0_17_and_on_from_3_2(march):
    old, new = load_rules(march), load_rules(f"{march}-oe32")
    assert (old.oe_version, old.dual_int16, old.matmul_int16_inputs) == ("3.0.17", False, 1)
    assert (new.oe_version, new.dual_int16, new.matmul_int16_inputs) == ("3.2.0", True, 2)
    assert new.march == old.march == march
    assert not new.dual_high_precision
    assert old.int8_inputs == new.int8_inputs == {k: [0] for k in ("resize", "max_pool", "avg_pool", "grid_sample")}
    assert old.float16_kinds[0] == "layer_norm"


def test_a_users_file_may_start_from_a_shipped_one(tmp_path):
    path = tmp_path / "my-board.yaml"
    path.write_text("defaults: [nash-m, _self_]\nrules: {float16_kinds: []}\ncost: {clock_ghz: 1.2}\n")
    rules = load_rules(path)
    assert (rules.march, list(rules.float16_kinds)) == ("nash-m", [])
    assert rules.int8_inputs == load_rules("nash-m").int8_inputs
    assert load_cost(str(path)).clock_ghz == 1.2


def test_an_edited_file_is_read_again(tmp_path):
    path, base = tmp_path / "board.yaml", tmp_path / "base.yaml"
    base.write_text("defaults: [nash-m, _self_]\nrules: {matmul_int16_inputs: 0}\n")
    path.write_text("defaults: [base, _self_]\nrules: {float16_kinds: []}\n")
    assert (load_rules(path).matmul_int16_inputs, load_rules(path).fused_add_int8) == (0, True)
    base.write_text("defaults: [nash-m, _self_]\nrules: {matmul_int16_inputs: 2}\n")  # of the same length
    assert load_rules(path).matmul_int16_inputs == 2
    path.write_text("defaults: [base, _self_]\nrules: {fused_add_int8: false}\n")
    assert not load_rules(path).fused_add_int8
    path.write_text("rules: {no_such_rule: 1}\n")
    with pytest.raises(ConfigError, match="no_such_rule"):
        load_rules(path)


def test_a_file_that_appears_beside_takes_the_place_of_the_shipped_one(tmp_path):
    path, beside = tmp_path / "board.yaml", tmp_path / "nash-m.yaml"
    path.write_text("defaults: [nash-m, _self_]\n")
    assert load_rules(path).march == "nash-m"
    beside.write_text("march: beside\noe_version: 1.0.0\n")
    assert load_rules(path).march == "beside"
    beside.unlink()
    assert load_rules(path).march == "nash-m"


def test_a_file_is_merged_once_and_what_it_gave_cannot_change_it(tmp_path):
    path = tmp_path / "board.yaml"
    path.write_text("defaults: [nash-m, _self_]\n")
    started = perf_counter()
    rules = load_rules(path)
    merged = perf_counter() - started
    rules.int8_inputs["resize"].append(7)
    started = perf_counter()
    again = [load_rules(path) for _ in range(10)]
    assert perf_counter() - started < 5.0 * merged
    assert all(r.int8_inputs["resize"] == [0] for r in again)


WHOLE = "march: mine\noe_version: 1.0.0\n"
WRONG = {
    "no such name": (None, "A device is one of nash-e, nash-e-oe32, nash-m, nash-m-oe32, or the path of a .yaml file"),
    "unknown key": (
        WHOLE + "rules: {int8_input: {}}",
        "got device.rules.int8_input. Did you mean device.rules.int8_inputs? Keys of device.rules: int8_inputs",
    ),
    "wrong type": (WHOLE + "rules: {matmul_int16_inputs: two}", "is a whole number, but got 'two'"),
    "unknown kind": (WHOLE + "rules: {int8_outputs: [rezise]}", "rules.int8_outputs takes operator kinds"),
    "no march": ("oe_version: 1.0.0", "names its march, but got none"),
    "no yaml": ("a: [", "A device file is YAML"),
    "a list": ("- 1", "but got none in"),
    "a circle": ("defaults: [device]", "a circle of defaults"),
    "wrong default": ("defaults: [nash-x]", "but got nash-x"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_in_one_line(case, tmp_path):
    text, message = WRONG[case]
    path = tmp_path / "device.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_rules(path)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_rules_alone_need_no_cost_and_a_cost_model_says_what_it_lacks(tmp_path):
    path = tmp_path / "device.yaml"
    path.write_text(WHOLE)
    assert load_rules(path).march == "mine"
    with pytest.raises(ConfigError, match="needs cost.attention_gmac_per_ms_ghz, cost.boundary_ms, cost.clock_ghz"):
        load_cost(path)


def test_hydra_takes_a_users_device_from_a_folder_of_their_own(tmp_path, capsys):
    (tmp_path / "device").mkdir()
    (tmp_path / "device" / "my-board.yaml").write_text("defaults: [nash-m, _self_]\nrules: {matmul_int16_inputs: 0}\n")
    seen = []
    argv = ["--config-dir", str(tmp_path), "+experiment=int8_int16", "device=my-board", "hydra.run.dir=."]
    with pytest.raises(SystemExit) as stop:
        run_command("tune", lambda config: seen.append(config.device) or 0, argv)
    assert stop.value.code == 0
    assert (seen[0].march, seen[0].rules.matmul_int16_inputs) == ("nash-m", 0)
