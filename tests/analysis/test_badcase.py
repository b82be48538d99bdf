"""Bad cases: planted ones are found, in bounded memory, and a search that was cut goes on as if it had not been."""
# Long: the exactness, files and resumption of one search are tested on the same trained models and direct computation.

import gc
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qflow.analysis.badcases.files import BadcaseInputs, badcase_text, load_badcases, save_badcases
from qflow.analysis.badcases.find import find_badcases
from qflow.analysis.badcases.worst_samples import WorstSamples
from qflow.analysis.measures.metrics import Custom, badness, distance, metric_names, worst_first
from qflow.analysis.measures.tables import BadcaseTable, Finding
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError, DataError
from qflow.core.record import from_dict, plain, to_json
from qflow.core.resolve import resolve
from qflow.core.setter import HighPrecisionOutput, TemplateSetter
from qflow.core.settings import COMPARISONS, CalibrationSettings
from qflow.quant.model.calibrate import apply_scales, collect
from qflow.quant.model.prepare import prepare

PLANTED = 37


class Heads(nn.Module):
    """Nested outputs: one of numbers around 1, one of numbers around 1000."""

    def __init__(self):
        super().__init__()
        self.stem, self.small, self.large = nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        return [{"small": self.small(x)}, ({"large": 1000 * self.large(x)},)]


def calibrated(model, example):
    prepared = prepare(model, example)
    qconfig = resolve(prepared.graph, [HighPrecisionOutput(), TemplateSetter(QDtype.qint8)], "nash-m")
    apply_scales(prepared, collect(prepared, [(example, len(example))]), qconfig, CalibrationSettings(method="minmax"))
    return prepared


def batches(data, size=8):
    return [(part, len(part)) for part in data.split(size)]


@pytest.fixture(scope="module")
def heads():
    torch.manual_seed(0)
    model, data = Heads().eval(), torch.rand(100, 6)
    prepared = calibrated(model, data)
    data[PLANTED] *= 10  # far beyond every calibrated range
    return model, prepared, data


def by_hand(model, prepared, data, metric):
    """Values [outputs, samples] of one metric, everything in memory."""
    with torch.no_grad(), prepared.quantized():
        pairs = [(a, b) for part in data.split(8) for a, b in [(model(part), prepared(part))]]
    columns = [lambda out: out[0]["small"], lambda out: out[1][0]["large"]]
    return torch.stack([torch.cat([distance(metric, pick(a), pick(b)) for a, b in pairs]) for pick in columns])


# ---- what is found ---------------------------------------------------------------------------------------------


def test_the_planted_sample_is_the_worst_of_every_output(heads):
    table = find_badcases(*heads[:2], batches(heads[2]), count=3)
    assert table.samples == 100
    assert set(table.index) == {"0-small", "1-0-large"}
    for metric in ("MSE", "L1", "Atol"):
        assert table.index["0-small"][metric] == table.index["1-0-large"][metric] == PLANTED
        assert table.worst[metric] == table.worst_raw[metric] == PLANTED
    assert table.chosen[0] == PLANTED
    assert table.findings == ()
    assert from_dict(BadcaseTable, plain(table)) == table


def test_values_top_and_chosen_are_those_of_all_samples_at_once(heads):
    model, prepared, data = heads
    table = find_badcases(model, prepared, batches(data), metric="MSE", count=10, top=6)
    for metric in COMPARISONS:
        values = by_hand(model, prepared, data, metric)
        for name, column in zip(("0-small", "1-0-large"), values, strict=True):
            order = worst_first(metric, column)[:6]
            assert table.index[name][metric] == order[0]
            assert table.value[name][metric] == column[order[0]]
            assert table.top[name][metric] == tuple((int(i), float(column[i])) for i in order)
        bad = badness(metric, values)
        total = (bad / bad.mean(1, keepdim=True)).sum(0)
        assert table.worst[metric] == total.argmax()
        if metric == "MSE":
            assert table.chosen == tuple(total.sort(descending=True, stable=True).indices[:10].tolist())


