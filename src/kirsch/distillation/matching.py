"""Stages of networks, found by the output shapes of their modules, and the matching of the stages of two networks."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from kirsch import ops
from kirsch.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kirsch.frameworks.protocols import Features

    MapSize = tuple[int, int]
    Sizes = tuple[int, ...]

MIN_SIZE = 2
"""Smallest height and width of the feature map of a stage, in pixels."""

MAP, TOKENS = len("NCHW"), len("NLD")


def stages(features: Features, student: Any, teacher: Any, inputs: Any) -> list[tuple[str, str]]:
    """Return pairs of matching layers: the last feature maps of each size, or layers at the same relative depth.

    Convolutional networks have a stage for each size of their feature maps; stages of equal size are matched. The
    stages of a transformer are the elements of its longest list of layers. If student and teacher have no size in
    common, stages are matched by depth.

    Returns:
        Pairs (student layer, teacher layer), from the first to the last.

    Raises:
        UsageError: a model has no stages, or the student has more layers than the teacher.
    """
    student_stages, teacher_stages = (stages_of(features, model, inputs) for model in (student, teacher))
    student_sizes, teacher_sizes = (
        {size: path for path, size in found if size is not None} for found in (student_stages, teacher_stages)
    )
    shared = [size for size in student_sizes if size in teacher_sizes]
    if shared:
        return [(student_sizes[size], teacher_sizes[size]) for size in shared]
    # If only one model has feature maps, it has few stages and the other one many layers: the longer list is reduced.
    same_kind = bool(student_sizes) == bool(teacher_sizes)
    count = len(student_stages) if same_kind else min(len(student_stages), len(teacher_stages))
    student_paths, teacher_paths = ([path for path, _ in found] for found in (student_stages, teacher_stages))
    return list(zip(by_depth(student_paths, count), by_depth(teacher_paths, count), strict=True))


def stages_of(features: Features, model: Any, inputs: Any) -> list[tuple[str, MapSize | None]]:
    """Return path and map size of each stage of a model; see `stages_among`."""
    return stages_among(features.shapes(model, inputs), ops.first_array(inputs).shape, type(model).__name__)


def stages_among(
    shapes: Sequence[tuple[str, Sizes]], image: Sizes, model_name: str
) -> list[tuple[str, MapSize | None]]:
    """Return path and map size of each stage, from the first to the last; the size is None for layers of tokens.

    The last feature map of each size ends a stage. Three kinds of maps do not end a stage: maps inside of a block
    that changes the size, such as an expansion before a stride (unless no other map has their size); maps inside of a
    module that outputs tokens, such as a patch embedding; and maps followed by channels-last outputs of the same size.

    The stages are instead the longest list of numbered modules that output tokens if no map ends a stage, or if the
    modules that output tokens after the last stage outnumber the feature maps.

    Args:
        shapes: path and output shape of modules, in the order in which they finish.
        image: shape of the model's input.
        model_name: name of the model for error messages.

    Raises:
        UsageError: there are no stages.
    """
    # Outputs for the windows of an image, as in Swin, are left out: their axis 0 is larger than the number of samples.
    shapes = [(path, shape) for path, shape in shapes if shape[:1] == image[:1]]
    shape_of = dict(shapes)
    maps: dict[str, Sizes] = {}
    others: dict[str, Sizes] = {}  # other outputs with an axis of positions
    continued: dict[str, None] = {}  # maps that are followed by channels-last outputs of the same size
    for path, shape in shapes:
        if _is_map(path, shape, image, shape_of):
            maps[path] = shape[2:]
        elif len(shape) >= TOKENS:
            others[path] = shape
            continued |= dict.fromkeys(before for before, size in maps.items() if shape[1:-1] == size)
    inner = _within_blocks(maps)
    maps = {path: size for path, size in maps.items() if path not in continued}
    ends = _stage_ends(maps, inner)
    order = list(shape_of)
    if ends and sum(path in others for path in order[order.index(ends[-1][0]) :]) <= len(maps):
        return ends
    layers = _longest_list([(path, shape) for path, shape in shapes if len(shape) == TOKENS])
    if not layers:
        raise UsageError(
            f"{model_name} has no stages that can be found by the output shapes of its modules.",
            "A stage ends with a feature map (N, C, H, W), or is a numbered layer of tokens (N, L, D).",
            "Name the layers of student and teacher: student_layer= and teacher_layer= of the term.",
        )
    return [(path, None) for path in layers]


def _is_map(path: str, shape: Sizes, image: Sizes, shape_of: Mapping[str, Sizes]) -> bool:
    """Return whether an output is a feature map, channels first, and not inside of a module that outputs tokens."""
    if len(shape) != MAP or min(shape[2:]) < MIN_SIZE:
        return False
    if any(len(shape_of.get(parent, ())) == TOKENS for parent in _parents(path)):
        return False
    return len(image) != MAP or _distortion(shape[2:], image) <= _distortion(shape[1:3], image)  # else (N, H, W, C)


def _distortion(size: Sizes, image: Sizes) -> float:
    """Return the difference, in pixels, of a width from the width that keeps the aspect ratio of the image."""
    return abs(size[1] - size[0] * image[3] / image[2])


def _parents(path: str) -> list[str]:
    """Return the paths of the modules that contain a module, without the model itself."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _within_blocks(maps: Mapping[str, Sizes]) -> set[str]:
    """Return the maps whose size differs from the output of the block that contains them.

    A block is a module whose maps have exactly two sizes.
    """
    sizes_within: dict[str, set[Sizes]] = {}
    for path, size in maps.items():
        for parent in _parents(path):
            if parent in maps:
                sizes_within.setdefault(parent, {maps[parent]}).add(size)
    blocks = {parent for parent, sizes in sizes_within.items() if len(sizes) == len(("input", "output"))}
    return {p for p, size in maps.items() if any(a in blocks and maps[a] != size for a in _parents(p))}


