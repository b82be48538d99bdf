"""The fit on the published rows: it repeats, it finds what made the rows, and bad tables are refused in one line."""

import csv
import random
from dataclasses import replace
from pathlib import Path

import pytest

from qflow.config.device_cost import cost_section, write_cost
from qflow.config.device_file import load_cost, load_rules
from qflow.core.errors import ConfigError
from qflow.cost_model.fit import fit_networks, predict_network
from qflow.cost_model.model import CostModel
from qflow.cost_model.networks import COLUMNS, Network, family_of, read_networks
from qflow.cost_model.predictions import band_of, errors_of

DATA = Path(__file__).parent.parent.parent / "benchmarks" / "data" / "j6m-networks.csv"


@pytest.fixture(scope="module")
def published():
    networks, _ = read_networks(DATA)
    return fit_networks(networks)


@pytest.mark.parametrize("march", ["nash-m", "nash-e"])
def test_the_shipped_device_files_come_from_this_fit(published, march):
    shipped = load_cost(march)
    assert published.apply(shipped) == shipped


def test_it_predicts_families_that_it_has_not_seen(published):
    found = published.errors("family")
    assert (found.median <= 0.05, found.p90 <= 0.13, found.worst <= 0.25) == (True, True, True)
    assert 0.88 <= found.inside <= 0.98  # of intervals that are made for 90 %
    assert min(found.spearman.values()) >= 0.99
    assert published.errors("nash-m from the others").median <= 0.08


def test_what_is_not_int8_is_left_out_with_its_reason():
    _, skipped = read_networks(DATA)
    assert "dinov2_vits14: int16" in skipped
    assert "YOLO26n Cls: not saturated on nash-e" in skipped
    assert all(line.endswith(("int16", "unknown", "not saturated on nash-e")) for line in skipped)


def test_the_latency_of_families_that_it_has_not_seen_is_predicted_with_their_outputs(published):
    found = errors_of(published.latencies["family"])
    assert (found.rows, found.median <= 0.06, found.p90 <= 0.15, found.worst <= 0.30) == (107, True, True, True)
    assert {m: (round(h.fixed_ms, 2), round(h.output_ms, 3)) for m, h in published.hosts.items()} == {
        "nash-e": (0.25, 0.020),
        "nash-m": (0.21, 0.012),
    }


def test_what_decides_a_prediction_comes_from_other_rows():
    """Other times of a family change nothing of its predictions and their intervals."""
    networks = read_networks(DATA)[0][::4]
    slower = [replace(n, times={m: 3 * t for m, t in n.times.items()}) if n.family == "yolov8" else n for n in networks]
    a, b = ([p for p in fit_networks(n).left_out["family"] if p.family == "yolov8"] for n in (networks, slower))
    assert [(p.predicted, p.low, p.high) for p in a] == [(p.predicted, p.low, p.high) for p in b]
    assert [3 * p.measured for p in a] == pytest.approx([p.measured for p in b])


def test_an_interval_has_the_ranks_that_cover_nine_in_ten():
    low, high = band_of([0.90 + 0.01 * i for i in range(39)])
    assert (low, high) == pytest.approx((0.91, 1.27))  # ranks 2 and 38 of 39
    assert band_of([1.2, 1.3]) == (1.0, 1.3)