def test_an_output_of_large_numbers_wins_only_the_raw_comparison(heads):
    model, prepared, data = heads
    values = by_hand(model, prepared, data[:32], "L1")  # without the planted sample
    large = worst_first("L1", values[1])
    fair = find_badcases(model, prepared, batches(data[:32]), count=4)
    raw = find_badcases(model, prepared, batches(data[:32]), count=4, compare="raw")
    assert raw.chosen == tuple(large[:4].tolist())
    assert fair.chosen != raw.chosen
    assert fair.worst_raw == raw.worst_raw and raw.worst_raw["L1"] == large[0]
    assert fair.worst == raw.worst


def peak(x, y):
    return (x - y).abs().flatten(1).amax(1)


def closeness(x, y):
    return 1 / (1 + peak(x, y))


@pytest.mark.parametrize(("function", "order"), [(peak, "descending"), (closeness, "ascending")])
def test_the_users_own_metric_in_either_direction(heads, function, order):
    custom = Custom(function, order)
    table = find_badcases(*heads[:2], batches(heads[2]), metric="custom", custom=custom, count=2)
    for name in table.index:
        assert table.index[name]["custom"] == table.index[name]["Atol"] == PLANTED
    assert table.chosen[0] == table.worst["custom"] == PLANTED
    assert "custom" in badcase_text(table)


def test_own_metrics_that_cannot_work_are_refused(heads):
    with pytest.raises(ConfigError, match="one of ascending, descending, but got 'up'"):
        Custom(peak, "up")
    with pytest.raises(ConfigError, match=r"one number a sample, \[8\], but got \[8, 4\]"):
        find_badcases(*heads[:2], batches(heads[2]), custom=Custom(lambda x, y: x - y, "descending"))
    with pytest.raises(ConfigError, match="but got 'custom'. Give the function"):
        find_badcases(*heads[:2], batches(heads[2]), metric="custom")


def test_exactly_num_steps_batches_are_read(heads):
    read, steps = [], []
    stream = (read.append(i) or item for i, item in enumerate(itertools.cycle(batches(heads[2]))))
    table = find_badcases(*heads[:2], stream, num_steps=5, on_step=steps.append)
    assert len(read) == 5 and steps == [1, 2, 3, 4, 5]
    assert table.samples == 40


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"metric": "L2"}, "but got 'L2'"),
        ({"compare": "best"}, "fair or raw, but got 'best'"),
        ({"num_steps": 0}, "at least one num_steps, but got 0"),
        ({"count": 9, "pool": 8}, "count 9, but got 8"),
    ],
)
def test_settings_that_do_not_exist_are_refused(heads, wrong, message):
    with pytest.raises(ConfigError, match=message):
        find_badcases(*heads[:2], batches(heads[2]), **wrong)


def test_no_data_is_refused(heads):
    with pytest.raises(DataError, match="no batch"):
        find_badcases(*heads[:2], [])


# ---- what is told ----------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 5)

    def forward(self, x):
        y = self.lin(x)
        return {"y": y, "class": y.argmax(1), "mean": y.mean(0), "few": y[y[:, 0] > 0], "hot": (y * 8).round()}


def test_outputs_that_cannot_be_compared_are_left_out_and_said_so():
    torch.manual_seed(0)
    model, data = Mixed().eval(), torch.randn(40, 6)
    table = find_badcases(model, calibrated(model, data), batches(data))
    assert set(table.index) == {"y", "hot"}
    said = {f.op: f.message for f in table.findings}
    assert "int64 values have no distance" in said["class"]
    assert "does not hold one row for each" in said["mean"]
    assert "few" in said
    assert "before output hot makes small errors jump: cut the model before it" in said["[round]"]
    assert "order of the float model" in said["[argmax]"]
    for f in table.findings:
        assert "\n" not in f.message and f.level in ("info", "check")


def test_only_outputs_without_distance_are_refused():
    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 5)

        def forward(self, x):
            y = self.lin(x)
            return y.argmax(1), y.mean()

    model, data = Classes().eval(), torch.randn(8, 6)
    with pytest.raises(DataError, match="float outputs per sample, but got none: ") as error:
        find_badcases(model, calibrated(model, data), batches(data))
    assert "output 0: int64 values have no distance ([argmax] makes it); output 1: its shape []" in str(error.value)
    assert "Cut the model before [argmax]" in str(error.value) and "\n" not in str(error.value)


