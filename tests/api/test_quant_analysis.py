"""The guide's accuracy debugging as a library: its own lines, its files, and a planted bad operator that is named."""
# Long: all tests use one analysis of one model, and the table of mistakes covers every public call.

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.zoo import build
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qflow
from qflow.analysis.badcases.files import BadcaseInputs
from qflow.analysis.measures.metrics import distance
from qflow.api.cases import kept_cases
from qflow.config.device_file import load_rules
from qflow.core.errors import QflowError

GUIDE = """
from qflow import QuantAnalysis

# 1. Initialize the quantization analysis object
qa = QuantAnalysis(float_net, calibration_model, "fake_quant")

# 2. Find bad cases. If there are too many data, you can specify num_steps to find bad cases in a subset of the data
qa.auto_find_bad_case(dataloader)

# 3. Run the model with bad cases to get information on each layer
qa.run()

# 4. Compare the information of each layer
qa.compare_per_layer()

# 5. Calculate quantization sensitivity
qa.sensitivity()
"""


class Heads(nn.Module):
    """Four convolutions in a row, two named outputs of different size."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.box, self.score = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 2, 1)

    def forward(self, image):
        x = self.drop(torch.relu(self.a(image)))
        x = torch.relu(self.c(torch.relu(self.b(x))))
        return {"box": self.box(x) * 50.0, "score": self.score(x).sigmoid()}


def heads():
    torch.manual_seed(1)
    return Heads().eval(), [torch.randn(4, 3, 8, 8) for _ in range(3)]


def calibrated(model, data, setter=qflow.default_calibration_qconfig_setter):
    prepared = qflow.prepare(model, data[0], setter)
    qflow.calibrate(prepared, data)
    return prepared


@pytest.fixture
def analysis(tmp_path):
    model, data = heads()

    def make(**settings):
        return qflow.QuantAnalysis(model, calibrated(model, data), out_dir=tmp_path / "out", **settings)

    make.model, make.data, make.out = model, data, tmp_path / "out"
    return make


def outputs(model, prepared, image):
    with torch.no_grad(), prepared.quantized():
        return model(image), prepared(image)


# ---- the guide


def test_the_guides_lines_run_as_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, example = build("resnet")
    data = DataLoader(TensorDataset(torch.randn(8, 3, 16, 16), torch.zeros(8)), batch_size=4)
    exec(GUIDE, {"float_net": model, "calibration_model": calibrated(model, [example]), "dataloader": data})
    out = tmp_path / "horizon_quant_analysis"
    names = {"badcase.txt", "badcase.pt", "all_badcase_info.pt", "compare_per_layer_out.txt"}
    names |= {"compare_per_layer_out.csv", "output_0_L1_sensitive_ops.txt", "output_0_L1_sensitive_ops.pt"}
    assert names | {f"output_merged_L1_sensitive_ops.{end}" for end in ("txt", "pt")} == {p.name for p in out.iterdir()}
    text = (out / "badcase.txt").read_text()
    assert text.startswith("The bad case input index of each output:\nName/Index  Cosine  MSE  L1  KL  SQNR\n")
    assert "The bad case input index of the worst output:\nmetric  dataloader index\n" in text
    assert (out / "compare_per_layer_out.txt").read_text().splitlines()[1].split("|")[2].strip() == "mod_name"
    header = (out / "output_0_L1_sensitive_ops.txt").read_text().split("\n")[0].split()
    assert header[:5] == ["op_name", "sensitive_type", "op_type", "L1", "quant_dtype"]


def test_the_library_page_runs_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[2] / "docs" / "library-analysis.md").read_text()
    code = text.partition("## Accuracy debugging")[2].partition("```python")[2].partition("```")[0]
    model, example = build("resnet")
    names = {"qflow": qflow, "model": model, "prepared": calibrated(model, [example]), "train_loader": [example]}
    exec(code.replace("layer1", "blocks"), names)
    assert {r.mod_name.split(".")[0] for r in names["qa"].compare_per_layer(prefixes="blocks").rows} == {"blocks"}
    assert len(names["bad"].chosen) == 2 and len(names["frame"]) == len(names["table"].rows)


def test_the_tables_feed_the_setters(analysis):
    qa = analysis()
    qa.auto_find_bad_case(analysis.data)
    first = next(r for r in qa.sensitivity().rows if r.sensitive_type == "activation")
    table = torch.load(analysis.out / "output_merged_L1_sensitive_ops.pt", weights_only=True)
    assert next(row for row in table if row[1] == "activation")[0] == first.op_name
    k = next(i for i, row in enumerate(table, 1) if row[1] == "activation")
    setters = ("sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter",)
    setters += ("sensitive_op_qat_8bit_weight_16bit_act_qconfig_setter",)
    for name in (*setters, "sensitive_op_8bit_weight_16bit_act_calibration_setter"):
        setter = (getattr(qflow, name)(table, topk=k), qflow.default_calibration_qconfig_setter)
        prepared = qflow.prepare(analysis.model, analysis.data[0], setter)
        assert [n for n, op in prepared.requested.ops.items() if str(op.output) == "qint16"] == [first.op_name]


def test_a_clipped_scale_is_named_first_and_the_advice_mends_it(analysis):
    qa = analysis()
    prepared, image = qa.pair.prepared, analysis.data[0]
    qa.auto_find_bad_case(analysis.data)
    assert qa.run().start == ""
    assert qa.sensitivity().rows[0].op_name != "b"
    prepared.outputs["b"].set_scale(prepared.outputs["b"].scale / 20.0)
    advice = qa.advise()  # what was found before belongs to other scales
    layers = qa.compare_per_layer()
    assert layers.start == "b"  # the group of b, by its name in the qconfig
    assert max(layers.rows, key=lambda r: r.single_error or 0.0).quantizer == "b"
    assert (qa.sensitivity().rows[0].op_name, qa.sensitivity().rows[0].sensitive_type) == ("b", "activation")
    assert (advice[0].op, advice[0].cause, advice[0].spec.partition("@")[0]) == ("b", "truncation", "qint8")
    assert (analysis.out / "abnormal_layer_advisor.txt").read_text().startswith("1. b: truncation (activation)")
    before = distance("L1", *(o["box"] for o in outputs(analysis.model, prepared, image))).mean()
    qflow.configure(prepared, (qa.setter(advice), qflow.default_calibration_qconfig_setter))
    assert distance("L1", *(o["box"] for o in outputs(analysis.model, prepared, image))).mean() < 0.2 * before


def test_advice_on_a_weight_is_applied(analysis):
    qa = analysis()
    qa.set_bad_case(analysis.data[0])
    wide = dataclasses.replace(qa.advise()[0], target="a", spec="{weight: qint16}")
    setter = (qa.setter([wide]), qflow.default_calibration_qconfig_setter)
    found = qflow.prepare(analysis.model, analysis.data[0], setter).requested.ops
    assert [n for n, op in found.items() if str(op.weight) == "qint16"] == ["a"]


def test_advice_reads_the_device_once_and_what_bars_other_advice_comes_first(tmp_path, monkeypatch):
    model, example = build("resnet")
    qa = qflow.QuantAnalysis(model, calibrated(model, [example]), out_dir=tmp_path)
    qa.auto_find_bad_case([example])
    read = []
    monkeypatch.setattr("qflow.api.model_pair.load_rules", lambda march: read.append(march) or load_rules(march))
    first, *rest = (a for a in qa.advise() if a.spec)
    assert read == ["nash-m"]
    pool = dataclasses.replace(first, target="[adaptive_avg_pool2d]", spec="qint16")
    head = dataclasses.replace(first, target="head", spec="{weight: qint16}")  # with it: int16 x int16
    assert qa.setter([pool, head]).dtypes == {"[adaptive_avg_pool2d]": "qint16"}
    assert qa.setter([head, pool]).dtypes == {"head": {"weight": "qint16"}}
    qflow.configure(qa.pair.prepared, (qa.setter([first, *rest]), qflow.default_calibration_qconfig_setter))


def test_a_rescaled_channel_is_named_first(tmp_path):
    model, data = heads()
    with torch.no_grad():  # half of the channels of b 200 times as large, c takes it back
        for tensor in (model.b.weight, model.b.bias):
            tensor[:4] *= 200.0
        model.c.weight[:, :4] /= 200.0
    qa = qflow.QuantAnalysis(model, calibrated(model, data), out_dir=tmp_path)
    qa.auto_find_bad_case(data, metric="cosine")
    rows = qa.sensitivity(metric="COSINE").rows
    assert {(r.op_name, r.sensitive_type) for r in rows[:2]} == {("b", "activation"), ("c", "weight")}
    assert rows[-1].score < 0.01 * rows[0].score


# ---- bad cases


def test_the_worst_sample_is_the_bad_case(analysis):
    qa = analysis()
    table = qa.auto_find_bad_case(analysis.data, metric="ATOL", topk=3)
    assert (table.metric, table.samples, len(table.chosen)) == ("Atol", 12, 3)
    found = {n: [] for n in ("box", "score")}
    for image in analysis.data:
        x, y = outputs(analysis.model, qa.pair.prepared, image)
        for name in found:
            found[name] += distance("Atol", x[name], y[name]).tolist()
    for name, values in found.items():
        assert table.index[name]["Atol"] == max(range(12), key=values.__getitem__)
    fair = [sum(v[i] / (sum(v) / 12) for v in found.values()) for i in range(12)]
    assert table.chosen == tuple(sorted(range(12), key=lambda i: -fair[i])[:3])
    inputs = torch.load(analysis.out / "badcase.pt", weights_only=True)[0]
    first = table.chosen[0]
    assert torch.equal(inputs[0], analysis.data[first // 4][first % 4][None])
    other = table.chosen[1]
    alone = qa.set_bad_case(analysis.data[other // 4][other % 4][None]) and qa.run()
    qa.load_bad_case()
    assert qa.run(index=other) == alone != qa.run()


def test_exactly_num_steps_items_are_taken(analysis):
    taken = []
    items = (taken.append(i) or image for i, image in enumerate(analysis.data))
    assert analysis().auto_find_bad_case(items, num_steps=2).samples == 8
    assert taken == [0, 1]


def test_items_are_splatted_or_keywords_and_targets_are_left_out(analysis):
    tables = []
    for wrap in (lambda x: x, lambda x: [x, torch.zeros(4)], lambda x: {"image": x, "label": torch.zeros(4)}):
        qa = analysis()
        tables.append(qa.auto_find_bad_case([wrap(image) for image in analysis.data]))
        qa.set_bad_case(wrap(analysis.data[0]))
        assert qa.run().samples == 4
    assert tables[0] == tables[1] == tables[2]


@pytest.mark.parametrize(("order", "sign"), [("ascending", -1.0), ("descending", 1.0)])
def test_a_metric_of_the_user(analysis, order, sign):
    def metric(x, y):
        assert len(x) == 1
        return sign * float((x - y).abs().max())

    qa = analysis()
    table = qa.auto_find_bad_case(
        analysis.data, metric="custom", custom_metric_func=metric, custom_metric_order_seq=order
    )
    assert table.metric == "custom"
    for name, row in table.index.items():
        assert row["custom"] == row["Atol"]
        assert table.value[name]["custom"] == pytest.approx(sign * table.value[name]["Atol"])
    assert "custom" in (analysis.out / "badcase.txt").read_text().split("\n")[1]
    assert qa.run().samples == 1


def test_bad_cases_are_saved_and_loaded(analysis, tmp_path):
    qa = analysis()
    table = qa.auto_find_bad_case(analysis.data)
    ranked, layers = qa.sensitivity(), qa.run()
    again = analysis()
    saved = again.load_bad_case()
    assert saved.worst == table.worst and set(saved.samples) >= set(table.chosen)
    assert (again.sensitivity(), again.run()) == (ranked, layers)
    again.set_bad_case(analysis.data[2])
    by_hand = again.sensitivity()
    assert by_hand.samples == 4
    assert again.save_bad_case() == analysis.out / "badcase.pt"
    third = analysis()
    third.load_bad_case(analysis.out / "badcase.pt")  # beside it lies what the first search found
    assert third.sensitivity() == by_hand
    (tmp_path / "other").mkdir()
    torch.save(((analysis.data[1], torch.zeros(4)), None, None), tmp_path / "other" / "badcase.pt")  # a plugin's item
    assert len(third.load_bad_case(tmp_path / "other").inputs) == 1
    assert third.run().samples == 4


def test_all_topk_cases_come_back_with_the_files(analysis):
    qa, again = analysis(), analysis()
    table = qa.auto_find_bad_case(analysis.data, topk=8)
    wanted = qa.sensitivity()
    assert again.load_bad_case().chosen == table.chosen and len(table.chosen) == 8
    assert again.sensitivity() == wanted and wanted.samples >= 8
    rows, worst, samples = torch.load(analysis.out / "all_badcase_info.pt", weights_only=True)
    del samples["chosen"]  # a file of before
    torch.save((rows, worst, samples), analysis.out / "all_badcase_info.pt")
    assert again.load_bad_case().chosen == table.chosen[:1]
    assert again.sensitivity().samples < wanted.samples


def test_a_case_with_nan_is_known_again(analysis):
    qa, again = analysis(), analysis()
    analysis.data[0][1] = torch.nan
    table = qa.auto_find_bad_case(analysis.data, topk=3)
    assert table.chosen[0] == 1 and "The input itself is NaN in samples 1:" in table.findings[0].message
    assert again.load_bad_case().chosen == table.chosen


def test_raw_comparison_is_by_plain_values(analysis):
    qa = analysis()
    fair, raw = (qa.auto_find_bad_case(analysis.data, topk=2, compare=how) for how in ("fair", "raw"))
    assert fair.chosen[0] == fair.worst["L1"] and raw.chosen[0] == raw.worst_raw["L1"] == raw.index["box"]["L1"]
    assert raw.chosen == tuple(i for i, _ in raw.top["box"]["L1"][:2])  # box has the large numbers
    assert torch.equal(qa.load_bad_case().inputs[0], analysis.data[raw.chosen[0] // 4][raw.chosen[0] % 4][None])


def test_shapes_that_the_model_takes_are_taken(analysis):
    qa, larger = analysis(), torch.randn(2, 3, 12, 10)
    assert qa.auto_find_bad_case([analysis.data[0], larger]).samples == 6
    masked = larger.masked_fill(larger > 2.0, torch.inf)
    assert qa.set_bad_case(masked).inputs[0].isinf().any()


def test_errors_of_the_users_own_keep_their_traceback(analysis):
    def broken():
        yield analysis.data[0]
        raise RuntimeError("no such file")

    def metric(x, y):
        raise KeyError("mine")

    with pytest.raises(RuntimeError, match="no such file"):
        analysis().auto_find_bad_case(broken())
    with pytest.raises(KeyError, match="mine"):
        analysis().auto_find_bad_case(analysis.data, None, "custom", None, metric, "ascending")


# ---- tables


def test_filters(analysis):
    qa = analysis()
    qa.set_bad_case(analysis.data[0])
    names = {r.mod_name for r in qa.compare_per_layer(prefixes="a", types=(nn.Dropout,)).rows}
    assert names == {"a", "drop"}
    assert {r.mod_name for r in qa.compare_per_layer(types="Conv2d").rows} == {"a", "b", "c", "box", "score"}
    assert len((analysis.out / "compare_per_layer_out.csv").read_text().splitlines()) == 6
    rows = qa.sensitivity(prefixes=("box",), types=["torch.sigmoid"]).rows
    assert {r.op_name for r in rows} == {"box", "[sigmoid]"}
    assert {r.op_name for r in qa.sensitivity(types=nn.Conv2d).rows} == {"a", "b", "c", "box", "score"}


def test_filters_take_types_of_either_model(tmp_path):
    model, example = build("resnet")
    qa = qflow.QuantAnalysis(model, calibrated(model, [example]), out_dir=tmp_path)
    qa.set_bad_case(example)
    group = next(r.analy_op_type for r in qa.run().rows if r.analy_op_type.startswith("qflow.Conv2d"))
    short = group.removeprefix("qflow.")
    for found in (qa.compare_per_layer(types=(name,)).rows for name in (group, short)):
        assert found and {r.analy_op_type for r in found} == {group}
    for found in (qa.sensitivity(types=(name,)).rows for name in (group, short)):
        assert found and {r.op_type for r in found} == {"torch.nn.modules.conv.Conv2d"}
        assert len(found) < len(qa.sensitivity(types="Conv2d").rows)


def test_outputs_that_count(analysis):
    qa = analysis()
    qa.auto_find_bad_case(analysis.data)
    both, box = qa.sensitivity(), qa.sensitivity(output_names="box")
    assert "replay" in box.method and not box.findings
    assert {r.op_name for r in both.rows} - {r.op_name for r in box.rows} == {"score", "[sigmoid]"}
    assert all([name for name, _ in r.outputs] == ["box"] for r in box.rows)
    assert (analysis.out / "output_box_L1_sensitive_ops.pt").exists()


def test_reverse_turns_the_record_and_not_the_files(analysis):
    qa = analysis()
    qa.set_bad_case(analysis.data[0])
    rows, path = qa.sensitivity().rows, analysis.out / "output_merged_L1_sensitive_ops.pt"
    before = path.read_bytes()
    assert qa.sensitivity(reverse=True).rows == rows[::-1]
    assert torch.load(path, weights_only=True)[0][0] == rows[0].op_name and path.read_bytes() == before


def test_a_post_process_is_compared_instead_of_the_outputs(analysis):
    def halved(module, inputs, out):
        return {"half": out["box"] * 0.5}

    def picked(module, inputs, out):
        return out["box"]

    plain, half, pick = analysis(), analysis(post_process=halved), analysis(post_process=picked)
    tables = [qa.auto_find_bad_case(analysis.data) for qa in (plain, half, pick)]
    values = [t.value[n]["L1"] for t, n in zip(tables, ("box", "half", "0"), strict=True)]
    assert values == pytest.approx([values[0], values[0] / 2, values[0]])
    for qa in (plain, half, pick):
        qa.set_bad_case(analysis.data[0])
    ranked = [qa.sensitivity() for qa in (plain, half, pick)]
    wanted = {(r.op_name, r.sensitive_type): dict(r.outputs)["box"] for r in ranked[0].rows}
    for table, name, factor in ((ranked[1], "half", 0.5), (ranked[2], "0", 1.0)):
        for row in table.rows:
            got = dict(row.outputs)[name]
            assert got == pytest.approx(factor * wanted[row.op_name, row.sensitive_type], rel=1e-3, abs=1e-7)
    assert half.run() == plain.run()
    assert isinstance(analysis.model(analysis.data[0]), dict) and isinstance(half.pair.prepared(analysis.data[0]), dict)


# ---- records and states


def test_records_are_frames(analysis):
    qa = analysis()
    bad, layers, table, advice = qa.auto_find_bad_case(analysis.data), qa.run(), qa.sensitivity(), qa.advise()
    frame = qflow.to_frame(bad)
    worst = frame[(frame["output"] == "box") & (frame["metric"] == "L1")].iloc[0]
    assert (worst["sample"], worst["rank"]) == (bad.index["box"]["L1"], 0)
    assert list(qflow.to_frame(layers)["mod_name"]) == [r.mod_name for r in layers.rows]
    assert {"op_name", "score", "outputs.box", "outputs.score"} <= set(qflow.to_frame(table).columns)
    assert len(qflow.to_frame(advice)) == len(advice) > 0
    assert set(qflow.to_frame(qa.load_bad_case())["output"]) == {"box", "score"}
    assert len(qflow.to_frame(qflow.check(qa.pair.prepared))) > 0
    with pytest.raises(QflowError, match=r"but got dict\.$"):
        qflow.to_frame({})


def test_models_are_left_as_they_were(analysis):
    qa = analysis()
    model, prepared = analysis.model, qa.pair.prepared
    prepared.train()
    model.train()
    model.drop.eval()
    qflow.set_fake_quantize(prepared, qflow.FakeQuantState.CALIBRATION)
    with torch.no_grad():
        prepared(analysis.data[0])

    def state():
        flags = [m.training for half in (model, prepared) for m in half.modules()]
        hooks = [len(m._forward_hooks) for half in (model, prepared) for m in half.modules()]
        switches = [(q.enabled, float(q.scale.sum())) for q in [*prepared.outputs.values(), *prepared.weights.values()]]
        gathered = {n: h.size for n, h in prepared._collect.histograms.items()}
        weights = [t.clone() for half in (model, prepared) for t in half.state_dict().values()]
        return (flags, hooks, switches, gathered, prepared.ran, prepared.unseen), weights

    before, weights = state()
    table = qa.auto_find_bad_case(analysis.data)
    qa.run(), qa.sensitivity(), qa.advise()
    with pytest.raises(QflowError):
        qa.sensitivity(output_names="nothing")
    after, now = state()
    assert before == after and all(map(torch.equal, weights, now))
    model.eval()
    assert table == analysis().auto_find_bad_case(analysis.data)  # dropout was off


def test_another_qconfig_is_another_comparison(analysis):
    qa = analysis()
    qa.set_bad_case(analysis.data[0])
    before = qa.compare_per_layer()
    assert qa.compare_per_layer() == before
    qflow.configure(qa.pair.prepared, qflow.TemplateSetter("qint16"))
    assert {r.quant_dtype for r in qa.compare_per_layer().rows} != {r.quant_dtype for r in before.rows}
    qa.clean()
    assert qa.compare_per_layer().rows


def test_one_device_is_taken(analysis):
    qa, other = analysis(device_ids=["cpu"]), analysis()
    assert qa.auto_find_bad_case(analysis.data) == other.auto_find_bad_case(analysis.data, device=torch.device("cpu"))
    assert qa.run() == other.run(device="cpu") and qa.sensitivity(device="cpu") == other.sensitivity()


@pytest.mark.slow
def test_importing_it_loads_neither_pandas_nor_pictures():
    code = "import sys, qflow; qflow.QuantAnalysis; print({'pandas', 'matplotlib', 'plotly'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


# ---- mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"analysis_model_type": "hbir"}, r"fake_quant here, but got 'hbir'.*quantized, hbir.*its own QuantAnalysis"),
        ({"post_process": "sigmoid"}, r"a function, but got str\. Give a forward hook"),
        ({"device_ids": [0, 1]}, r"one device, but got device_ids \[0, 1\]"),
        ({"device_ids": "tpu7"}, r"A device is one of this machine, but got 'tpu7'"),
        ({"device_ids": "meta"}, r"A device is one of this machine, but got 'meta'"),
    ],
)
def test_what_cannot_be_built(analysis, settings, message):
    with pytest.raises(QflowError, match=message) as error:
        analysis(**settings)
    assert "\n" not in str(error.value)


def test_what_is_no_pair(analysis):
    model, data = analysis.model, analysis.data
    other, _ = build("resnet")
    twin = heads()[0]
    with torch.no_grad():
        twin.c.bias += 1.0
    for pair, message in [
        ((model, model), r"a prepared model, but got Heads\. Call qflow.prepare and qflow.calibrate"),
        ((model, qflow.prepare(model, data[0])), r"no scale for .*Call qflow.calibrate first"),
        ((other, calibrated(model, data)), r"prepared from, but got another "),
        ((twin, calibrated(model, data)), r"but got another c.bias\. Give that one"),
        ((calibrated(model, data), calibrated(model, data)), r"the float model, but got Prepared"),
    ]:
        with pytest.raises(QflowError, match=message) as error:
            qflow.QuantAnalysis(*pair)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda qa, x: qa.run(), r"is needed first, but got none\. Call auto_find_bad_case, set_bad_case"),
        (lambda qa, x: qa.compare_per_layer(), r"A bad case is needed first"),
        (lambda qa, x: qa.sensitivity(), r"A bad case is needed first"),
        (lambda qa, x: qa.advise(), r"A bad case is needed first"),
        (lambda qa, x: qa.save_bad_case(), r"A bad case is needed first"),
        (lambda qa, x: qa.load_bad_case(), r"read from badcase.pt, but got FileNotFoundError"),
        (lambda qa, x: qa.load_bad_case(__file__), r"Rename it, or give its folder"),
        (lambda qa, x: qa.auto_find_bad_case(x, metric="L2"), r"one of Cosine, .*custom, in any case, but got 'L2'"),
        (lambda qa, x: qa.auto_find_bad_case(x, metric="custom"), r"custom_metric_func and .* Give both"),
        (lambda qa, x: qa.auto_find_bad_case(x, custom_metric_func=max), r"Give both"),
        (lambda qa, x: qa.auto_find_bad_case(x, "", "custom", None, max, "up"), r"ascending, descending, but got 'up'"),
        (lambda qa, x: qa.auto_find_bad_case(x, cached_attrs=["memory"]), r"prepared with, \[\], but got \['memory'\]"),
        (lambda qa, x: qa.auto_find_bad_case(x, topk=0), r"1 or more bad cases, but got 0"),
        (lambda qa, x: qa.auto_find_bad_case(x, num_steps=0), r"at least one num_steps, but got 0"),
        (lambda qa, x: qa.auto_find_bad_case(x[0]), r"items to run through, but got a Tensor\. Write \[item\]"),
        (lambda qa, x: qa.auto_find_bad_case(x, topk="3"), r"1 or more bad cases, but got '3'"),
        (lambda qa, x: qa.auto_find_bad_case(x, num_steps=2.5), r"at least one num_steps, but got 2\.5"),
        (lambda qa, x: qa.auto_find_bad_case(x, compare="plain"), r"compared fair or raw, but got 'plain'"),
        (
            lambda qa, x: qa.auto_find_bad_case(x, None, "custom", None, lambda a, b: "good", "ascending"),
            r"one number a sample, but got str\. Return a float",
        ),
        (
            lambda qa, x: qa.auto_find_bad_case([x[0], torch.zeros(1, 4, 8, 8)]),
            r"got item 1 with image float32 \[1, 4, 8, 8\], where the example inputs had image float32 \[1, 3, 8, 8\]",
        ),
        (lambda qa, x: qa.auto_find_bad_case([x[0].byte()]), r"got item 0 with image uint8 \[4, 3, 8, 8\]"),
        (lambda qa, x: qa.auto_find_bad_case([(i, 0) for i in x[0]]), r"image float32 \[3, 8, 8\].*the batch first"),
        (lambda qa, x: qa.auto_find_bad_case(TensorDataset(x[0])), r"a TensorDataset\. Put a DataLoader around it"),
        (lambda qa, x: qa.set_bad_case(x[0][:, :2]), r"got a bad case with image float32 \[4, 2, 8, 8\]"),
        (lambda qa, x: qa.set_bad_case(None), r"got a bad case with no tensor, where"),
        (lambda qa, x: qa.set_bad_case(x[0] * torch.nan), r"numbers or infinities, but got NaN in image"),
        (
            lambda qa, x: qflow.QuantAnalysis(qa.pair.model, qa.pair.prepared, out_dir=__file__),
            r"but got .*\.py \(File",
        ),
        (lambda qa, x: qa.auto_find_bad_case([]), r"but got no batch"),
        (lambda qa, x: qa.auto_find_bad_case([{"picture": x[0]}]), r"Data items are inputs of forward"),
        (
            lambda qa, x: qa.set_bad_case(x[0], analysis_model_cached_attr={"m": 1}),
            r"those of qflow.prepare, but",
        ),
        (lambda qa, x: qa.auto_find_bad_case(x) and qa.run(index=99), r"search kept \(\d.*\), but got 99"),
        (lambda qa, x: qa.set_bad_case(x[0]) and qa.run(index=0), r"search kept \(none\), but got 0"),
        (lambda qa, x: qa.set_bad_case(x[0]) and qa.run(device="cuda:77"), r"A device is one of this machine"),
        (lambda qa, x: qa.set_bad_case(x[0]) and qa.sensitivity(metric="custom"), r"Atol, in any case, but got 'cus"),
        (lambda qa, x: qa.set_bad_case(x[0]) and qa.sensitivity(output_names=["x"]), r"box, score, but got \['x'\]"),
        (lambda qa, x: qa.set_bad_case(x[0]) and qa.sensitivity(output_names=()), r"box, score, but got none"),
        (
            lambda qa, x: qa.set_bad_case(x[0]) and qa.sensitivity(prefixes="z"),
            r"prefixes and types choose rows, but got none",
        ),
        (
            lambda qa, x: qa.set_bad_case(x[0]) and qa.compare_per_layer("z"),
            r"prefixes and types choose rows, but got none",
        ),
    ],
)
def test_mistakes_are_one_line(analysis, call, message):
    with pytest.raises(QflowError, match=message) as error:
        call(analysis(), analysis.data)
    assert "\n" not in str(error.value)


def test_what_cannot_be_run_call_by_call_is_compared_ranked_and_advised_on(tmp_path):
    class Asks(Heads):
        def forward(self, image):
            x = self.a(image)
            return self.box(x if x.mean() < 9.0 else -x)

    torch.manual_seed(0)
    model, data = Asks().eval(), heads()[1]
    qa = qflow.QuantAnalysis(model, calibrated(model, data), out_dir=tmp_path)
    qa.auto_find_bad_case(data)
    rows = {row.mod_name: row for row in qa.run().rows}
    assert list(rows) == ["quant[image]", "a", "box"]
    assert rows["box"].Cosine > 0.9
    assert rows["box"].single_error is None
    qa.compare_per_layer()
    said = (tmp_path / "compare_per_layer_out.txt").read_text().splitlines()[-1]
    assert said.startswith("Full forwards were compared, without the error of each operator alone")
    assert said.endswith("a Python value is taken from [lt] by bool.")
    assert "full forwards" in qa.sensitivity().method
    assert {a.op for a in qa.advise()} <= {"quant[image]", "a", "box"}


def test_inputs_that_have_passed_are_told(analysis):
    table = analysis().auto_find_bad_case(analysis.data, topk=2)
    with pytest.raises(QflowError, match=r"inputs are kept, but got none of \d+: .* Raise topk\.$"):
        kept_cases(table, BadcaseInputs(), 2)
    kept = kept_cases(table, BadcaseInputs({table.chosen[0]: (analysis.data[0],)}), 2)
    assert kept.chosen == table.chosen[:1]
    assert f"sample {table.chosen[1]} is a bad case too" in kept.findings[-1].message


def test_advice_needs_statistics(analysis):
    prepared = calibrated(analysis.model, analysis.data)
    loaded = qflow.prepare(analysis.model, analysis.data[0])
    loaded.load_state_dict(prepared.state_dict())
    qa = qflow.QuantAnalysis(analysis.model, loaded, out_dir=analysis.out)
    qa.auto_find_bad_case(analysis.data)
    assert qa.sensitivity().rows and qa.run().rows
    with pytest.raises(QflowError, match=r"statistics, but got none: .* Call qflow.calibrate\.$"):
        qa.advise()