def _stage_ends(maps: Mapping[str, Sizes], inner: set[str]) -> list[tuple[str, MapSize | None]]:
    """Return the last map of each size; a map within a block only if no other map has its size."""
    last: dict[Sizes, str] = {}
    for path, size in maps.items():
        if path not in inner or size not in last:
            last.pop(size, None)
            last[size] = path
    return [(path, (size[0], size[1])) for size, path in last.items()]


def _longest_list(shapes: Sequence[tuple[str, Sizes]]) -> list[str]:
    """Return the longest list of numbered modules with the same output shape.

    Lists inside of an element of another list are left out. Of two lists of equal length, the one whose names are plain
    numbers is preferred. A single module counts as a list only if its name is a plain number.
    """
    lists: dict[tuple[bool, str, Sizes], list[str]] = {}
    for path, shape in shapes:
        numbered = re.fullmatch(r"(?P<prefix>(?:.*\.)?(?P<name>[^.]*?))\d+", path)
        if numbered is not None:
            lists.setdefault((not numbered["name"], numbered["prefix"], shape), []).append(path)
    elements = {path for paths in lists.values() if len(paths) > 1 for path in paths}
    outer = [
        (plain, paths)
        for (plain, _, _), paths in lists.items()
        if (plain or len(paths) > 1) and elements.isdisjoint(_parents(paths[0]))
    ]
    return max(outer, key=lambda candidate: (len(candidate[1]), candidate[0]), default=(True, []))[1]


def by_depth(layers: Sequence[str], count: int) -> list[str]:
    """Return `count` of the layers, evenly spaced: the last layer of each of `count` equal parts.

    For the hidden states of a transformer, which begin with the embedding `hidden[0]`, the embedding is kept.

    Source: the layers that TinyBERT compares, Jiao et al. 2020, arXiv:1909.10351, section 3.1.

    Raises:
        UsageError: there are fewer than `count` layers.
    """
    if len(layers) < count:
        raise UsageError(
            f"The student has {count} layers to match, and the teacher only {len(layers)}: {', '.join(layers[:6])}.",
            fix="Name the layers of student and teacher, in pairs.",
        )
    if layers[0].endswith("hidden[0]") and count > 1:
        return [layers[round(index * (len(layers) - 1) / (count - 1))] for index in range(count)]
    return [layers[(index + 1) * len(layers) // count - 1] for index in range(count)]
