"""Pictures: what is promised is on the figure, and the file is an image that can be read."""

import math
import re
import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image
from support.synthetic import layer_row, layers, names, sensitivity

from qflow.analysis.measures.tables import LayerTable, SensitivityRow, SensitivityTable
from qflow.report.array_pictures import as_picture, badcase_grid, layer_histogram
from qflow.report.drawing import bar_color, common_prefix, shorten
from qflow.report.pictures import error_along_network, sensitivity_bars


@pytest.fixture
def path(tmp_path):
    return tmp_path / "picture.png"


def readable(path):
    with Image.open(path) as image:
        image.load()
        width, height = image.size
    return image.format == "PNG" and 600 <= width <= 3000 and 250 <= height <= 3000


def texts(figure):
    """Every text that is shown."""
    return [t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text") and a.get_visible()) if t.get_text()]


def line(axes, label):
    (found,) = [one for one in axes.lines if one.get_label() == label]
    return found


@pytest.mark.parametrize("count", [8, 77, 300])
def test_error_marks_the_start_and_names_the_worst(path, count):
    table = layers(count)
    figure = error_along_network(table, path)
    axes = figure.axes[0]
    assert readable(path) and axes.get_yscale() == "log"
    assert list(line(axes, "_start").get_xdata()) == [count // 3] * 2
    shown = texts(figure)
    assert f"error starts to grow: {table.start}" in shown
    ranked = sorted((row for row in table.rows if row.single_error), key=lambda row: -row.single_error)[:5]
    listed = [t.get_text() for t in figure.legends[1].get_texts()]
    assert [row.mod_name for row in ranked] == [text.split()[1] for text in listed]
    points = {note.get_text(): note.xy for note in axes.texts if note.get_text().isdigit()}
    assert points == {str(i): (row.index, row.single_error) for i, row in enumerate(ranked, 1)}
    assert 2 <= len([t for t in axes.get_xticklabels() if t.get_text()]) <= 40


def test_error_splits_operators_by_quantizer(path):
    table = layers(77)
    axes = error_along_network(table, path).axes[0]
    with_one = [row.index for row in table.rows if row.quantizer and row.error is not None]
    assert list(line(axes, "of an operator with a quantizer").get_xdata()) == with_one
    without = [row.index for row in table.rows if not row.quantizer and row.error is not None]
    assert list(line(axes, "of one without").get_xdata()) == without


def test_numbers_of_neighbours_do_not_overlap(path):
    rows = tuple(layer_row(i, name, 0.1, 0.1 if i > 294 else 1e-3) for i, name in enumerate(names(300)))
    axes = error_along_network(LayerTable(1, rows), path).axes[0]
    places = sorted(note.xyann[0] for note in axes.texts)
    assert np.diff(places).min() >= 5.0 and places[-1] <= 299


def test_zeros_infinities_nan_and_none_on_the_log_axis(path):
    values = [0.0, 0.01, None, math.inf, math.nan, 0.1]
    rows = tuple(layer_row(i, f"op{i}", v, v) for i, v in enumerate(values))
    figure = error_along_network(LayerTable(1, rows), path)
    axes = figure.axes[0]
    drawn = line(axes, "accumulated error")
    assert list(drawn.get_xdata()) == [0, 1, 3, 5]
    low, _, high, _ = drawn.get_ydata()
    assert axes.get_ylim()[0] < low < 0.01 and 0.1 < high < axes.get_ylim()[1]
    assert [t.get_text().split()[:2] for t in figure.legends[1].get_texts()] == [
        ["inf", "op3"],
        ["0.1", "op5"],
        ["0.01", "op1"],
    ]


@pytest.mark.parametrize("values", [[], [None, None], [0.0], [0.3]])
def test_error_of_hardly_anything(path, values):
    rows = tuple(layer_row(i, f"op{i}", v, v) for i, v in enumerate(values))
    figure = error_along_network(LayerTable(1, rows, start="not there"), path)
    assert readable(path)
    assert ("No operator has an error to show." in texts(figure)) == (not any(v is not None for v in values))


def test_names_are_not_formulas(path):
    row = layer_row(0, "a$b_{", 0.1, 0.1)
    other = layer_row(1, "c$^", 0.2, 0.2)
    error_along_network(LayerTable(1, (row, other), start="a$b_{"), path)
    sensitivity_bars(
        SensitivityTable("$x_{", "m", 1, True, (SensitivityRow("a$^b$", "weight", "c", 1.0, "qint8", 1),)), path
    )
    layer_histogram([1], [0, 1], 0.1, "qint8", -128, 127, "$^$", path)
    badcase_grid([np.zeros(3)], ["$^$"], path)


def test_bars_are_the_top_rows_in_order(path):
    table = sensitivity(77, exact=False)
    figure = sensitivity_bars(table, path, top=40)
    axes, rows = figure.axes[0], table.by_quantizer()
    assert readable(path) and len(axes.patches) == 40
    assert [bar.get_width() for bar in axes.patches] == [row.score for row in rows[:40]]
    assert [t.get_text() for t in axes.get_yticklabels()] == [row.op_name for row in rows[:40]]
    for bar, row in zip(axes.patches, rows, strict=False):
        assert to_hex(bar.get_facecolor()).lower() == bar_color(row.sensitive_type, row.exact).lower()
    rest = [row.score for row in rows[40:]]
    assert f"not shown: {len(rest)} of {len(table.rows)} rows, summing to {sum(rest):.3g}" in axes.get_xlabel()


def test_a_quantizer_is_seen_at_all_its_dtypes(path):
    """Those that int16 mends stand beside what they lose at int8, however small it is by then."""
    rows = [SensitivityRow(f"op{i}", "activation", "Conv2d", 1.0 / (i + 1), "qint8", 1) for i in range(40)]
    rows += [SensitivityRow(f"op{i}", "activation", "Conv2d", 1e-4 / (i + 1), "qint16", 1) for i in range(40)]
    figure = sensitivity_bars(SensitivityTable("L1", "m", 1, True, tuple(rows)), path, top=8)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == [f"op{i // 2}" for i in range(8)]
    assert [bar.get_width() for bar in figure.axes[0].patches][:2] == [1.0, 1e-4]


def test_bars_tell_type_dtype_estimate_and_spread(path):
    rows = (
        SensitivityRow("a", "activation", "Conv2d", 0.5, "qint8", 1, spread=0.1),
        SensitivityRow("a", "weight", "Conv2d", 0.4, "qint16", 1, exact=False),
        SensitivityRow("b", "activation", "Conv2d", 0.1, "float16", 1, spread=0.3),
    )
    figure = sensitivity_bars(SensitivityTable("L1", "mean", 2, False, rows), path)
    axes = figure.axes[0]
    assert [bar.get_hatch() or "" for bar in axes.patches] == ["", "////", "...."]
    assert len({to_hex(bar.get_facecolor()) for bar in axes.patches}) == 2
    whiskers = [c.get_segments()[0][:, 0].tolist() for c in axes.collections]
    assert whiskers == [pytest.approx([0.4, 0.6]), pytest.approx([0.0, 0.4])]
    legend = [t.get_text() for t in figure.legends[0].get_texts()]
    assert legend == [
        "activation",
        "weight",
        "qint8",
        "qint16",
        "float16",
        "lighter: estimated",
        "spread over bad cases",
    ]


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([], "The table has no rows."),
        ([0.0] * 3, "Every score is 0."),
        ([0.2], "0.2  qint8"),
        ([1.0, math.inf, math.nan], " inf"),
    ],
)
def test_bars_of_odd_scores(path, scores, said):
    rows = tuple(SensitivityRow(f"op{i}", "weight", "Conv2d", s, "qint8", 1) for i, s in enumerate(scores))
    figure = sensitivity_bars(SensitivityTable("Cosine", "mean", 2, True, rows), path)
    assert readable(path) and said in texts(figure)


