"""The benchmark runs, in miniature; its numbers are not judged here."""

from pathlib import Path

import pytest
from torch import nn

pytestmark = pytest.mark.slow  # starts commands as processes of their own


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    from benchmarks import engine, networks

    def tiny():
        return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))

    monkeypatch.setattr(engine, "SAMPLE_S", 0.0)
    monkeypatch.setitem(networks.NETWORKS, "tiny", (tiny, (3, 8, 8), 2))
    return engine


def test_one_round_on_a_tiny_network_fills_the_table(engine, capsys):
    engine.main(["--rounds", "1", "--only", "tiny"])
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| tiny")]
    assert [r[1] for r in rows] == ["2", "1"]
    for r in rows:
        assert float(r[2].removesuffix(" ms")) > 0
        assert all(float(cell.split()[0]) > 0 for cell in r[3:6])
    assert float(rows[0][7].split()[0]) > 0
    assert float(rows[0][6].split()[0]) > 0


def test_a_ratio_is_that_of_the_medians(engine):
    base, slower = engine.Timing((1.0, 2.0, 3.0)), engine.Timing((2.0, 3.0, 9.0))
    assert slower.against(base) == "1.50 (1.50-3.00)"


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2", "unet"])
def test_the_networks_are_alive_and_the_same_every_time(engine, name):
    import torch

    from benchmarks import networks

    _, shape, _ = networks.NETWORKS[name]
    model, x = networks.build(name), networks.images(2, shape, 5)
    with torch.no_grad():
        out = model(x)
        assert torch.equal(out, networks.build(name)(x))
    assert 0.01 < float(out.std()) < 100
    assert float((out[0] - out[1]).abs().max()) > 0.01