class Ranked(nn.Module):
    """Boxes of the best scores: neighbours that change places make all the difference."""

    def __init__(self):
        super().__init__()
        self.score, self.box = nn.Linear(6, 40), nn.Linear(6, 160)

    def forward(self, x):
        score, box = self.score(x), self.box(x).reshape(-1, 40, 4)
        best, at = score.topk(8, dim=1)
        return best, box.gather(1, at[:, :, None].expand(-1, -1, 4))


@pytest.fixture(scope="module")
def ranked():
    torch.manual_seed(0)
    model, data = Ranked().eval(), torch.randn(64, 6)
    return model, calibrated(model, data), data


def test_a_topk_head_is_compared_in_float_order(ranked):
    model, prepared, data = ranked
    table = find_badcases(model, prepared, batches(data))
    with torch.no_grad(), prepared.quantized():
        free = distance("Atol", model(data)[1], prepared(data)[1])
    assert table.value["1"]["Atol"] < 0.1 < 1 < free.max()
    assert [f.op for f in table.findings] == ["[topk]"]


def test_the_order_is_that_of_the_float_model_even_where_weights_were_trained(ranked):
    model, _, data = ranked
    prepared = calibrated(model, data)
    with torch.no_grad():
        for p in prepared.model.parameters():
            p += 0.003 * torch.randn_like(p)
    table = find_badcases(model, prepared, batches(data))
    assert table.value["1"]["Atol"] < 0.2


def test_an_order_that_cannot_be_followed_is_said(ranked):
    model, prepared, data = ranked
    table = find_badcases(nn.Sequential(model), prepared, batches(data))
    assert table.value["1"]["Atol"] > 1
    assert table.findings[0].level == "check" and "do not follow the float order" in table.findings[0].message


def test_an_unknown_operator_before_an_output_is_named():
    @torch.library.custom_op("qflow_test::nms_like", mutates_args=())
    def nms_like(boxes: torch.Tensor) -> torch.Tensor:
        return (boxes > boxes.mean()).float() * boxes

    class Post(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 4)

        def forward(self, x):
            return torch.ops.qflow_test.nms_like(self.lin(x))

    torch.manual_seed(0)
    model, data = Post().eval(), torch.randn(16, 6)
    table = find_badcases(model, calibrated(model, data), batches(data))
    assert any("nms_like" in f.message and "incomparable if it is like NMS" in f.message for f in table.findings)


class After(nn.Module):
    def __init__(self, nms):
        super().__init__()
        self.lin, self.nms = nn.Linear(6, 6), nms

    def forward(self, x):
        return self.nms(self.lin(x))


class Of(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, y):
        return self.function(y)


class Suppressed(nn.Module):
    """The best rows that are no neighbours of better ones, padded to 10."""

    def forward(self, y):
        kept = y * (torch.cdist(y.sort(1).values, y)[:, :1] > 0.5)
        return nn.functional.pad(kept, (0, 4))


@pytest.mark.parametrize(("end", "named"), [(Suppressed(), True), (nn.Sequential(nn.Linear(6, 6), nn.ReLU()), False)])
def test_a_skipped_module_at_the_end_is_named_unless_it_is_all_torch(end, named):
    torch.manual_seed(0)
    model, data = After(end).eval(), torch.randn(16, 6)
    prepared = prepare(model, data, ["nms"])
    qconfig = resolve(prepared.graph, [HighPrecisionOutput(), TemplateSetter(QDtype.qint8)], "nash-m")
    apply_scales(prepared, collect(prepared, batches(data)), qconfig, CalibrationSettings())
    said = {f.op: f.message for f in find_badcases(model, prepared, batches(data)).findings}
    assert (
        said.get("nms", "").endswith("is skipped, and incomparable if it is like NMS: cut the model before it")
    ) is named
    assert named or not said


@pytest.mark.parametrize(
    "function",
    [
        nn.functional.logsigmoid,
        lambda y: nn.functional.cosine_similarity(y[:, None], y[:, :, None], dim=-1),
        lambda y: torch.cdist(y[:, :, None], y[:, :, None]),
        lambda y: torch.linalg.inv(y[:, :, None] * y[:, None] + 9.0 * torch.eye(6)),
        lambda y: torch.fft.rfft(y).abs(),
        lambda y: nn.functional.lp_pool1d(y, 2.0, 2),
    ],
)
def test_what_is_known_to_be_continuous_is_not_alarmed_about(function):
    torch.manual_seed(0)
    model, data = After(Of(function)).eval(), torch.randn(16, 6)
    assert find_badcases(model, calibrated(model, data), batches(data)).findings == ()


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_ends_are_continuous(kind):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = kind(6, 6, batch_first=True)

        def forward(self, x):
            return self.cells(x)[0]

    torch.manual_seed(0)
    model, data = Recurrent().eval(), torch.randn(8, 5, 6)
    assert find_badcases(model, calibrated(model, data), batches(data)).findings == ()


