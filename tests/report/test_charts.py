"""Charts: coordinates, labels and texts of the drawn values."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kirsch.report import charts
from kirsch.report.charts import WIDTH, Scale


def numbers(pattern, svg):
    """Return the groups of each match of the pattern as numbers."""
    return [tuple(float(group) for group in groups) for groups in re.findall(pattern, str(svg))]


def points_of(svg):
    """Return the points of each polyline."""
    return [
        [tuple(float(part) for part in pair.split(",")) for pair in line.split()]
        for line in re.findall(r'<polyline points="([^"]*)"', str(svg))
    ]


def texts_of(svg):
    return re.findall(r"<text[^>]*>([^<]*)</text>", str(svg))


def test_a_scale_maps_its_ends_and_its_middle():
    linear, logarithmic = Scale(2, 4, 100, 50), Scale(1, 100, 0, 10, logarithmic=True)
    assert [linear(value) for value in (2, 3, 4)] == [100, 75, 50]
    assert [logarithmic(value) for value in (1, 10, 100)] == pytest.approx([0, 5, 10])
    assert Scale(3, 3, 7, 9)(3) == 7


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(0, 1, 0, 1), [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (Scale(0, 4, 0, 1), [0, 1, 2, 3, 4]),
        (Scale(0.93, 0.99, 0, 1), [0.94, 0.96, 0.98]),
        (Scale(1, 3, 0, 1), [1, 1.5, 2, 2.5, 3]),
        (Scale(1, 3, 0, 1, integers=True), [1, 2, 3]),
        (Scale(1, 300, 0, 1, integers=True), [100, 200, 300]),
        (Scale(30, 700, 0, 1, logarithmic=True), [50, 100, 200, 500]),
    ],
)
def test_ticks_are_round_numbers_within_the_range(scale, ticks):
    assert scale.ticks() == pytest.approx(ticks)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_a_linear_scale_has_two_to_six_ticks_within_its_range(low, width):
    scale = Scale(low, low + width, 0, 1)
    assert 2 <= len(scale.ticks()) <= 6
    slack = 1e-6 * width + 1e-9 * abs(low)  # a tick at an end may differ by rounding
    assert all(low - slack <= tick <= low + width + slack for tick in scale.ticks())


LAYERS = [
    {"name": "a", "group": "g2", "before": 40, "after": 10},
    {"name": "b", "group": "g1", "before": 80, "after": 80},
    {"name": "c", "group": "g2", "before": 80, "after": 20},
]
GROUPS = [
    {"name": "g1", "removed": [], "reason": "kept", "layers": ["b", "b.norm"]},
    {"name": "g2", "removed": [0, 1, 2, 9], "reason": "smallest weights", "layers": ["a", "c"]},
]


def test_the_length_of_a_bar_shows_the_width_of_the_layer_and_its_colored_part_shows_the_kept_units():
    svg = charts.removed_bars(LAYERS, GROUPS)
    bars = numbers(r'<rect x="230" y="([\d.]+)" width="([\d.]+)" height="14" class="(?:gone|kept)"', svg)
    (y_b, width_b), (_, kept_b), (y_a, width_a), (_, kept_a), (y_c, width_c), (_, kept_c) = bars
    assert width_b == width_c == kept_b == 2 * width_a == WIDTH - 230 - 90
    assert (kept_a / width_a, kept_c / width_c) == (0.25, 0.25)
    assert y_c - y_a == 20  # layers of one group are adjacent
    assert y_a - y_b == 28  # with a gap between groups
    assert [text for text in texts_of(svg) if "/" in text] == ["80 / 80", "10 / 40", "20 / 80"]


def test_the_tooltip_of_a_bar_has_the_removed_units_the_reason_and_the_layers_of_the_group():
    tooltips = re.findall(r"<title>([^<]*)</title>", str(charts.removed_bars(LAYERS, GROUPS)))[1:]
    assert tooltips == [
        "b: 80 of 80 kept. Pruned together: b, b.norm.",
        "a: 10 of 40 kept. Removed: 0–2, 9; smallest weights. Pruned together: a, c.",
        "c: 20 of 80 kept. Removed: 0–2, 9; smallest weights. Pruned together: a, c.",
    ]


@pytest.mark.parametrize(
    ("units", "text"),
    [([], "none"), ([5], "5"), ([0, 1, 2, 3, 7], "0–3, 7"), ([1, 3, 5, 6], "1, 3, 5–6"), (range(1000), "0–999")],
)
def test_ranges_join_consecutive_units(units, text):
    assert charts.ranges(units) == text


@given(st.sets(st.integers(0, 60)))
def test_ranges_contain_exactly_the_units(units):
    contained = set()
    for part in charts.ranges(sorted(units)).replace("none", "").split(", "):
        first, _, last = part.partition("–")
        contained |= set(range(int(first), int(last or first) + 1)) if part else set()
    assert contained == units


def test_a_curve_passes_through_its_values_and_has_a_tick_per_epoch():
    svg = charts.curve("loss", [1, 2, 3], [4.0, 2.0, 1.0], share=False)
    (line,) = points_of(svg)
    assert [x for x, _ in line] == [58, 202, 346]
    (_, top), (_, middle), (_, bottom) = line
    assert (bottom - middle) / (bottom - top) == pytest.approx(1 / 3, abs=0.01)  # coordinates have one decimal
    assert texts_of(svg)[-3:] == ["1", "2", "3"]
    assert "<desc>loss: 1.00 after epoch 3</desc>" in svg


def test_missing_values_are_gaps_and_a_value_between_gaps_is_a_dot():
    values = [0.5, 0.6, None, 0.7, math.nan, 0.8, 0.9, None]
    svg = charts.curve("accuracy", list(range(1, 9)), values, share=True)
    assert [len(line) for line in points_of(svg)] == [2, 2]
    (dot,) = numbers(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="3.5"', svg)
    assert dot[0] == pytest.approx(58 + 288 * 3 / 7, abs=0.05)
    assert "accuracy: 90.0 % after epoch 7" in svg


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_single_epoch_is_a_centered_dot(value, share):
    svg = charts.curve("x", [4], [value], share=share)
    ((x, y),) = numbers(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="3.5"', svg)
    assert x == 202
    assert 12 <= y <= 150
    assert texts_of(svg)[-1] == "4"
    assert points_of(svg) == []


def test_the_description_of_a_curve_without_values_says_no_value():
    svg = charts.curve("x", [1, 2], [None, math.nan], share=False)
    assert "<desc>x: no value</desc>" in svg
    assert points_of(svg) == []
    assert "nan" not in svg


@pytest.mark.parametrize(
    ("values", "share", "labels"),
    [
        ([0.98, 0.9812], True, ["98.00 %", "98.05 %", "98.10 %"]),
        ([0.9, 1.0], True, ["90 %", "95 %", "100 %"]),
        ([1.0, 1.0], True, ["96 %", "98 %", "100 %"]),
        ([1.0, 1.04], False, ["1.00", "1.01", "1.02", "1.03", "1.04"]),
        ([0.0, 20_000], False, ["0", "5.00 k", "10.0 k", "15.0 k", "20.0 k"]),
    ],
)
def test_tick_labels_of_a_curve_are_distinct_and_at_most_100_percent(values, share, labels):
    assert texts_of(charts.curve("x", [1, 2], values, share=share))[:-2] == labels


@given(st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=30))
def test_a_curve_stays_within_its_axes(values):
    svg = charts.curve("x", list(range(1, len(values) + 1)), values, share=True)
    dots = numbers(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
    points = [point for line in points_of(svg) for point in line] + dots
    assert len(points) == sum(value is not None for value in values)
    assert all(58 <= x <= 346 and 12 <= y <= 150 for x, y in points)
    labels = [text for text in texts_of(svg) if "%" in text]
    assert len(set(labels)) == len(labels) >= 1


def model(name, value, cost, *, chosen=False, timed=True):
    return {
        "name": name,
        "bytes": cost,
        "accuracy": {"value": value, "low": value - 0.02, "high": value + 0.01},
        "latency": {"median_us": cost} if timed else None,
        "chosen": chosen,
    }


def test_the_pareto_front_connects_the_models_that_no_other_model_beats_in_accuracy_and_cost():
    models = [
        model("big", 0.95, 100),
        model("dominated", 0.90, 50),
        model("as fast and worse", 0.85, 40),
        model("good", 0.92, 40),
        model("small", 0.80, 10, chosen=True),
        model("equal and slower", 0.92, 60),
    ]
    svg = charts.trade_off(models)
    circles = numbers(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert points_of(svg) == [[circles[4], circles[3], circles[0]]]
    assert "small: 80.0 % at 10.0 µs" in svg


def test_each_model_is_a_point_with_its_interval_and_the_chosen_model_is_marked():
    svg = str(charts.trade_off([model("a", 0.9, 100), model("b", 0.8, 10, chosen=True)]))
    lines = numbers(r'<line x1="([\d.]+)" x2="([\d.]+)" y1="([\d.]+)" y2="([\d.]+)" class="span"', svg)
    circles = numbers(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)"', svg)
    for (x1, x2, low, high), (x, y, _) in zip(lines, circles, strict=True):
        assert x1 == x2 == x
        assert (low - y) / (y - high) == pytest.approx(2, abs=0.02)  # 0.02 below, 0.01 above; one decimal
    assert circles[1][2] > circles[0][2]
    assert svg.count('<g class="chosen">') == 1
    assert "<title>b: 80.0 % ± 1.5, 10.0 µs</title>" in svg


def test_models_without_a_latency_are_left_out_of_the_latency_chart():
    svg = charts.trade_off(
        [model("a", 0.9, 100), model("untimed", 0.1, 7, timed=False), model("b", 0.8, 10, chosen=True)]
    )
    assert "untimed" not in svg
    assert "Accuracy over latency" in svg


@pytest.mark.parametrize("timed", [(False, False), (True, False)])
def test_the_chart_shows_file_sizes_if_the_chosen_model_has_no_latency(timed):
    svg = charts.trade_off([model("a", 0.9, 5000, timed=timed[0]), model("b", 0.8, 1000, chosen=True, timed=timed[1])])
    assert "Accuracy over file size" in svg
    assert "a: 90.0 % at 5.00 kB; b: 80.0 % at 1.00 kB" in svg


@given(st.floats(0.01, 1e9), st.floats(0, 1))
def test_a_single_model_is_within_the_axes_and_the_axes_have_ticks(cost, value):
    single = model("a", value, cost, chosen=True) | {"accuracy": {"value": value, "low": value, "high": value}}
    svg = charts.trade_off([single])
    ((x, y),) = numbers(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
    assert 70 < x < WIDTH - 24
    assert 30 <= y <= 264
    assert any(text.endswith("s") and text[0].isdigit() for text in texts_of(svg))
    assert any(text.endswith("%") for text in texts_of(svg))


@given(st.lists(st.tuples(st.floats(80, 600), st.floats(60, 240)), min_size=1, max_size=4, unique=True))
def test_up_to_four_names_cover_neither_points_nor_each_other(points):
    names = [f"model {number}" for number in range(len(points))]
    boxes = []
    for x, y, anchor in charts._label_positions(points, names):
        width = 7.0 * 7 + 4  # a name has 7 characters, each at most 7 pixels wide
        left = x - width if anchor == "end" else x
        boxes.append((left, y - 12, left + width, y + 3))
    dots = [(x - 7, y - 7, x + 7, y + 7) for x, y in points]
    for index, box in enumerate(boxes):
        assert 0 < box[0] < box[2] < WIDTH
        for other in (*dots, *boxes[:index]):
            assert box[2] < other[0] or box[0] > other[2] or box[3] < other[1] or box[1] > other[3]


def test_the_reliability_diagram_has_a_dot_per_bin_at_its_confidence_and_accuracy():
    before = {
        "ece": 0.1,
        "bins": [{"confidence": 1.0, "accuracy": 0.0, "n": 9}, {"confidence": 0, "accuracy": 1, "n": 99}],
    }
    after = {"ece": 0.05, "bins": [{"confidence": 0.5, "accuracy": 0.25, "n": 9}]}
    svg = str(charts.calibration(before, after, ("old", "new")))
    assert numbers(r'cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)"', svg) == [
        (334, 250, 3.7),
        (58, 24, 4.9),
        (196, 193.5, 3.7),
    ]
    assert "Calibration error old 10.0 %, new 5.0 %" in svg
    assert "new: confidence 0.50, accuracy 0.25, n = 9" in svg


def test_texts_and_attributes_of_a_chart_are_escaped():
    hostile = "<script>\"&'</script>"
    svg = str(charts.curve(hostile, [1], [1.0], share=False))
    svg += str(charts.removed_bars([LAYERS[0] | {"name": hostile}], [GROUPS[1] | {"reason": hostile}]))
    svg += str(charts.trade_off([model(hostile, 0.5, 5, chosen=True)]))
    svg += str(charts.calibration({"ece": 0, "bins": []}, {"ece": 0, "bins": []}, (hostile, hostile)))
    assert "<script" not in svg
    assert svg.count("&lt;script&gt;&#34;&amp;&#39;&lt;/script&gt;") >= 6


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("encoder.layers.0.attention.output", "encoder.layers.0.attention.output"),
        ("model.layers.12.self_attention.output_projection", "model.layers.12.…output_projection"),
    ],
)
def test_a_long_name_loses_its_middle_and_is_complete_in_the_tooltip(name, short):
    svg = str(charts.removed_bars([LAYERS[0] | {"name": name}], GROUPS))
    assert len(short) <= 34
    assert texts_of(svg)[0] == short
    assert f"<title>{name}: 10 of 40 kept." in svg