@pytest.mark.parametrize(("dtype", "qmin", "qmax"), [("qint8", -128, 127), ("qint16", -32768, 32767)])
def test_histogram_says_the_true_clipped_share(path, dtype, qmin, qmax):
    scale = 3.0 / -qmin
    values = np.random.default_rng(0).normal(0.4, 2.0, 50000)
    edges = np.sort([*np.linspace(-12, 12, 501), -3.0, 3.0])
    counts = np.histogram(values, edges)[0]
    figure = layer_histogram(counts, edges, scale, dtype, qmin, qmax, "layer", path)
    axes, strip = figure.axes
    below, above = 100 * (values < -3.0).mean(), 100 * (values > 3.0).mean()
    assert axes.get_title(loc="left") == f"clipped below: {below:.3g} %"
    assert axes.get_title(loc="right") == f"clipped above: {above:.3g} %"
    ends = [one.get_xdata()[0] for one in axes.lines]
    assert ends == pytest.approx([qmin * scale, qmax * scale]) and axes.get_yscale() == "log"
    spans = {p.get_label(): p.get_extents().width for p in axes.patches if str(p.get_label()).startswith("clipped")}
    assert set(spans) == {"clipped above", "clipped below"}
    bands = strip.collections[0].get_paths()
    assert 100 <= len(bands) <= 129 and readable(path)
    assert f"a band of the grid is {'one code' if qmax == 127 else '256 codes'}" in strip.get_xlabel()


def test_a_bin_across_the_edge_counts_in_proportion(path):
    figure = layer_histogram([100.0], [0.0, 1.0], 0.5 / 128, "qint8", -128, 127, "layer", path)
    assert figure.axes[0].get_title(loc="right") == "clipped above: 50 %"


def test_values_at_the_threshold_itself_are_not_clipped(path):
    figure = layer_histogram([90, 10], [0.0, 0.99, 1.0], 1 / 128, "qint8", -128, 127, "layer", path, absolute=True)
    assert figure.axes[0].get_title(loc="right") == "clipped above: 0 %"