def test_a_sample_without_a_finite_distance_is_the_worst_and_reported(heads):
    model, prepared, data = heads
    data = data.clone()
    data[50, 0], data[61, 0] = torch.nan, torch.nan
    table = find_badcases(model, prepared, batches(data), count=3)
    assert table.chosen == (50, 61, PLANTED)
    assert set(table.worst.values()) == {50}
    assert table.value["0-small"]["L1"] == math.inf
    assert table.value["0-small"]["Cosine"] == table.value["0-small"]["SQNR"] == -math.inf
    assert [f.op for f in table.findings] == ["0-small", "1-0-large"]
    assert "2 of 100 samples have no finite Cosine, MSE, L1" in table.findings[0].message
    assert table.findings[0].message.endswith("The input itself is NaN in samples 50, 61: clean the data.")
    assert "first sample 50" in table.findings[0].message
    assert from_dict(BadcaseTable, plain(table)) == table


def test_nan_that_the_float_model_makes_is_told_from_overflow():
    class Log(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(6, 4)

        def forward(self, x):
            return torch.log(self.lin(x) + 9.0)

    torch.manual_seed(0)
    model, data = Log().eval(), torch.randn(24, 6)
    prepared = calibrated(model, data)
    data[3], data[17] = data[3] * 1000.0, data[17] * -1000.0
    (found,) = find_badcases(model, prepared, batches(data)).findings
    assert found.message.endswith("The float output itself is NaN in samples 3, 17: clean the data.")


# ---- streams ---------------------------------------------------------------------------------------------------


def distances_of(values):
    """[outputs, samples] as every metric's value: the accumulator sees one formula, in both directions."""
    return torch.stack([1 - values, values, values, values, -values, values, -values], 1)


CUSTOM = Custom(closeness, "ascending")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.25, 700.0])] * 2), min_size=1, max_size=60),
    size=st.integers(1, 9),
    top=st.integers(1, 5),
)
def test_streaming_equals_the_batch_computation(rows, size, top):
    values = torch.tensor(rows, dtype=torch.float64).T
    stream = WorstSamples(["a", "b"], CUSTOM, top, pool=40)
    for part in distances_of(values).split(size, 2):
        stream.update(part)
    order = [column.sort(descending=True, stable=True).indices[:top].tolist() for column in values]
    worst = values.amax(0).sort(descending=True, stable=True).indices[:top].tolist()
    for metric in ("MSE", "L1", "Atol", "KL"):
        assert [[i for i, _ in stream.tops(o, metric)] for o in ("a", "b")] == order
        assert stream.raw(metric, top) == worst
        total = sum(column / column.mean().clamp_min(1e-30) for column in values)
        chosen, certain = stream.fair(metric, top)
        assert certain == len(chosen) == min(top, len(rows))
        torch.testing.assert_close(total[chosen], total.sort(descending=True).values[:top])
    assert stream.raw("custom", top) == worst


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), drift=st.sampled_from([1.0, 5.0, 50.0]))
def test_beyond_the_pool_what_is_called_certain_is_right(seed, drift):
    torch.manual_seed(seed)
    values = torch.rand(3, 400, dtype=torch.float64) ** 4 * torch.linspace(1, drift, 400)
    values[1] = values[1].flip(0)
    stream = WorstSamples(["a", "b", "c"], None, 1, pool=16)
    for part in distances_of(values)[:, :6].split(7, 2):
        stream.update(part)
    total = (values / values.mean(1, keepdim=True)).sum(0)
    expected = total.sort(descending=True).indices[:8].tolist()
    chosen, certain = stream.fair("L1", 8)
    assert chosen[:certain] == expected[:certain]


