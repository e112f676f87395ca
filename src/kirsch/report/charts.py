"""Charts as inline SVG: pure functions from numbers to markup, in the colors of the page's style sheet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from kirsch.report import figures

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH = 720


@dataclass(frozen=True)
class Scale:
    """Numbers to places on the paper.

    Args:
        low, high: ends of the numbers.
        start, end: their places.
        logarithmic: whether equal factors are equal distances.
        whole: whether only whole numbers have a tick.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False
    whole: bool = False

    def __call__(self, value: float) -> float:
        """The place of a number."""
        low, high, at = self.low, self.high, value
        if self.logarithmic:
            low, high, at = math.log(low), math.log(high), math.log(max(value, 1e-300))
        return self.start + (at - low) / ((high - low) or 1.0) * (self.end - self.start)

    @property
    def step(self) -> float:
        """From tick to tick of a linear scale; it has two to six of them."""
        return max(_nice((self.high - self.low) / 5), 1.0 if self.whole else 0.0)

    def ticks(self) -> list[float]:
        """Round numbers between the ends."""
        if self.logarithmic:
            first = math.floor(math.log10(self.low))
            last = math.ceil(math.log10(self.high))
            every = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
            return [t for t in every if self.low <= t <= self.high]
        first, last = math.ceil(self.low / self.step - 1e-9), math.floor(self.high / self.step + 1e-9)
        return [place * self.step for place in range(first, last + 1)]


def _fixed(scale: Scale) -> list[str]:
    """The ticks of a linear scale with the decimals that tell them apart."""
    places = max(0, -math.floor(math.log10(scale.step) + 1e-9))
    return [figures.count(tick) if scale.step >= 1000 else f"{tick:.{places}f}" for tick in scale.ticks()]  # noqa: PLR2004 - thousands


def _percents(scale: Scale) -> list[str]:
    """The same for shares, as percent."""
    places = max(0, -math.floor(math.log10(100 * scale.step) + 1e-9))
    return [figures.percent(tick, places) for tick in scale.ticks()]


def _nice(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step)


def _element(name: str, content: str | Markup = "", **attributes: Any) -> Markup:
    """One SVG element; every attribute and every plain text is escaped."""
    pairs = Markup("").join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), _number(value))
        for key, value in attributes.items()
    )
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), pairs, content)  # noqa: S704 - names are our own constants


def _number(value: Any) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _join(parts: Sequence[Markup]) -> Markup:
    return Markup("").join(parts)


def _picture(title: str, description: str, height: float, parts: Sequence[Markup]) -> Markup:
    body = [_element("title", title), _element("desc", description), *parts]
    box = f"0 0 {WIDTH} {_number(float(height))}"
    return _element("svg", _join(body), viewBox=box, role="img", aria_label=title)


def trade_off(models: Sequence[dict[str, Any]]) -> Markup:
    """Quality against latency (file size where latency was not measured), each model a point with its interval."""
    timed = all(model["latency"] for model in models if model["chosen"]) and any(m["latency"] for m in models)
    shown = [model for model in models if model["latency"] or not timed]
    cost = [model["latency"]["median_us"] if timed else model["bytes"] for model in shown]
    name = figures.micros if timed else figures.bytes_
    low = min(model["accuracy"]["low"] for model in shown)
    x = Scale(
        min(cost) / 1.6, max(cost) * 1.6, 70, WIDTH - 24, logarithmic=True
    )  # at least one of 1, 2, 5 lies between
    y = Scale(max(low - 0.01, 0.0), min(1.0, max(m["accuracy"]["high"] for m in shown) + 0.005), 264, 30)
    parts = _axes(x, y, 264, [name(t) for t in x.ticks()], _percents(y), "accuracy")
    best, front = -1.0, []
    for place in sorted(range(len(shown)), key=lambda place: (cost[place], -shown[place]["accuracy"]["value"])):
        if shown[place]["accuracy"]["value"] > best:
            best = shown[place]["accuracy"]["value"]
            front.append((x(cost[place]), y(best)))
    corners = " ".join(f"{a:.1f},{b:.1f}" for a, b in front)
    parts.append(_element("polyline", points=corners, class_="front"))
    places = [(x(at), y(model["accuracy"]["value"])) for model, at in zip(shown, cost, strict=True)]
    for model, at, label in zip(shown, cost, _labels(places, [m["name"] for m in shown]), strict=True):
        parts.append(_point(model, x(at), y, name(at), label))
    caption = "Accuracy against latency" if timed else "Accuracy against file size"
    parts.append(_element("text", "latency, one sample" if timed else "file size", x=WIDTH - 24, y=302, class_="end"))
    return _picture(caption, "; ".join(_said(model, timed) for model in shown), 310, parts)