@pytest.fixture
def cost(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    from benchmarks import cost, cost_published

    monkeypatch.setattr(cost, "speed", list)
    monkeypatch.setattr(cost_published, "PUBLISHED", cost_published.PUBLISHED[2:3])
    return cost


def test_the_cost_validation_takes_rows_of_one_family(cost, tmp_path, capsys):
    path = tmp_path / "one.csv"
    path.write_text("\n".join(r for r in cost.DATA.read_text().splitlines() if r.startswith(("model,", "YOLO11"))))
    cost.main(["--data", str(path), "--plot", str(tmp_path / "one.png")])
    assert "| network | 40 |" in (printed := capsys.readouterr().out) and "| XFeat, 480 x 640 | int8 |" in printed
    assert (tmp_path / "one.png").stat().st_size > 0


def test_rows_that_cannot_be_fitted_are_refused_in_one_line(cost, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cost.main(["--data", str(tmp_path / "none.csv")])
    assert ended.value.code == 2
    assert "A fit reads a CSV file of networks" in capsys.readouterr().err.splitlines()[-1]


def test_the_times_of_a_real_network_in_miniature(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    from benchmarks import real_models

    real_models.main(["--only", "tiny", "--stages", "prepare", "layers", "exact", "behind", "--rounds", "1"])
    (found,) = rows(capsys.readouterr().out, "| tiny")
    assert all(float(cell.split()[0]) > 0 for cell in found[2:])
    assert found[4].endswith("replay)")
    assert float(found[5]) < 1


@pytest.fixture
def search(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    from benchmarks import search

    return search


def test_a_planted_network_is_the_same_in_float(search):
    import torch

    from benchmarks import planted

    images = planted.pictures(16, 3).tensors[0][:32]
    torch.manual_seed(0)
    model = planted.ResNet().eval()
    changed, damaged = planted.planted_resnet(model, images, seed=3)
    with torch.no_grad():
        assert torch.allclose(changed(images), model(images), atol=1e-4)
    ratios = [changed.blocks[i].bn1.weight / model.blocks[i].bn1.weight for i in planted.BLOCKS]
    assert [sorted(r.round().tolist())[-2:] for r in ratios] == [[1.0, 200.0]] * 3
    assert damaged == ["blocks.1.conv1", "blocks.4.conv1", "blocks.7.conv1"]


def rows(text, first):
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith(first)]


def test_the_search_for_the_fewest_promotions_in_miniature(search, capsys):
    search.main(["minimal", "--small"])
    found = rows(capsys.readouterr().out, "| 0 ")
    assert [r[1] for r in found] == ["ratio", "assign"]
    for r in found:
        assert int(r[5]) >= 2
        assert float(r[6].split()[0]) > 0


def test_the_front_in_miniature(search, capsys):
    search.main(["front", "--small", "--only", "assign", "ratio", "optuna TPE", "random"])
    text = capsys.readouterr().out
    assert "32 mixes" in text
    for r in rows(text, "| front-0"):
        shares = [float(cell.split()[0]) for cell in r[2:6]]
        assert shares == sorted(shares)
        assert int(r[6]) <= 40
        if r[1] == "assign":  # it ends where no mix that is faster than all int16 is worth a trial
            assert shares[-1] > 0.95 and int(r[6]) < 32
        elif r[1] != "ratio":  # of 32 mixes 40 evaluations leave none
            assert shares[-1] == 1.0


def test_a_hypervolume_is_the_area_below_the_reference():
    from qflow.search.surrogate import hypervolume as volume

    assert volume([], (1.0, 1.0)) == 0.0
    assert volume([(0.5, 0.5), (0.75, 0.75), (0.25, 0.75)], (1.0, 1.0)) == pytest.approx(0.25 + 0.25 * 0.25)
    assert volume([(2.0, 0.0)], (1.0, 1.0)) == 0.0


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_the_stored_test_problems_hold_every_mix(search, number):
    problem = search.front_problem.EnumeratedProblem.read(search.search_front.DATA / f"front-{number}.npz")
    assert len(problem.drops) == 4096
    assert len(problem.scores) == search.front_problem.SEEDS
    assert problem.drops["8" * 12] > 0.2 > 0.011 > problem.drops["6" * 12]
    assert problem.volume(problem.drops) > problem.volume(["8" * 12, "6" * 12]) > 0


def test_what_a_trial_costs_beside_its_evaluation_in_miniature(search, capsys):
    search.main(["overhead", "--small"])
    (r,) = rows(capsys.readouterr().out, "| digits")
    assert r[1] == "2"
    assert 0 < float(r[7].split("%")[0]) < 100


def table(text):
    """The cells of a markdown table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


@pytest.fixture
def named(monkeypatch):
    import importlib

    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def test_a_device_compared_with_itself_differs_nowhere(named, capsys):
    gpu = named("gpu")
    assert gpu.main(["--device", "cpu", "--only", "operators", "qat"]) == 0
    found = table(capsys.readouterr().out)
    assert {r[1] for r in found} == {*gpu.kinds(), "digits"}
    assert {float(r[3]) for r in found} == {0.0}
    assert gpu.Row("models", "a", "ranks", 0.9, 0.95, 0.0, least=True).text().count("EXCEEDED") == 1
    assert gpu.correlation([1, 2, 3], [3, 2, 1]) == -1.0


def test_without_a_gpu_the_comparison_says_so_in_one_line(named, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU: `make gpu` compares")
    assert named("gpu").main([]) == 2
    assert capsys.readouterr().out.count("\n") == 1


def test_the_zoo_prints_a_row_for_each_model_and_fails_with_a_step(named, capsys, monkeypatch):
    from dataclasses import replace

    import torch

    zoo = named("zoo")
    assert zoo.main(["--only", "siamese"]) == 0
    ((name, operators, passed, _, still),) = table(capsys.readouterr().out)
    assert (name, passed, still) == ("siamese_tracker", "9 of 9", "") and int(operators) > 5
    from zoo_real import registry

    entry = registry.entries()["siamese_tracker"]
    model, inputs = entry.build()
    broken = replace(entry, build=lambda: (torch.compile(model, backend="eager"), inputs))  # prepare refuses it
    monkeypatch.setattr(registry, "entries", lambda: {entry.name: broken})
    assert zoo.main([]) == 1
    ((*_, failed),) = table(capsys.readouterr().out)
    assert failed.startswith("prepare: ")
    monkeypatch.setattr(registry, "entries", lambda: {"a": replace(entry, name="a", needs=("no_such_package",))})
    assert zoo.main([]) == 0
    assert "left out: a needs no_such_package" in capsys.readouterr().out


def test_the_torch_matrix_says_what_it_could_not_try(named, capsys, tmp_path):
    arguments = ["--torches", "2.6.0", "--pythons", "python3.99", "--folder", str(tmp_path)]
    assert named("torch_matrix").main(arguments) == 0
    assert table(capsys.readouterr().out) == [["2.6.0", "python3.99", "-", "not tried: no such interpreter here", "0"]]


@pytest.fixture
def repair(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent))
    from benchmarks import repair

    return repair


def test_repairs_in_miniature(repair, capsys, tmp_path):
    from qflow.repair.steps import STEPS

    repair.main(["exposure", "rnet", "--small", "--bits", "6", "--records", str(tmp_path / "records")])
    text = capsys.readouterr().out
    assert "rnet is left out: give the folder of its two wheels" in text
    drops, mixes = (r for r in table(text) if r[0] == "exposure")
    assert len(drops) >= 5 + len(STEPS) and float(drops[-1].split(",")[0]) > 2
    assert mixes[1] == "6 bits"
    (first,) = repair.read(tmp_path / "records")
    assert (first.network, first.bits, first.samples) == ("exposure", 6, 32)
    assert all(line in text for line in repair.tables([first]) if line.startswith("| exposure"))


def test_weights_at_six_bits_take_every_fourth_code(repair):
    import torch

    import qflow
    from benchmarks.repair_networks.stress import steps_at, stressed
    from qflow.repair.weights import rounding

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 3, bias=False)).eval()
    images = torch.randn(8, 1, 8, 8)
    prepared = qflow.prepare(model, images)
    stressed(prepared)
    qflow.calibrate(prepared, [images])
    quantizer, weight = prepared.weights["0"], model[0].weight.detach()
    codes = (quantizer(weight) / quantizer.scale).round()
    largest = weight.abs() == weight.abs().amax((1, 2, 3), keepdim=True)
    assert bool((codes[~largest] % 4 == 0).all()) and bool((codes[largest].abs() >= 127).all())
    with steps_at(6):
        assert rounding.grid_of.__defaults__ == (6,)
        moved = rounding.round_weights(prepared, [images])
    assert rounding.grid_of.__defaults__ == (8,)
    assert moved["0"].after <= moved["0"].before
    new = moved["0"].weight
    assert torch.allclose(quantizer(new)[~largest], new[~largest], atol=1e-6), "the grids of both are the same"


def test_a_summary_counts_what_is_lost_and_what_is_recovered(repair):
    from benchmarks.repair_networks.records import Record, Result

    def record(drop, after, int16, least):
        result = Result(after, 0.001, 0.1, 8.0)
        return Record(
            "net", "", 8, True, "accuracy", 0.9, 100, 64, drop, 0.005, 0.2,
            {"basic": result, "without training": result, "all": result}, int16, (0.0,) * 3, least, 1.0,
        )  # fmt: skip

    rows = [
        record(0.10, 0.02, (4, 2, 1), (0.05, 0.02, 0.01)),
        record(0.20, 0.01, (None, None, 0), (0.2, 0.2, 0.0)),
        record(0.01, 0.02, (0, 0, 0), (0.0, 0.0, 0.0)),
        record(-0.01, 0.001, (0, 0, 0), (0.0, 0.0, 0.0)),
    ]
    text = "\n".join(repair.summary(rows))
    assert "2 of 4 networks lose more than twice the noise" in text
    assert "- all: their drop is reduced by 88% in the median (80% to 95%)" in text
    none = "int16 operators: 2 networks need none before the repair; of the others"
    assert f"basic, {none} 0 reach the goal only after it, 1 never, the rest keeps 50% of them" in text
    assert f"all, {none} 1 reach the goal only after it, 0 never, the rest keeps 25% of them" in text
    assert "all, recovered at 1.10 x the time: median 95%, worst 90%, of 2 networks" in text
    assert "worse beyond the noise: net (basic), net (without training), net (all)" in text