def made(model, seed, count=60, noise=0.0):
    """Networks whose times `model` itself gives."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        gemms = rng.randint(20, 200)
        network = Network(
            name=f"yolo{i % 6 + 20}{'nsmlx'[i % 5]} {i}",
            family=f"yolo{i % 6 + 20}",
            dtype="int8",
            gemms=gemms,
            gmacs=gemms * 10 ** rng.uniform(-3, 0.3),
            attention_gmacs=rng.choice([0.0, rng.uniform(0, 3)]),
            softmax_melem=rng.choice([0.0, rng.uniform(0, 30)]),
            lut_melem=rng.choice([0.0, rng.uniform(0, 100)]),
            weight_mb=rng.uniform(1, 80),
            times={},
        )
        times = {m: predict_network(network, m, model) * (1 + rng.gauss(0, noise)) for m in ("nash-e", "nash-m")}
        found.append(Network(**{**network.__dict__, "times": times}))
    return found


def test_it_finds_the_parameters_that_made_the_rows():
    true = CostModel(gmac_per_ms_ghz=12.0, lut_melem_per_ms_ghz=40.0, weight_mb_per_ms=30.0, gemm_us_ghz=3.0)
    found = fit_networks(made(true, 0), strength=0.0).apply(CostModel())
    for name in ("gmac_per_ms_ghz", "lut_melem_per_ms_ghz", "weight_mb_per_ms", "gemm_us_ghz", "fixed_ms"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-3)
    assert found.attention_gmac_per_ms_ghz == pytest.approx(true.attention_gmac_per_ms_ghz, rel=1e-3)
    assert found.large_gmac_per_ms_ghz == pytest.approx(true.large_gmac_per_ms_ghz, rel=1e-3)


def test_where_the_rows_say_nothing_the_prior_stands():
    """Networks without attention: its rate stays the published one."""
    rows = [
        Network(**{**n.__dict__, "attention_gmacs": 0.0, "softmax_melem": 0.0})
        for n in made(CostModel(), 1, noise=0.05)
    ]
    found = fit_networks(rows).apply(CostModel())
    assert found.attention_gmac_per_ms_ghz == pytest.approx(1 / 0.835, rel=1e-3)
    assert found.softmax_melem_per_ms_ghz == pytest.approx(1 / 0.107, rel=1e-3)


def test_the_network_formula_is_that_of_the_operators():
    """Totals through `predict_network` and operators through `compute_ms` give the same latency."""
    from support.networks import all_at, network

    from qflow.core.dtype import QDtype
    from qflow.cost_model.latency import Pricer

    pricer = Pricer(network(), CostModel())
    works = pricer.works
    totals = Network(
        name="x",
        family="x",
        dtype="int8",
        gemms=sum(w.gemm for w in works),
        gmacs=sum(w.padded_macs for w in works) * 1e-9,
        attention_gmacs=sum(w.attention_macs for w in works) * 1e-9,
        softmax_melem=sum(w.softmax for w in works) * 1e-6,
        lut_melem=sum(w.lut for w in works) * 1e-6,
        weight_mb=sum(w.weights for w in works) * 1e-6,
        times={},
    )
    report = pricer.report(all_at(network(), QDtype.qint8))
    assert predict_network(totals, "nash-m", CostModel()) == pytest.approx(report.bpu_ms)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("YOLO11l Seg", "yolo11"),
        ("YOLOv8x CLS", "yolov8"),
        ("YOLOv5xu Detect", "yolov5"),
        ("YOLO12n", "yolo12"),
        ("efficientnet_lite2", "efficientnet"),
        ("resnet152", "resnet"),
        ("resnet50", "resnet"),
        ("mobilenetv2", "mobilenetv2"),
        ("siglip-base-224", "siglip"),
    ],
)
def test_a_family_is_read_off_the_name(name, family):
    assert family_of(name) == family


def table(tmp_path, change):
    with DATA.open() as file:
        rows = list(csv.DictReader(file))
    path = tmp_path / "rows.csv"
    rows = change(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


def without(column):
    return lambda rows: [{k: v for k, v in row.items() if k != column} for row in rows]


@pytest.mark.parametrize("column", ["model", *COLUMNS.values()])
def test_a_missing_column_is_named(tmp_path, column):
    with pytest.raises(ConfigError, match=f"has the column {column}"):
        read_networks(table(tmp_path, without(column)))


@pytest.mark.parametrize(
    ("column", "value", "rule"),
    [
        *(("lut_act_melem", v, "from 0 to 1e+09") for v in ("many", "-1", "nan", "inf", "1e300")),
        *(("t_bpu_ms_S100_nash_e", v, "from 1e-06 to 1e+06") for v in ("0", "0.0", "-1", "1e-320", "1e300", "fast")),
    ],
)
def test_a_bad_number_is_named_with_its_line(tmp_path, column, value, rule):
    path = table(tmp_path, lambda rows: [{**rows[0], column: value}, *rows[1:]])
    with pytest.raises(ConfigError) as caught:
        read_networks(path)
    assert f"A network's {column} is a number {rule}, but got '{value}' in {path}, line 2." in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"softmax_melem": ""}, "no softmax_melem"),
        ({"t_bpu_ms_S100_nash_e": "", "t_bpu_ms_S100P_J6M_nash_m": " "}, "no time"),
        ({"dtype": ""}, "no dtype"),
        ({"dtype": "int16", "softmax_melem": ""}, "int16"),
    ],
)
def test_a_row_that_says_too_little_is_left_out_and_the_rest_is_taken(tmp_path, changes, reason):
    whole, _ = read_networks(DATA)
    networks, skipped = read_networks(table(tmp_path, lambda rows: [{**rows[0], **changes}, *rows[1:]]))
    assert skipped[0] == f"YOLO11l CLS: {reason}"
    usable = sum(n.dtype == "int8" and bool(n.times) for n in networks)
    assert usable == sum(n.dtype == "int8" and bool(n.times) for n in whole) - 1


def test_a_table_is_read_however_it_was_saved(tmp_path):
    """A byte order mark, spaces and capitals, cells beyond the last column."""
    path = table(tmp_path, lambda rows: [{**row, "dtype": f" {row['dtype'].upper()} "} for row in rows])
    first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([first, f"{rest[0]},more,cells", *rest[1:]]), encoding="utf-8-sig")
    assert read_networks(path)[0] == read_networks(DATA)[0]


def test_each_march_has_one_time_column_and_foreign_ones_are_named(tmp_path):
    path = table(tmp_path, lambda rows: [{**row, "t_bpu_ms_mine_nash_p": "1"} for row in rows])
    assert read_networks(path)[1][0] == "t_bpu_ms_mine_nash_p: a time of no march"
    path = table(tmp_path, lambda rows: [{**row, "t_bpu_ms_mine_nash_e": "1"} for row in rows])
    with pytest.raises(ConfigError, match="one time column for nash-e, but got t_bpu_ms_S100_nash_e, t_bpu_ms_mine_"):
        read_networks(path)


def test_rows_that_are_all_alike_have_no_rank(recwarn):
    one = made(CostModel(), 0, count=1)[0]
    found = fit_networks([Network(**{**one.__dict__, "name": f"yolo9{i}"}) for i in range(12)])
    assert found.errors("network").spearman == {}
    assert "nan" not in found.provenance()
    assert not recwarn.list


def test_what_is_no_table_is_refused(tmp_path):
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00binary")
    for path in (tmp_path / "none.csv", tmp_path, tmp_path / "x.csv"):
        with pytest.raises(ConfigError, match="CSV file of networks"):
            read_networks(path)
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(ConfigError, match="has the column model"):
        read_networks(tmp_path / "empty.csv")
    with pytest.raises(ConfigError, match="at least ten int8 times, but got 2"):
        fit_networks(made(CostModel(), 0, count=1))


def test_a_family_column_overrules_the_name(tmp_path):
    path = table(tmp_path, lambda rows: [{**row, "family": "mine"} for row in rows])
    assert {n.family for n in read_networks(path)[0]} == {"mine"}


def test_a_fitted_file_is_read_back_as_it_was_written(tmp_path, published):
    fitted = published.apply(load_cost("nash-m"))
    write_cost(fitted, tmp_path / "board.yaml", load_rules("nash-m"))
    assert load_cost(tmp_path / "board.yaml") == fitted
    own = tmp_path / "own.yaml"
    own.write_text("defaults: [nash-m, _self_]\n# kept\nrules: {}\ncost:\n  clock_ghz: 9\n")
    write_cost(fitted, own, load_rules("nash-m"))
    assert "# kept" in own.read_text()
    assert load_cost(own).clock_ghz == 1.5
    assert cost_section(fitted).startswith("cost:\n")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"oe_version": "3.2.0"}, {"float16_kinds": []}])
@pytest.mark.parametrize("name", ["nash-m", "nash-e", "nash-m-oe32"])
def test_a_new_file_has_the_rules_of_the_device_that_was_fitted(tmp_path, published, name, changes):
    rules = replace(load_rules(name), **changes)
    write_cost(published.apply(load_cost(name)), tmp_path / "mine.yaml", rules)
    assert load_rules(tmp_path / "mine.yaml") == rules


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("order.yaml", b"cost:\n  clock_ghz: 9\nrules: {}\n", "ends with its cost section"),
        ("other.yaml", b"defaults: [nash-e, _self_]\ncost:\n  clock_ghz: 9\n", "of nash-m, but got nash-e in"),
        ("binary.yaml", b"march: \xff\xfe\ncost:\n  clock_ghz: 9\n", "written to out, but got"),
        ("folder.yaml", None, "written to out, but got"),
        ("notes.txt", b"", "is a .yaml file, but got"),
    ],
)
def test_a_file_that_is_no_device_file_of_the_march_is_not_overwritten(tmp_path, published, name, content, says):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as caught:
        write_cost(published.apply(load_cost("nash-m")), path, load_rules("nash-m"))
    assert "\n" not in str(caught.value)
    assert content is None or path.read_bytes() == content