def _said(model: dict[str, Any], timed: bool) -> str:
    cost = figures.micros(model["latency"]["median_us"]) if timed else figures.bytes_(model["bytes"])
    return f"{model['name']}: {figures.percent(model['accuracy']['value'])} at {cost}"


def _labels(points: Sequence[tuple[float, float]], names: Sequence[str]) -> list[tuple[float, float, str]]:
    """A place for each name beside its point (x, y, side) that covers no other point and no other name."""
    boxes = [(at - 7, here - 7, at + 7, here + 7) for at, here in points]
    out = []
    for (at, here), name in zip(points, names, strict=True):
        wide = 7.0 * min(len(name), 30) + 4
        tries = [
            (at + side * 11, here + rise, "" if side > 0 else "end")
            for rise in (4, -12, 20, -28, 36, -44, 52)
            for side in (1, -1)
        ]
        for x, y, anchor in tries:
            left = x if not anchor else x - wide
            box = (left, y - 12, left + wide, y + 3)
            free = all(box[2] < b[0] or box[0] > b[2] or box[3] < b[1] or box[1] > b[3] for b in boxes)
            if free and left > 0 and left + wide < WIDTH:
                break
        boxes.append(box)
        out.append((x, y, anchor))
    return out


def _point(model: dict[str, Any], at: float, y: Scale, cost: str, label: tuple[float, float, str]) -> Markup:
    quality = model["accuracy"]
    here = y(quality["value"])
    mark = "chosen" if model["chosen"] else "other"
    tip = f"{model['name']}: {figures.interval(quality['value'], quality['low'], quality['high'])}, {cost}"
    return _element(
        "g",
        _join(
            [
                _element("title", tip),
                _element("line", x1=at, x2=at, y1=y(quality["low"]), y2=y(quality["high"]), class_="span"),
                _element("circle", cx=at, cy=here, r=6 if model["chosen"] else 4.5),
                _element("text", _short(model["name"], 30), x=label[0], y=label[1], class_=label[2]),
            ]
        ),
        class_=mark,
    )


def _axes(
    x: Scale, y: Scale, base: float, below: Sequence[str], beside: Sequence[str], upwards: str = ""
) -> list[Markup]:
    parts = [_element("text", upwards, x=x.start - 8, y=y.end - 14, class_="end")] if upwards else []
    for tick, text in zip(y.ticks(), beside, strict=True):
        parts.append(_element("line", x1=x.start, x2=x.end, y1=y(tick), y2=y(tick), class_="grid"))
        parts.append(_element("text", text, x=x.start - 8, y=y(tick) + 4, class_="end"))
    last = -1e9
    for tick, text in zip(x.ticks(), below, strict=True):
        if x(tick) - last > 7 * len(text) + 12:
            parts.append(_element("text", text, x=x(tick), y=base + 18, class_="middle"))
            last = x(tick)
    parts.append(_element("line", x1=x.start, x2=x.end, y1=base, y2=base, class_="axis"))
    return parts


def removed_bars(layers: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]) -> Markup:
    """A bar a layer: what is kept in color, what was removed in gray, grouped as the cuts belong together."""
    by_name = {group["name"]: group for group in groups}
    widest = max(layer["before"] for layer in layers)
    left, row = 230, 20
    parts: list[Markup] = []
    height, previous = 6.0, None
    order = {name: place for place, name in enumerate(by_name)}
    for layer in sorted(layers, key=lambda layer: order[layer["group"]]):
        if layer["group"] != previous:
            height += 8 if previous is not None else 0
            previous = layer["group"]
        group = by_name[layer["group"]]
        whole = max((WIDTH - left - 90) * layer["before"] / widest, 2.0)
        kept = whole * layer["after"] / layer["before"]
        tip = f"{layer['name']}: {layer['after']} of {layer['before']} kept."
        tip += f" Removed: {ranges(group['removed'])}; {group['reason']}." if group["removed"] else ""
        tip += f" These go along: {', '.join(group['layers'])}."
        texts = [
            _element("title", tip),
            _element("text", _short(layer["name"], 34), x=left - 10, y=height + 13, class_="end"),
            _element("rect", x=left, y=height + 3, width=whole, height=row - 6, class_="gone"),
            _element("rect", x=left, y=height + 3, width=kept, height=row - 6, class_="kept"),
            _element("text", f"{layer['after']} / {layer['before']}", x=left + whole + 8, y=height + 13),
        ]
        parts.append(_element("g", _join(texts), class_="bar"))
        height += row
    kept_all, all_ = sum(layer["after"] for layer in layers), sum(layer["before"] for layer in layers)
    return _picture(
        "What was removed", f"{kept_all} of {all_} output units are kept, layer by layer", height + 4, parts
    )


