"""Stages of networks, found by the shapes of what their modules put out, and which of two networks stand together."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from kirsch import ops
from kirsch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kirsch.frameworks.protocols import Features

    Size = tuple[int, int]
    Shape = tuple[int, ...]

LEAST_SIZE = 2
"""Pixels a side below which a map is no stage."""

MAP, TOKENS = len("NCHW"), len("NLD")


def stages(features: Features, student: Any, teacher: Any, inputs: Any) -> list[tuple[str, str]]:
    """Places of two models that stand for each other: the last maps of each size, or layers of the same depth.

    Convolutional networks have a stage for each size of their maps, and are matched by those sizes that both have. A
    model of tokens has the elements of its longest list of layers. Where no size is shared, depth decides.

    Raises:
        UsageError: a model has no stages, or the student more layers than the teacher.
    """
    mine, theirs = (stages_of(features, model, inputs) for model in (student, teacher))
    sizes = [{size: path for path, size in found if size is not None} for found in (mine, theirs)]
    both = [size for size in sizes[0] if size in sizes[1]]
    if both:
        return [(sizes[0][size], sizes[1][size]) for size in both]
    paths = [[path for path, _ in found] for found in (mine, theirs)]
    alike = bool(sizes[0]) == bool(sizes[1])
    count = len(mine) if alike else min(len(mine), len(theirs))  # stages of maps and layers of tokens are few and many
    return list(zip(by_depth(paths[0], count), by_depth(paths[1], count), strict=True))


def stages_of(features: Features, model: Any, inputs: Any) -> list[tuple[str, Size | None]]:
    """Path and map size of each stage of a model; see `stages_among`."""
    return stages_among(features.shapes(model, inputs), ops.first_array(inputs).shape, type(model).__name__)


def stages_among(shapes: Sequence[tuple[str, Shape]], image: Shape, called: str) -> list[tuple[str, Size | None]]:
    """Path and map size of each stage, from the first to the last; None for layers of tokens.

    The last map of a size ends a stage. What is computed within a block that changes the size, as an expansion before
    a stride, or within what puts out tokens, as an embedding of patches, ends none. A network whose maps are followed
    by more that is none has layers instead: the longest list of numbered modules that put out tokens.

    Args:
        shapes: path and output shape of modules, in the order in which they end.
        image: shape of what the model is given.
        called: the model, for errors.

    Raises:
        UsageError: there are no stages.
    """
    shapes = [(path, shape) for path, shape in shapes if shape[:1] == image[:1]]  # windows of samples are no samples
    shape_of = dict(shapes)
    maps: dict[str, Shape] = {}
    others: dict[str, Shape] = {}  # what else has positions
    overtaken: dict[str, None] = {}  # maps after which what has its channels last goes on at their size
    for path, shape in shapes:
        if _is_map(path, shape, image, shape_of):
            maps[path] = shape[2:]
        elif len(shape) >= TOKENS:
            others[path] = shape
            overtaken |= dict.fromkeys(before for before, size in maps.items() if shape[1:-1] == size)
    inner = _within_blocks(maps)
    maps = {path: size for path, size in maps.items() if path not in overtaken}
    ends = _ends(maps, inner)
    order = list(shape_of)
    if ends and sum(path in others for path in order[order.index(ends[-1][0]) :]) <= len(maps):
        return ends
    layers = _longest([(path, shape) for path, shape in shapes if len(shape) == TOKENS])
    if not layers:
        raise UsageError(
            f"{called} has no stages that are found by the shapes of what its modules put out.",
            "Maps (N, C, H, W) up to the end of the network are, and numbered layers of tokens (N, L, D).",
            "Name the places of student and teacher yourself.",
        )
    return [(path, None) for path in layers]


def _is_map(path: str, shape: Shape, image: Shape, shape_of: Mapping[str, Shape]) -> bool:
    """Whether this is a map with its channels first, outside of what puts out tokens."""
    if len(shape) != MAP or min(shape[2:]) < LEAST_SIZE:
        return False
    if any(len(shape_of.get(around, ())) == TOKENS for around in _around(path)):
        return False
    return len(image) != MAP or _stretch(shape[2:], image) <= _stretch(shape[1:3], image)  # else it is (N, H, W, C)


def _stretch(size: Shape, image: Shape) -> float:
    """By how many pixels the width of a map is another than its height would have it in the image."""
    return abs(size[1] - size[0] * image[3] / image[2])


def _around(path: str) -> list[str]:
    """The modules that a module is in, without the model itself."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _within_blocks(maps: Mapping[str, Shape]) -> set[str]:
    """The maps that lie within a module that has one size alone beside the other one that it puts out."""
    within: dict[str, set[Shape]] = {}
    for path, size in maps.items():
        for around in _around(path):
            if around in maps:
                within.setdefault(around, {maps[around]}).add(size)
    blocks = {around for around, sizes in within.items() if len(sizes) == 2}  # noqa: PLR2004 - one before, one behind
    return {p for p, size in maps.items() if any(a in blocks and maps[a] != size for a in _around(p))}


def _ends(maps: Mapping[str, Shape], inner: set[str]) -> list[tuple[str, Size | None]]:
    """The last map of each size; one within a block only where no other has its size."""
    last: dict[Shape, str] = {}
    for path, size in maps.items():
        if path not in inner or size not in last:
            last.pop(size, None)
            last[size] = path
    return [(path, (size[0], size[1])) for size, path in last.items()]


def _longest(shapes: Sequence[tuple[str, Shape]]) -> list[str]:
    """The longest list of numbered modules of one shape that is in no element of another.

    Of two as long, the one whose names are numbers. One alone is a list only if it has such a name.
    """
    lists: dict[tuple[bool, str, Shape], list[str]] = {}
    for path, shape in shapes:
        found = re.fullmatch(r"(?P<within>(?:.*\.)?(?P<name>[^.]*?))\d+", path)
        if found is not None:
            lists.setdefault((not found["name"], found["within"], shape), []).append(path)
    elements = {path for paths in lists.values() if len(paths) > 1 for path in paths}
    outer = [
        (plain, paths)
        for (plain, _, _), paths in lists.items()
        if (plain or len(paths) > 1) and elements.isdisjoint(_around(paths[0]))
    ]
    return max(outer, key=lambda one: (len(one[1]), one[0]), default=(True, []))[1]


def by_depth(places: Sequence[str], count: int) -> list[str]:
    """So many of the places, evenly by depth: the last of each part. States that begin with the embedding keep it.

    Source: the layers that TinyBERT compares, Jiao et al. 2020, arXiv:1909.10351, section 3.1.

    Raises:
        UsageError: there are fewer places than wanted.
    """
    if len(places) < count:
        raise UsageError(
            f"The student has {count} places, the teacher {len(places)} for them: {', '.join(places[:6])}.",
            fix="Name the places of both, one for each.",
        )
    if places[0].endswith("hidden[0]") and count > 1:
        return [places[round(place * (len(places) - 1) / (count - 1))] for place in range(count)]
    return [places[(place + 1) * len(places) // count - 1] for place in range(count)]