def test_steady_data_are_certain_far_beyond_the_pool_and_drifting_data_say_when_not(heads):
    torch.manual_seed(0)
    values = torch.rand(2, 5000, dtype=torch.float64) ** 4
    steady, drifting = (WorstSamples(["a", "b"], None, 1, pool=64) for _ in range(2))
    for part in distances_of(values)[:, :6].split(50, 2):
        steady.update(part)
    for part in distances_of(values * torch.linspace(1, 1e-3, 5000))[:, :6].split(50, 2):
        drifting.update(part)
    assert steady.fair("L1", 8)[1] == 8
    assert drifting.fair("L1", 64)[1] < 64
    model, prepared, data = heads
    falling = data[torch.arange(100) != PLANTED] * torch.linspace(1, 1e-3, 99)[:, None]
    table = find_badcases(model, prepared, batches(falling), count=8, pool=8)
    certain = [f.message for f in table.findings if "certain" in f.message]
    assert all("of the 8 chosen samples are certain" in message for message in certain)


def tensor_bytes():
    gc.collect()
    return sum(t.nbytes for t in gc.get_objects() if type(t) is torch.Tensor)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_samples(heads):
    model, prepared, data = heads
    kept, sizes = BadcaseInputs(), {}
    stream = itertools.cycle(batches(data[:96]))

    def measure(step):
        if step in (40, 400):
            sizes[step] = (tensor_bytes(), len(kept.samples))

    find_badcases(model, prepared, stream, num_steps=400, count=4, pool=32, inputs=kept, on_step=measure)
    assert sizes[400][0] <= sizes[40][0] + 16_000  # the pool is between `pool` and 2 x `pool`
    assert sizes[400][1] <= 4 * 2 + 4 * len(COMPARISONS) * 2


# ---- states ----------------------------------------------------------------------------------------------------


class Cut(Exception):
    pass


@pytest.mark.parametrize("cut", [1, 4, 7, 13])
def test_a_search_that_was_cut_goes_on_to_the_same_table(heads, ranked, tmp_path, cut):
    for model, prepared, data in (heads, ranked):
        path, ran = tmp_path / f"{type(model).__name__}.state", []
        options = {"count": 5, "pool": 6, "state": path, "identity": "a", "save_every": 3}
        whole = find_badcases(model, prepared, batches(data, 5), count=5, pool=6)

        def stop(step):
            if step == cut:
                raise Cut

        with pytest.raises(Cut):
            find_badcases(model, prepared, batches(data, 5), on_step=stop, **options)
        kept = BadcaseInputs()
        hook = model.register_forward_pre_hook(lambda module, args, ran=ran: ran.append(1))
        try:
            again = find_badcases(model, prepared, batches(data, 5), inputs=kept, **options)
        finally:
            hook.remove()
        assert to_json(again) == to_json(whole)
        assert len(ran) <= len(data) / 5 - cut // 3 * 3 + 2
        assert set(again.chosen) <= set(kept.samples) | set(kept.missing)
        assert find_badcases(model, prepared, batches(data, 5), **options) == whole  # nothing left to do
        assert [p.name for p in tmp_path.glob("*.new")] == []


def test_a_finished_search_goes_on_over_more_steps(heads, tmp_path):
    model, prepared, data = heads
    options = {"count": 5, "state": tmp_path / "state", "identity": "a"}
    find_badcases(model, prepared, batches(data), num_steps=4, **options)
    with pytest.raises(ConfigError, match="from step 4, but got num_steps 3"):
        find_badcases(model, prepared, batches(data), num_steps=3, **options)
    assert find_badcases(model, prepared, batches(data), **options) == find_badcases(
        model, prepared, batches(data), count=5
    )