def _short(name: str, most: int) -> str:
    """A name without its middle: its beginning tells repeated blocks apart, its end the layers within one."""
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-(most - most // 2) :]}"


def ranges(units: Sequence[int]) -> str:
    """Ascending numbers as ranges: "0–3, 7"."""
    runs: list[list[int]] = []
    for unit in units:
        if runs and unit == runs[-1][1] + 1:
            runs[-1][1] = unit
        else:
            runs.append([unit, unit])
    return ", ".join(f"{a}–{b}" if b > a else f"{a}" for a, b in runs) or "none"


def curve(title: str, epochs: Sequence[int], values: Sequence[float | None], *, share: bool) -> Markup:
    """One training curve; values that are missing leave a gap, and one that stands alone is a dot."""
    known = [pair for run in _runs(epochs, values) for pair in run]
    low, high = min((v for _, v in known), default=0.0), max((v for _, v in known), default=1.0)
    room = 0.02 * (high - low) or max(0.05 * abs(high), 1e-3)  # a constant lies in the middle
    bottom, top = (max(low - room, 0.0), min(high + room, 1.0)) if share else (low - room, high + room)
    y = Scale(bottom, top, 150, 12)
    alone = 0.5 if epochs[0] == epochs[-1] else 0.0  # in the middle
    x = Scale(epochs[0] - alone, epochs[-1] + alone, 58, WIDTH / 2 - 14, whole=True)
    parts = _axes(x, y, 150, _fixed(x), _percents(y) if share else _fixed(y))
    for run in _runs(epochs, values):
        places = [(x(e), y(v)) for e, v in run]
        if len(places) > 1:
            parts.append(_element("polyline", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in places), class_="line"))
        else:
            parts.append(_element("circle", cx=places[0][0], cy=places[0][1], r=3.5, class_="dot"))
    last = "no value"
    if known:
        epoch, value = known[-1]
        last = f"{figures.percent(value) if share else figures.digits(value)} after epoch {epoch}"
    body = [_element("title", title), _element("desc", f"{title}: {last}"), *parts]
    return _element("svg", _join(body), viewBox=f"0 0 {WIDTH // 2} 178", role="img", aria_label=title)


def _runs(epochs: Sequence[int], values: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    """The values that are known, each stretch without a gap for itself."""
    runs: list[list[tuple[int, float]]] = [[]]
    for epoch, value in zip(epochs, values, strict=True):
        if value is not None and math.isfinite(value):
            runs[-1].append((epoch, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def calibration(before: dict[str, Any], after: dict[str, Any], names: tuple[str, str]) -> Markup:
    """How often a classifier is right against how sure it is; on the diagonal both agree."""
    x, y = Scale(0, 1, 58, 334), Scale(0, 1, 250, 24)
    parts = _axes(x, y, 250, _percents(x), _percents(y), "right")
    parts.append(_element("line", x1=x(0), y1=y(0), x2=x(1), y2=y(1), class_="front"))
    for found, mark, name in ((before, "other", names[0]), (after, "chosen", names[1])):
        dots = [
            _element(
                "circle",
                _element("title", f"{name}: sure {b['confidence']:.2f}, right {b['accuracy']:.2f}, n = {b['n']}"),
                cx=x(b["confidence"]),
                cy=y(b["accuracy"]),
                r=2.5 + 1.2 * math.log10(b["n"] + 1),
            )
            for b in found["bins"]
        ]
        parts.append(_element("g", _join(dots), class_=mark))
    parts.append(_element("text", "sure", x=334, y=286, class_="end"))
    text = f"Calibration error {names[0]} {figures.percent(before['ece'])}, {names[1]} {figures.percent(after['ece'])}"
    body = [_element("title", "Calibration"), _element("desc", text), *parts]
    return _element("svg", _join(body), viewBox="0 0 360 292", role="img", aria_label="Calibration")
