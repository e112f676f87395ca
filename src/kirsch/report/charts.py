"""Charts as inline SVG, colored by the style sheet of the page."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from kirsch import figures

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH = 720
"""Width of a chart in user units."""


@dataclass(frozen=True)
class Scale:
    """Mapping from values to coordinates.

    Args:
        low, high: range of the values.
        start, end: coordinates of `low` and `high`.
        logarithmic: whether the scale is logarithmic.
        integers: whether only integers have a tick.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False
    integers: bool = False

    def __call__(self, value: float) -> float:
        """Return the coordinate of a value."""
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
        return self.start + (value - low) / ((high - low) or 1.0) * (self.end - self.start)

    @property
    def step(self) -> float:
        """Distance between the ticks of a linear scale, which has at most six ticks."""
        return max(_round_up((self.high - self.low) / 5), 1.0 if self.integers else 0.0)

    def ticks(self) -> list[float]:
        """Return the values of the ticks: round numbers within the range."""
        if self.logarithmic:
            first = math.floor(math.log10(self.low))
            last = math.ceil(math.log10(self.high))
            candidates = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
            return [tick for tick in candidates if self.low <= tick <= self.high]
        first, last = math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9)
        return [multiple * self.step for multiple in range(first, last + 1)]


def _number_labels(scale: Scale) -> list[str]:
    """Return the labels of the ticks of a linear scale, with enough decimals to distinguish them."""
    decimals = max(0, -math.floor(math.log10(scale.step) + 1e-9))
    return [figures.count(tick) if scale.step >= 1000 else f"{tick:.{decimals}f}" for tick in scale.ticks()]  # noqa: PLR2004 - thousands


def _percent_labels(scale: Scale) -> list[str]:
    """Return the labels of the ticks of a linear scale of fractions, as percent."""
    decimals = max(0, -math.floor(math.log10(100 * scale.step) + 1e-9))
    return [figures.percent(tick, decimals) for tick in scale.ticks()]


def _round_up(step: float) -> float:
    """Return the smallest number of the form 1, 2 or 5 times a power of ten that is at least `step`."""
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step)


def _element(name: str, content: str | Markup = "", **attributes: Any) -> Markup:
    """Return an SVG element; attributes and plain texts are escaped."""
    pairs = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _number(value))
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), pairs, content)  # noqa: S704 - names are constants


def _number(value: Any) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _join(parts: Sequence[Markup]) -> Markup:
    return Markup("").join(parts)


def _svg(title: str, description: str, size: tuple[float, float], parts: Sequence[Markup]) -> Markup:
    """Return a chart with an accessible title and description; `size` is (width, height)."""
    body = [_element("title", title), _element("desc", description), *parts]
    box = f"0 0 {_number(float(size[0]))} {_number(float(size[1]))}"
    return _element("svg", _join(body), viewBox=box, role="img", aria_label=title)


def trade_off(models: Sequence[dict[str, Any]]) -> Markup:
    """Plot accuracy over latency, or over file size if the latency of the chosen model was not measured.

    Each model is a point with its confidence interval. A line connects the Pareto front.
    """
    timed = all(model["latency"] for model in models if model["chosen"]) and any(m["latency"] for m in models)
    shown = [model for model in models if model["latency"] or not timed]
    costs = [model["latency"]["median_us"] if timed else model["bytes"] for model in shown]
    cost_text = figures.micros if timed else figures.bytes_
    low = min(model["accuracy"]["low"] for model in shown)
    # The factor 1.6 on both sides makes the range wide enough for at least one tick.
    x = Scale(min(costs) / 1.6, max(costs) * 1.6, 70, WIDTH - 24, logarithmic=True)
    y = Scale(max(low - 0.01, 0.0), min(1.0, max(m["accuracy"]["high"] for m in shown) + 0.005), 264, 30)
    parts = _axes(x, y, 264, [cost_text(tick) for tick in x.ticks()], _percent_labels(y), "accuracy")
    best, front = -1.0, []
    accuracies = [model["accuracy"]["value"] for model in shown]
    for cost, accuracy in sorted(zip(costs, accuracies, strict=True), key=lambda point: (point[0], -point[1])):
        if accuracy > best:
            best = accuracy
            front.append((x(cost), y(best)))
    parts.append(_element("polyline", points=_points(front), class_="front"))
    points = [(x(cost), y(accuracy)) for cost, accuracy in zip(costs, accuracies, strict=True)]
    for model, cost, label in zip(shown, costs, _label_positions(points, [m["name"] for m in shown]), strict=True):
        parts.append(_model_point(model, x(cost), y, cost_text(cost), label))
    title = "Accuracy over latency" if timed else "Accuracy over file size"
    parts.append(_element("text", "latency, one sample" if timed else "file size", x=WIDTH - 24, y=302, class_="end"))
    return _svg(title, "; ".join(_model_text(model, timed) for model in shown), (WIDTH, 310), parts)