def test_a_state_of_something_else_is_refused(heads, tmp_path):
    model, prepared, data = heads
    state = tmp_path / "state"
    find_badcases(model, prepared, batches(data), num_steps=4, state=state, identity="model 1")
    for wrong, message in (
        ({"identity": "model 2"}, "identity model 2, but got model 1"),
        ({"identity": "model 1", "pool": 99}, "pool 99, but got 1024"),
        ({"identity": "model 1", "custom": CUSTOM}, "own metric ascending closeness, but got none"),
        ({"identity": ""}, "got no identity"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_badcases(model, prepared, batches(data), state=state, **wrong)
    for other, got in ((batches(data, 7), "28"), (batches(data)[:2], "the end after 2")):
        with pytest.raises(ConfigError, match=f"32 samples in 4 steps, but got {got}"):
            find_badcases(model, prepared, other, state=state, identity="model 1")
    state.write_bytes(b"no state")
    with pytest.raises(ConfigError, match="Remove it"):
        find_badcases(model, prepared, batches(data), state=state, identity="model 1")


# ---- inputs and files ------------------------------------------------------------------------------------------


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(6, 3)

    def forward(self, x, extra):
        return self.lin(x) + extra["shift"]


def test_inputs_of_bad_cases_are_kept_one_by_one(heads):
    torch.manual_seed(0)
    model, x, shift = Pair().eval(), torch.rand(40, 6), torch.rand(40, 3)
    prepared = calibrated(model, (x, {"shift": shift}))
    x[PLANTED] *= 10
    stream = [((a, {"shift": b}), len(a)) for a, b in zip(x.split(8), shift.split(8), strict=True)]
    kept = BadcaseInputs()
    table = find_badcases(model, prepared, stream, count=4, inputs=kept)
    assert kept.missing == ()
    assert set(table.chosen) | set(table.worst.values()) <= set(kept.samples)
    for i, (one, extra) in kept.samples.items():
        assert torch.equal(one, x[i : i + 1]) and torch.equal(extra["shift"], shift[i : i + 1])
        assert one.untyped_storage().nbytes() == one.nbytes  # not a view that holds its batch


def test_files_in_the_plugins_form_are_read_back(heads, tmp_path):
    kept = BadcaseInputs()
    table = find_badcases(*heads[:2], batches(heads[2]), count=4, inputs=kept)
    save_badcases(tmp_path / "out", table, kept, attrs={PLANTED: ({"memory": torch.ones(2)}, None)})
    assert (tmp_path / "out" / "badcase.txt").read_text() == badcase_text(table)
    rows, worst, _ = torch.load(tmp_path / "out" / "all_badcase_info.pt", weights_only=True)
    assert rows[0] == ["0-small", *(table.index["0-small"][m] for m in ("Cosine", "MSE", "L1", "KL", "SQNR"))]
    assert worst == table.worst
    saved = load_badcases(tmp_path / "out")
    assert torch.equal(saved.inputs, heads[2][PLANTED : PLANTED + 1])
    assert torch.equal(saved.attrs[0]["memory"], torch.ones(2)) and saved.attrs[1] is None
    assert saved.index["1-0-large"]["L1"] == PLANTED
    assert torch.equal(saved.samples[table.chosen[2]][0], heads[2][table.chosen[2]][None])
    (tmp_path / "out" / "all_badcase_info.pt").unlink()
    assert load_badcases(tmp_path / "out").samples == {}


def test_files_that_cannot_be_written_or_read_say_why(heads, tmp_path):
    table = find_badcases(*heads[:2], batches(heads[2]), count=1)
    with pytest.raises(DataError, match=f"none of sample {PLANTED}"):
        save_badcases(tmp_path, table, BadcaseInputs())
    with pytest.raises(DataError, match="builtin types, but got object"):
        save_badcases(tmp_path, table, BadcaseInputs({PLANTED: object()}))
    with pytest.raises(DataError, match="but got FileNotFoundError"):
        load_badcases(tmp_path)


def test_the_text_is_the_guides():
    metrics = metric_names()
    index = {"0-0": dict(zip(metrics, (4, 4, 1, 4, 1, 9), strict=True))}
    values = {"0-0": dict(zip(metrics, (0.969289, 2.35591, 0.996721, 0.0828096, 11.9335, 7.0), strict=True))}
    worst = dict(zip(metrics, (11, 17, 17, 12, 0, 3), strict=True))
    table = BadcaseTable(20, index, values, worst, "L1", (17,), findings=(Finding("a", "info", "b"),))
    assert (
        badcase_text(table)
        == """\
The bad case input index of each output:
Name/Index  Cosine  MSE  L1  KL  SQNR
----------  ------  ---  --  --  ----
0-0         4       4    1   4   1

The metric results of each badcase:
Name/Index  Cosine    MSE      L1        KL         SQNR
----------  --------  -------  --------  ---------  -------
0-0         0.969289  2.35591  0.996721  0.0828096  11.9335

The bad case input index of the worst output:
metric  dataloader index
------  ----------------
Cosine  11
MSE     17
L1      17
KL      12
SQNR    0
"""
    )
