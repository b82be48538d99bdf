"""python -m qflow.check as a user runs it: the file, the console, the exit code, and bad requests in one line."""

import json

import pytest
from support.commands import CUSTOM, run_qflow
from support.documents import document

pytestmark = pytest.mark.slow  # starts commands as processes of their own


def test_a_users_model_is_checked(tmp_path):
    done = run_qflow("check", *CUSTOM, "qconfig.template=qint16", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "float graph proven equal; march nash-m" in done.stdout
    folder = tmp_path / "qflow_out" / "check" / "own"
    assert "Each layer out qconfig:" in (folder / "model_check_result.txt").read_text()
    record = json.loads((folder / "model_check.json").read_text())
    assert {row["applied"] for row in record["rows"]} >= {"qint16"}
    lowered = sum(row["applied"] != row["requested"] for row in record["rows"])
    assert f"{len(record['rows'])} rows, {lowered} not as requested" in done.stdout
    assert len(done.stdout.splitlines()) < 20


def test_hints_are_not_counted_as_not_as_asked(tmp_path):
    done = run_qflow("check", *CUSTOM, "--json", cwd=tmp_path)
    assert "8 rows, 0 not as requested" in done.stderr, done.stderr
    assert document(done)["result"]["not_as_requested"] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["quant.skip=[nothing]"], "quant.skip names modules or classes of the model, but got 'nothing'"),
        (["device=nash-x"], "A group option must exist, but got"),
        (["+qconfig.modules={loud: qint7}"], "is one of qint8, qint16, float16, float32"),
        (["+qconfig.modules={nowhere: qint16}"], "but got nowhere"),
        (["+qconfig.modules={loud: float16}"], "but got"),
        (["calibration.sampling=0"], "calibration.sampling"),
        (["search.sampler=foo"], "search.sampler is one of tpe"),
        (["task.data._target_=user_task.Broken"], "must load and batch together, but got OSError: no file 0"),
        (["task.data._target_=user_task.Misnamed"], "the batch has the keys picture, label, forward takes image"),
        (["qconfig.modules={nowhere: qint16}"], "but got nowhere"),
        (["nothing.here=1"], "A key must exist in the configuration"),
    ],
)
def test_bad_requests_get_one_line(arguments, says, tmp_path):
    done = run_qflow("check", *CUSTOM, *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stdout + done.stderr
    assert says in done.stderr


def test_a_module_is_left_out_by_name(tmp_path):
    done = run_qflow("check", *CUSTOM, "quant.skip=[inner]", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "inner." not in (tmp_path / "qflow_out" / "check" / "own" / "model_check_result.txt").read_text()


RULES = "march: my-npu\noe_version: '1.0'\nrules: {int8_outputs: [linear], matmul_int16_inputs: 2}\n"


def test_the_rules_of_an_npu_without_cost_serve_the_check_alone(tmp_path):
    (tmp_path / "npu.yaml").write_text(RULES)
    done = run_qflow("check", *CUSTOM, "device=npu.yaml", "qconfig.template=qint16", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "march my-npu" in done.stdout
    ranked = run_qflow(
        "check", *CUSTOM, "device=npu.yaml", "qconfig.ranking=score_per_ms", "qconfig.int16_ratio=0.5",
        "sensitivity.bad_cases=4", "sensitivity.search_samples=32", cwd=tmp_path,
    )  # fmt: skip
    for refused in (
        run_qflow("cost", *CUSTOM, "device=npu.yaml", cwd=tmp_path),
        run_qflow("tune", *CUSTOM, "+experiment=int8", "device=npu.yaml", cwd=tmp_path),
        ranked,  # by sensitivity per ms
    ):
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stdout + refused.stderr
        assert "A device file needs cost.attention_gmac_per_ms_ghz" in refused.stderr
        assert "got none in my-npu" in refused.stderr
