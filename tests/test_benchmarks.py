"""The benchmark runs, in miniature; its numbers are not judged here."""

from pathlib import Path

import pytest
from torch import nn


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
    from benchmarks import cost

    monkeypatch.setattr(cost, "speed", list)
    return cost


def test_the_cost_validation_takes_rows_of_one_family(cost, tmp_path, capsys):
    first, *rows = cost.DATA.read_text().splitlines()
    path = tmp_path / "one.csv"
    path.write_text("\n".join([first, *(row for row in rows if row.startswith("YOLO11"))]))
    cost.main(["--data", str(path), "--plot", str(tmp_path / "one.png")])
    assert "| network | 40 |" in capsys.readouterr().out
    assert (tmp_path / "one.png").stat().st_size > 0


def test_rows_that_cannot_be_fitted_are_refused_in_one_line(cost, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cost.main(["--data", str(tmp_path / "none.csv")])
    assert ended.value.code == 2
    assert "A fit reads a CSV file of networks" in capsys.readouterr().err.splitlines()[-1]