def test_histogram_of_absolute_values_has_one_side(path):
    figure = layer_histogram([50, 50], [0, 1, 2], 1 / 128, "qint8", -128, 127, "layer", path, absolute=True)
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "" and axes.get_title(loc="right") == "clipped above: 50 %"
    assert len(axes.lines) == 1 and figure.axes[1].get_xlabel().startswith("|float value|")


def test_far_values_do_not_hide_the_range(path):
    figure = layer_histogram([90, 0, 10], [0, 1, 9999, 1e4], 1 / 128, "qint8", -128, 127, "layer", path, absolute=True)
    axes, strip = figure.axes
    assert axes.get_xscale() == "symlog" and "logarithmic beyond the range" in strip.get_xlabel()
    assert axes.get_title(loc="right") == "clipped above: 10 %"
    place = axes.transAxes.inverted().transform(axes.transData.transform((127 / 128, 1)))[0]
    assert 0.2 < place < 0.8


def test_few_codes_for_the_bulk_are_told(path):
    figure = layer_histogram([1, 998, 1], [-100, -1, 1, 100], 1.0, "qint8", -128, 127, "layer", path)
    assert "99 % of the values lie on 3 of 256 codes" in figure.get_suptitle()


@pytest.mark.parametrize(("counts", "scale", "said"), [([0, 0], 1.0, "There are no values."), ([1, 2], 0.0, "no grid")])
def test_histogram_without_values_or_scale(path, counts, scale, said):
    figure = layer_histogram(counts, [-1, 0, 1], scale, "qint8", -128, 127, "layer", path)
    assert readable(path) and any(said in text for text in texts(figure))


def test_grid_draws_images_and_lines_and_counts_the_rest(path):
    random = np.random.default_rng(0)
    images = [
        random.random((20, 30)), random.random((20, 30, 3)), random.random((3, 20, 30)),
        random.normal(size=(6, 20, 30)), random.normal(size=40), random.normal(size=(50, 3)),
        *[random.random((8, 8))] * 14,
    ]  # fmt: skip
    figure = badcase_grid(images, [f"sample {i}" for i in range(20)], path)
    assert readable(path) and figure.get_suptitle() == "Bad cases: 16 (4 more are not shown)"
    assert [(len(a.images), len(a.lines)) for a in figure.axes[:6]] == [(1, 0)] * 4 + [(0, 1), (0, 3)]
    titles = [axes.get_title() for axes in figure.axes]
    assert len(titles) == 16 and titles[2] == "sample 2"
    assert re.fullmatch(r"sample 3\nmean of 6 channels\nvalues -\S+ to \S+", titles[3])
    assert "50 points of 3 coordinates" in titles[5]


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.full((8, 8), np.nan), "64 values are not finite"),
        (np.zeros((2, 3, 8, 8)), "first of 2"),
        (np.zeros((0, 8)), "shape (0, 8)"),
        (np.array("text"), "shape ()"),
        (np.array(3.0), "1 numbers, 3 to 3"),
        (np.zeros((8, 8), dtype=bool), "case"),
        (np.full((5, 8, 8), 7), "mean of 5 channels\nvalues 7 to 7"),
    ],
)
def test_grid_takes_any_array(path, array, said):
    assert said in badcase_grid([array], ["case"], path).axes[0].get_title() and readable(path)


def test_grid_of_nothing_and_of_unequal_lists(path):
    assert "No bad cases." in texts(badcase_grid([], [], path)) and readable(path)
    with pytest.raises(ValueError, match="one caption an image, but got 1 and 0"):
        badcase_grid([np.zeros(3)], [], path)


def test_pictures_keep_bytes_and_fit_other_ranges():
    assert as_picture(np.full((5, 5), 255, np.uint8))[0].max() == 1.0
    assert as_picture(np.full((5, 5), 102, np.uint8))[0].max() == pytest.approx(0.4)
    dark, said = as_picture(np.full((5, 5), 51, np.uint8))
    assert dark.max() == 1.0 and said == ["dark: up to 0.2, shown 5 times as bright"]
    fitted, said = as_picture(np.linspace(-2, 2, 25).reshape(5, 5))
    assert (fitted.min(), fitted.max()) == (0.0, 1.0) and said == ["values -2 to 2"]
    channels = np.stack([np.full((5, 6), v) for v in (0.1, 0.2, 0.9)])
    assert as_picture(channels)[0][0, 0].tolist() == [0.1, 0.2, 0.9]


def test_long_names_keep_their_end():
    assert shorten("backbone.layer1.conv", 10) == "…yer1.conv" and shorten("conv", 4) == "conv"
    assert common_prefix(["a.b.c", "a.b.d.e"]) == "a.b." and common_prefix(["a.b"]) == common_prefix(["a", "a.b"]) == ""


def test_no_pyplot_state(path):
    pyplot = sys.modules.get("matplotlib.pyplot")  # another test may have imported it, and left a figure open
    before = pyplot.get_fignums() if pyplot else []
    error_along_network(layers(8), path)
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert (pyplot.get_fignums() if pyplot else []) == before