def _points(coordinates: Sequence[tuple[float, float]]) -> str:
    """Return coordinates as the attribute `points` of a polyline."""
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in coordinates)


def _model_text(model: dict[str, Any], timed: bool) -> str:
    cost = figures.micros(model["latency"]["median_us"]) if timed else figures.bytes_(model["bytes"])
    return f"{model['name']}: {figures.percent(model['accuracy']['value'])} at {cost}"


def _label_positions(points: Sequence[tuple[float, float]], names: Sequence[str]) -> list[tuple[float, float, str]]:
    """Return a position (x, y, class) for the name of each point, if possible without covering points or names."""
    boxes = [(x - 7, y - 7, x + 7, y + 7) for x, y in points]
    labels = []
    for (point_x, point_y), name in zip(points, names, strict=True):
        width = 7.0 * min(len(name), 30) + 4
        candidates = [
            (point_x + side * 11, point_y + offset, "" if side > 0 else "end")
            for offset in (4, -12, 20, -28, 36, -44, 52)
            for side in (1, -1)
        ]
        for x, y, anchor in candidates:
            left = x if not anchor else x - width
            box = (left, y - 12, left + width, y + 3)
            free = all(box[2] < b[0] or box[0] > b[2] or box[3] < b[1] or box[1] > b[3] for b in boxes)
            if free and left > 0 and left + width < WIDTH:
                break
        boxes.append(box)
        labels.append((x, y, anchor))
    return labels


def _model_point(model: dict[str, Any], x: float, y: Scale, cost: str, label: tuple[float, float, str]) -> Markup:
    accuracy = model["accuracy"]
    tooltip = f"{model['name']}: {figures.interval(accuracy['value'], accuracy['low'], accuracy['high'])}, {cost}"
    parts = [
        _element("title", tooltip),
        _element("line", x1=x, x2=x, y1=y(accuracy["low"]), y2=y(accuracy["high"]), class_="span"),
        _element("circle", cx=x, cy=y(accuracy["value"]), r=6 if model["chosen"] else 4.5),
        _element("text", _shorten(model["name"], 30), x=label[0], y=label[1], class_=label[2]),
    ]
    return _element("g", _join(parts), class_="chosen" if model["chosen"] else "other")


def _axes(
    x: Scale, y: Scale, base: float, x_labels: Sequence[str], y_labels: Sequence[str], y_title: str = ""
) -> list[Markup]:
    """Return the axes of a chart; `base` is the y coordinate of the x axis. Overlapping x labels are left out."""
    parts = [_element("text", y_title, x=2, y=y.end - 14)] if y_title else []
    for tick, text in zip(y.ticks(), y_labels, strict=True):
        parts.append(_element("line", x1=x.start, x2=x.end, y1=y(tick), y2=y(tick), class_="grid"))
        parts.append(_element("text", text, x=x.start - 8, y=y(tick) + 4, class_="end"))
    last = -1e9
    for tick, text in zip(x.ticks(), x_labels, strict=True):
        if x(tick) - last > 7 * len(text) + 12:
            parts.append(_element("text", text, x=x(tick), y=base + 18, class_="middle"))
            last = x(tick)
    parts.append(_element("line", x1=x.start, x2=x.end, y1=base, y2=base, class_="axis"))
    return parts


def removed_bars(layers: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> Markup:
    """Draw one bar per layer, with kept units in color and removed units in gray; layers of a group are adjacent."""
    by_name = {group["name"]: group for group in groups}
    widest = max(layer["before"] for layer in layers)
    left, row = 230, 20
    parts: list[Markup] = []
    height, previous = 6.0, None
    order = {name: index for index, name in enumerate(by_name)}
    for layer in sorted(layers, key=lambda layer: order[layer["group"]]):
        if layer["group"] != previous:
            height += 8 if previous is not None else 0
            previous = layer["group"]
        group = by_name[layer["group"]]
        width = max((WIDTH - left - 90) * layer["before"] / widest, 2.0)
        kept_width = width * layer["after"] / layer["before"]
        tooltip = f"{layer['name']}: {layer['after']} of {layer['before']} kept."
        tooltip += f" Removed: {ranges(group['removed'])}; {group['reason']}." if group["removed"] else ""
        tooltip += f" Pruned together: {', '.join(group['layers'])}."
        bar = [
            _element("title", tooltip),
            _element("text", _shorten(layer["name"], 34), x=left - 10, y=height + 13, class_="end"),
            _element("rect", x=left, y=height + 3, width=width, height=row - 6, class_="gone"),
            _element("rect", x=left, y=height + 3, width=kept_width, height=row - 6, class_="kept"),
            _element("text", f"{layer['after']} / {layer['before']}", x=left + width + 8, y=height + 13),
        ]
        parts.append(_element("g", _join(bar), class_="bar"))
        height += row
    kept, total = sum(layer["after"] for layer in layers), sum(layer["before"] for layer in layers)
    return _svg("Removed units", f"{kept} of {total} output units are kept", (WIDTH, height + 4), parts)


def _shorten(name: str, most: int) -> str:
    """Return a name of at most `most` characters; a longer name loses its middle.

    The beginning of a path distinguishes repeated blocks, the end the layers within a block.
    """
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most - most // 2) :]}"


def ranges(units: Sequence[int]) -> str:
    """Return ascending integers as ranges: "0–3, 7"; "none" if there are none."""
    runs: list[list[int]] = []
    for unit in units:
        if runs and unit == runs[-1][1] + 1:
            runs[-1][1] = unit
        else:
            runs.append([unit, unit])
    return ", ".join(f"{a}–{b}" if b > a else f"{a}" for a, b in runs) or "none"


def curve(title: str, epochs: Sequence[int], values: Sequence[float | None], *, share: bool) -> Markup:
    """Plot a training curve.

    Args:
        title: title of the chart.
        epochs: ascending epochs, at least one.
        values: value of each epoch. A missing or infinite value is a gap; a value between two gaps is a dot.
        share: whether the values are fractions, shown as percent.
    """
    runs = _runs(epochs, values)
    known = [pair for run in runs for pair in run]
    low, high = min((v for _, v in known), default=0.0), max((v for _, v in known), default=1.0)
    margin = 0.02 * (high - low) or max(0.05 * abs(high), 1e-3)  # centers a constant curve
    bottom, top = (max(low - margin, 0.0), min(high + margin, 1.0)) if share else (low - margin, high + margin)
    y = Scale(bottom, top, 150, 12)
    x_margin = 0.5 if epochs[0] == epochs[-1] else 0.0  # centers a single epoch
    x = Scale(epochs[0] - x_margin, epochs[-1] + x_margin, 58, WIDTH / 2 - 14, integers=True)
    parts = _axes(x, y, 150, _number_labels(x), _percent_labels(y) if share else _number_labels(y))
    for run in runs:
        points = [(x(epoch), y(value)) for epoch, value in run]
        if len(points) > 1:
            parts.append(_element("polyline", points=_points(points), class_="line"))
        else:
            parts.append(_element("circle", cx=points[0][0], cy=points[0][1], r=3.5, class_="dot"))
    last = "no value"
    if known:
        epoch, value = known[-1]
        last = f"{figures.percent(value) if share else figures.digits(value)} after epoch {epoch}"
    return _svg(title, f"{title}: {last}", (WIDTH / 2, 178), parts)


def _runs(epochs: Sequence[int], values: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    """Return the runs of consecutive finite values, as (epoch, value)."""
    runs: list[list[tuple[int, float]]] = [[]]
    for epoch, value in zip(epochs, values, strict=True):
        if value is not None and math.isfinite(value):
            runs[-1].append((epoch, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def calibration(before: dict[str, Any], after: dict[str, Any], names: tuple[str, str]) -> Markup:
    """Draw a reliability diagram of two models: accuracy over confidence, equal on the diagonal.

    Args:
        before, after: results of `kirsch.tasks.classification.calibration`.
        names: names of the two models.
    """
    x, y = Scale(0, 1, 58, 334), Scale(0, 1, 250, 24)
    parts = _axes(x, y, 250, _percent_labels(x), _percent_labels(y), "accuracy")
    parts.append(_element("line", x1=x(0), y1=y(0), x2=x(1), y2=y(1), class_="front"))
    for result, css_class, name in ((before, "other", names[0]), (after, "chosen", names[1])):
        dots = []
        for row in result["bins"]:
            confidence, accuracy, n = row["confidence"], row["accuracy"], row["n"]
            tooltip = _element("title", f"{name}: confidence {confidence:.2f}, accuracy {accuracy:.2f}, n = {n}")
            dots.append(_element("circle", tooltip, cx=x(confidence), cy=y(accuracy), r=2.5 + 1.2 * math.log10(n + 1)))
        parts.append(_element("g", _join(dots), class_=css_class))
    parts.append(_element("text", "confidence", x=334, y=286, class_="end"))
    text = f"Calibration error {names[0]} {figures.percent(before['ece'])}, {names[1]} {figures.percent(after['ece'])}"
    return _svg("Calibration", text, (360, 292), parts)


PANELS = 36
"""Largest number of groups that the figure of a sensitivity shows: those with the largest drop."""


def sensitivity(analysis: dict[str, Any]) -> Markup:
    """Plot for each group the quality over the fraction of removed units, as small charts with one scale.

    The dotted line is the quality of the original. Values that are missing are gaps.

    Args:
        analysis: result of `Sensitivity.to_dict`, with at least one group.
    """
    original = analysis["original"]
    rows = shown_rows(analysis)
    values = [point["quality"] for row in rows for point in row["points"] if point["quality"] is not None]
    low, high = min([original, *values]), max([original, *values])
    margin = 0.05 * (high - low) or max(0.05 * abs(high), 1e-3)
    columns, width, height = 4, WIDTH / 4, 128.0
    value_text = figures.percent if analysis["percent"] else figures.digits
    parts = []
    for number, row in enumerate(rows):
        left, top = number % columns * width, number // columns * height
        x = Scale(0, 1, left + 48, left + width - 14)
        y = Scale(low - margin, high + margin, top + height - 30, top + 24)
        panel = [
            _element("text", _shorten(row["name"], 22), x=left + 48, y=top + 14),
            _element("line", x1=x.start, x2=x.end, y1=y(original), y2=y(original), class_="front"),
            _element("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"),
            *(_element("text", value_text(v), x=x.start - 6, y=y(v) + 4, class_="end") for v in _ends(low, high)),
            *(_element("text", figures.percent(v, 0), x=x(v), y=y.start + 15, class_="middle") for v in (0, 0.5, 1)),
        ]
        for run in _panel_runs(row, original):
            coordinates = [(x(fraction), y(value)) for fraction, value in run]
            panel += [_element("polyline", points=_points(coordinates), class_="line")] * (len(run) > 1)
            for (fraction, value), (at_x, at_y) in zip(run, coordinates, strict=True):
                tooltip = f"{row['name']} without {figures.percent(fraction)} of its units: {value_text(value)}"
                parts_of_dot = _element("title", tooltip)
                panel.append(_element("circle", parts_of_dot, cx=at_x, cy=at_y, r=2.5, class_="dot"))
        parts.append(_element("g", _join(panel)))
    worst = [f"{row['name']} {value_text(lowest)}" for row in rows[:3] if (lowest := _lowest(row)) is not None]
    text = f"{analysis['metric']} {value_text(original)} without removal; lowest values: {', '.join(worst) or 'none'}"
    total = height * math.ceil(len(rows) / columns)
    return _svg(f"{analysis['metric']} over the fraction of removed units", text, (WIDTH, total), parts)


def shown_rows(analysis: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the groups in the figure of a sensitivity, the lowest quality first; those without a value are last."""
    groups = [(_lowest(row), row) for row in analysis["rows"] if row["kind"] != "block"]
    return [row for _, row in sorted(groups, key=lambda pair: math.inf if pair[0] is None else pair[0])][:PANELS]


def _lowest(row: dict[str, Any]) -> float | None:
    return min((point["quality"] for point in row["points"] if point["quality"] is not None), default=None)


def _ends(low: float, high: float) -> list[float]:
    return [low, high] if high > low else [low]


def _panel_runs(row: dict[str, Any], original: float) -> list[list[tuple[float, float]]]:
    """Return the points of a group without gaps between them, as (fraction, quality), from the original on."""
    runs: list[list[tuple[float, float]]] = [[(0.0, original)]]
    for point in row["points"]:
        if point["quality"] is not None:
            runs[-1].append((point["removed"] / row["units"], point["quality"]))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]
