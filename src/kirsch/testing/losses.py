"""What any distillation loss must pass. Each check takes the loss and asserts one statement.

```python
@pytest.mark.parametrize("check", LOSS_CHECKS, ids=lambda check: check.__name__)
def test_my_loss(check):
    check(my_loss)
```

The arrays that a check makes are of the kind that the loss says it takes. A plain function takes scores.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.distillation.arrays import first_array, map_arrays, namespace
from kirsch.distillation.losses.loss import TOKEN_KINDS, loss_options, step_arguments
from kirsch.errors import ShapeError
from kirsch.frameworks.port import pytorch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kirsch.distillation.losses import Loss

TEMPERATURES = (1.0, 4.0)
"""With which a loss is called that has a temperature."""

SHAPES: dict[str, Any] = {
    "scores": (5, 7),
    "values": (5, 3),
    "pixels": (2, 3, 4, 3),
    "maps": (3, 4, 4, 3),
    "features": (4, 6),
    "tokens": (3, 5, 4),
    "attention": (2, 2, 4, 4),
    "relations": [(2, 4, 12), (2, 4, 12)],
    "stages": [(2, 3, 4, 4), (2, 4, 2, 2)],
    "sets": {"scores": (2, 4, 5), "boxes": (2, 4, 4)},
}
"""Of one side, for each kind of values."""

SEQUENCES = (3, 4, 7)
"""Of scores whose samples are positions, of which a mask may hide some."""


def check_loss_is_a_finite_scalar(loss: Loss) -> None:
    """One finite number comes back, of no axes, in numpy and in PyTorch."""
    for options in _options(loss):
        for student, teacher in (_values(loss), _tensors(_values(loss))):
            found = loss(student, teacher, **_like(options, student))
            assert np.shape(found) == (), f"a scalar is needed; the loss has shape {np.shape(found)}"
            assert np.isfinite(float(found)), f"the loss of ordinary values is {float(found)}"


def check_loss_is_smallest_when_the_student_equals_the_teacher(loss: Loss) -> None:
    """No student, near or far, is charged less than the teacher itself, and a far one is charged more.

    A loss that says `least_at_teacher=False` has its minimum elsewhere, and is not asked.
    """
    if not getattr(loss, "least_at_teacher", True):
        return
    random = np.random.default_rng(1)
    _, teacher = _values(loss)
    for options in _options(loss):
        least = float(loss(teacher, teacher, **options))
        for distance in (1e-4, 1e-2, 1.0, 10.0):
            way = map_arrays(lambda part: random.standard_normal(part.shape), teacher)
            for step in (-distance, distance):  # both ways: a slope leads down on one of them
                found = float(loss(_sum(teacher, way, step), teacher, **options))
                # 1e-12: what the rounding of float64 may cost in a sum over a few dozen values of size 10
                assert found >= least - 1e-12 * max(1.0, abs(least)), (
                    f"with {_said(options)} a student {distance} away is charged {found}, "
                    f"one that equals the teacher {least}"
                )
        assert found > least, f"a student far from the teacher is charged {found}, no more than one that equals it"


def check_gradient_is_that_of_finite_differences(loss: Loss) -> None:
    """The gradient for each of the student's values is the slope of the loss.

    A loss that holds a part of the student constant on purpose cannot pass; leave this check out for it, and say why.
    """
    student, teacher = _values(loss)
    step = 1e-5
    for options in _options(loss):
        found = _gradient(loss, student, teacher, options)
        for part, slope_of in _parts(student, found):
            for place in np.ndindex(*part.shape):
                kept = part[place]
                part[place] = kept + step
                above = float(loss(student, teacher, **options))
                part[place] = kept - step
                below = float(loss(student, teacher, **options))
                part[place] = kept
                slope = (above - below) / (2 * step)
                # Central differences err by step² times the third derivative, and by rounding / step: 1e-10 each here.
                assert abs(slope_of[place] - slope) <= 1e-7 * max(1.0, abs(slope)), (
                    f"with {_said(options)} the gradient for value {place} is {slope_of[place]}, the slope {slope}"
                )


def check_teacher_takes_no_gradient(loss: Loss) -> None:
    """Backward reaches the student and stops at the teacher, even where the teacher asks for a gradient.

    A loss that says `learned=True` compares with what is learned from the teacher, and is not asked.
    """
    student, teacher = (map_arrays(lambda part: part.requires_grad_(), _tensors(side)) for side in _values(loss))
    loss(student, teacher, **_like(list(_options(loss))[-1], student)).backward()
    assert first_array(student).grad is not None, "the student takes no gradient"
    if not getattr(loss, "learned", False):
        assert all(part.grad is None for part, _ in _parts(teacher, teacher)), "the teacher takes a gradient"


def check_numpy_and_pytorch_agree(loss: Loss) -> None:
    """The same values in float64 give the same number in both frameworks."""
    student, teacher = _values(loss)
    for options in _options(loss):
        first = float(loss(student, teacher, **options))
        tensors = _tensors(student), _tensors(teacher)
        second = float(loss(*tensors, **_like(options, tensors[0])))
        # They differ in the order of sums and in the last bits of exp and log.
        assert abs(first - second) <= 1e-12 * max(1.0, abs(first)), f"numpy gives {first}, PyTorch {second}"


def check_loss_is_finite_for_huge_values(loss: Loss) -> None:
    """Values of ±10,000, for and against the teacher, overflow neither the loss nor its gradient, of 64 to 16 bits.

    A gradient of float16 is not asked for: that of a product of such values is none of its numbers.
    """
    torch = namespace(_tensors(np.zeros(1)))
    random = np.random.default_rng(2)
    signs = map_arrays(lambda part: random.choice([-1.0, 1.0], part.shape), _values(loss)[0])
    huge, against = map_arrays(lambda part: 1e4 * part, signs), map_arrays(lambda part: -1e4 * part, signs)
    for options in _options(loss):
        for student, teacher in ((huge, against), (huge, huge), (huge, signs)):
            found = float(loss(student, teacher, **options))
            assert np.isfinite(found), f"the loss of huge values is {found}"
            for _, gradient in _parts(student, _gradient(loss, student, teacher, options)):
                assert np.isfinite(gradient).all(), "the gradient for huge values is not finite"
    for dtype, options in itertools.product((torch.float32, torch.bfloat16, torch.float16), _options(loss)):
        for sides in ((huge, against), (huge, huge), (huge, signs)):
            student, teacher = (_rounded(_tensors(side), dtype) for side in sides)
            map_arrays(lambda part: part.requires_grad_(), student)
            charge = loss(student, teacher, **_like(options, student))
            found = float(charge.detach())
            assert np.isfinite(found), f"the loss of huge {dtype} values is {found}"
            if dtype != torch.float16:
                charge.backward()
                grads = [part.grad for part, _ in _parts(student, student) if part.grad is not None]
                assert all(bool(torch.isfinite(grad).all()) for grad in grads), (
                    f"the gradient for huge {dtype} values is not finite"
                )


def check_loss_is_finite_in_half_precision(loss: Loss) -> None:
    """Ordinary values of 16 bits, under autocast, give a finite loss and gradient, near those of 64 bits.

    The same values, in 64 bits: what they lost when they were rounded is not asked for.
    """
    torch = namespace(_tensors(np.zeros(1)))
    for dtype in (torch.bfloat16, torch.float16):
        for options in _options(loss):
            student, teacher = (_rounded(_tensors(side), dtype) for side in _values(loss))
            map_arrays(lambda part: part.requires_grad_(), student)
            with torch.autocast("cpu", dtype=dtype):
                found = loss(student, teacher, **_like(options, student))
            found.backward()
            assert found.dtype == torch.float32, f"the loss of {dtype} values is of {found.dtype}; 32 bits are needed"
            value = float(found.detach())
            assert np.isfinite(value), f"the loss of {dtype} values is {value}"
            assert all(bool(torch.isfinite(part.grad).all()) for part, _ in _parts(student, student)), (
                f"the gradient of {dtype} values is not finite"
            )
            exact, its = (
                _rounded(side, torch.float64) for side in (map_arrays(lambda p: p.detach(), student), teacher)
            )
            wanted = float(loss(exact, its, **_like(options, exact)))
            # 32 bits hold 7 digits, of which sums and differences of a few dozen values may cost 3.
            assert abs(value - wanted) <= 1e-4 * max(1.0, abs(wanted)), (
                f"the loss of {dtype} values is {value}; in 64 bits it is {wanted}"
            )
            slopes = _gradient(loss, map_arrays(lambda part: part.numpy(), exact), map_arrays(np.asarray, its), options)
            for (part, _), (slope, _) in zip(_parts(student, student), _parts(slopes, slopes), strict=True):
                apart = np.linalg.norm(np.asarray(part.grad.double()) - slope)
                # The gradient itself has the 8 bits of a bfloat16.
                assert apart <= 1e-2 * np.linalg.norm(slope) + 1e-6, (
                    f"the gradient of {dtype} values is {apart} from that in 64 bits, of length {np.linalg.norm(slope)}"
                )


def check_masked_positions_contribute_nothing(loss: Loss) -> None:
    """Where a loss takes a mask, what lies under it, even NaN, changes neither the loss nor the gradient."""
    if "mask" not in step_arguments(loss):
        return
    shapes: list[Any] = [None, SEQUENCES] if getattr(loss, "takes", "scores") == "scores" else [None]
    for shape in shapes:
        _check_masked(loss, shape)


def _check_masked(loss: Loss, shape: Any) -> None:
    student, teacher = _values(loss, shape)
    mask = _mask(loss, shape)
    for plain in _options(loss, shape):
        options = {**plain, "mask": mask}
        wanted = float(loss(student, teacher, **options))
        slope = _gradient(loss, student, teacher, options)
        for other in (0.0, 1e4, np.nan):
            first, second = _spoilt(student, ~mask, other), _spoilt(teacher, ~mask, other)
            found = float(loss(first, second, **options))
            assert abs(found - wanted) <= 1e-12 * max(1.0, abs(wanted)), (
                f"with {other} under the mask the loss is {found}, otherwise {wanted}"
            )
            for now, before in _parts(_gradient(loss, first, second, options), slope):
                assert np.allclose(now, before, rtol=1e-9, atol=1e-12), f"{other} under the mask moves the gradient"


def check_order_of_samples_does_not_matter(loss: Loss) -> None:
    """The same samples in another order give the same number."""
    values = _values(loss)
    places = np.arange(len(first_array(values[0])))
    order = np.concatenate([places[1::2], places[::2]])  # other neighbors, which no reversal would give
    for options in _options(loss):
        moved = [map_arrays(lambda part: part[order], side) for side in values]
        other = {name: value[order] if name in ("labels", "mask") else value for name, value in options.items()}
        _assert_same(loss, (*values, options), (*moved, other), "in another order the same samples are charged")


def check_loss_is_a_mean_over_samples(loss: Loss) -> None:
    """Each sample twice gives the same number, so that the batch size does not change the learning rate.

    A loss that says `relational=True` relates samples to each other, and is not asked.
    """
    if getattr(loss, "relational", False):
        return
    values = _values(loss)
    for options in _options(loss):
        twice = [map_arrays(lambda part: np.concatenate([part, part]), side) for side in values]
        other = {n: np.concatenate([v, v]) if n in ("labels", "mask") else v for n, v in options.items()}
        _assert_same(loss, (*values, options), (*twice, other), "each sample twice is charged")


def check_parts_of_a_batch_add_up_to_it(loss: Loss) -> None:
    """The losses of two parts, each weighed by how many it has of what the mean goes over, add up to that of the whole.

    So a step is the same in whichever batches and processes its samples are. A loss that says `relational=True`, or
    `over="contents"`, is not asked.
    """
    over = getattr(loss, "over", "samples")
    if getattr(loss, "relational", False) or over == "contents":
        return
    student, teacher = _values(loss)
    masks: list[Any] = [None]
    if "mask" in step_arguments(loss):
        mask = _mask(loss)
        mask[(..., 0) if mask.ndim > 1 else 0] = True  # each text begins with a token
        masks.append(mask)
    for plain, mask in itertools.product(_options(loss), masks):
        options = plain if mask is None else {**plain, "mask": mask}
        parts = []
        for part in (slice(1), slice(1, None)):
            cut = [_cut(side, part) for side in (student, teacher)]
            own = {name: value[part] if name in ("labels", "mask") else value for name, value in options.items()}
            parts.append((_counted(over, loss, own.get("mask"), len(first_array(cut[0]))), float(loss(*cut, **own))))
        found = sum(count * value for count, value in parts) / sum(count for count, _ in parts)
        whole = float(loss(student, teacher, **options))
        assert abs(found - whole) <= 1e-9 * max(1.0, abs(whole)), (  # sums in another order
            f"a mean over {over} of two parts is {found}, the loss of both together {whole}"
        )


def check_unequal_shapes_are_refused(loss: Loss) -> None:
    """Values of other samples, or of another width where it matters, raise a ShapeError, even if numpy broadcasts."""
    student, teacher = _values(loss)
    cuts: list[Any] = [lambda part: part[:1]]
    if getattr(loss, "widths", "same") == "same":
        axis = {"maps": 1, "stages": 1, "pixels": 1}.get(getattr(loss, "takes", "scores"), -1)
        cuts += [lambda part: part.take([0], axis), lambda part: part.take(range(part.shape[axis] - 1), axis)]
    for options in _options(loss):
        for cut in cuts:
            other = map_arrays(cut, teacher)
            for pair in ((student, other), (_tensors(student), _tensors(other))):
                try:
                    loss(*pair, **_like(options, pair[0]))
                except ShapeError:
                    continue
                except (IndexError, RuntimeError, TypeError, ValueError) as error:
                    found = f"raise a {type(error).__name__}"
                else:
                    found = "are accepted"
                shapes = first_array(student).shape, first_array(other).shape
                message = f"values of shape {shapes[0]} and {shapes[1]} {found}; call arrays.check_same_shape first"
                raise AssertionError(message)


def check_inputs_are_left_as_they_are(loss: Loss) -> None:
    """Neither the student's nor the teacher's values are written to."""
    sides = _values(loss)
    before = [map_arrays(lambda part: part.copy(), side) for side in sides]
    for options in _options(loss):
        loss(*sides, **options)
        tensors = [_tensors(side) for side in sides]  # tensors share the memory of the arrays
        loss(*tensors, **_like(options, tensors[0]))
    for name, first, second in zip(("student", "teacher"), before, sides, strict=True):
        assert all(np.array_equal(a, b) for a, b in _parts(first, second)), f"the {name}'s values are changed"


LOSS_CHECKS: tuple[Callable[[Loss], None], ...] = (
    check_loss_is_a_finite_scalar,
    check_loss_is_smallest_when_the_student_equals_the_teacher,
    check_gradient_is_that_of_finite_differences,
    check_teacher_takes_no_gradient,
    check_numpy_and_pytorch_agree,
    check_loss_is_finite_for_huge_values,
    check_loss_is_finite_in_half_precision,
    check_masked_positions_contribute_nothing,
    check_order_of_samples_does_not_matter,
    check_loss_is_a_mean_over_samples,
    check_parts_of_a_batch_add_up_to_it,
    check_unequal_shapes_are_refused,
    check_inputs_are_left_as_they_are,
)


def _values(loss: Loss, shape: Any = None) -> tuple[Any, Any]:
    """A student's and a teacher's values, float64, of ordinary size, of the kind that the loss takes."""
    random = np.random.default_rng(0)

    def drawn(shape: Any, scale: float) -> Any:
        if isinstance(shape, dict):
            return {n: boxes(part) if n == "boxes" else drawn(part, scale) for n, part in shape.items()}
        if isinstance(shape, list):
            return [drawn(part, scale) for part in shape]
        return scale * random.standard_normal(shape)

    def boxes(shape: Any) -> Any:
        """Center and size as shares of the image; a box has an area, and touches others."""
        return random.uniform(0.2, 0.6, shape)

    shape = shape or SHAPES[getattr(loss, "takes", "scores")]
    return drawn(shape, 2.0), drawn(shape, 3.0)


def _mask(loss: Loss, shape: Any = None) -> Any:
    """True for some samples or positions: (N,) of scores and features, (N, L) of what has positions."""
    takes, shape = getattr(loss, "takes", "scores"), first_array(_values(loss, shape)[0]).shape
    whole = {
        "attention": (shape[0], shape[-1]),
        "pixels": (shape[0], *shape[2:]),
        "tokens": shape[:2],
        "relations": shape[:2],
        "scores": shape[:-1],
    }.get(takes, shape[:1])
    mask = np.random.default_rng(4).random(whole) < 0.6  # noqa: PLR2004 - a little more than half of them
    mask.reshape(-1)[0] = True
    return mask


def _counted(over: str, loss: Loss, mask: Any, samples: int) -> int:
    """How many a mean goes over."""
    if mask is None:
        return samples
    if over == "pairs":
        return int((mask.sum(1) ** 2).sum())
    return samples if over == "samples" and getattr(loss, "takes", "scores") in TOKEN_KINDS else int(mask.sum())


def _options(loss: Loss, shape: Any = None) -> Iterator[dict[str, Any]]:
    """The keywords to call a loss with: each temperature, and what a training step gives."""
    given: dict[str, Any] = {}
    if "labels" in step_arguments(loss):
        shape = first_array(_values(loss, shape)[0]).shape
        random = np.random.default_rng(5)
        numbers = getattr(loss, "takes", "scores") == "values"
        given["labels"] = random.standard_normal(shape) if numbers else random.integers(0, shape[-1], shape[:-1])
    for temperature in TEMPERATURES if "temperature" in loss_options(loss) else (None,):
        yield given if temperature is None else {**given, "temperature": temperature}


def _said(options: dict[str, Any]) -> str:
    return f"temperature {options['temperature']}" if "temperature" in options else "its defaults"


def _tensors(values: Any) -> Any:
    return map_arrays(lambda part: pytorch().tensor(part), values)


def _rounded(values: Any, dtype: Any) -> Any:
    return map_arrays(lambda part: part.to(dtype), values)


def _like(options: dict[str, Any], values: Any) -> dict[str, Any]:
    """The options with arrays of the framework of these values."""
    if isinstance(first_array(values), np.ndarray):
        return options
    return {name: _tensors(value) if isinstance(value, np.ndarray) else value for name, value in options.items()}


def _parts(first: Any, second: Any) -> list[tuple[Any, Any]]:
    """The arrays of two sides, in pairs."""
    if isinstance(first, dict):
        return [(first[name], second[name]) for name in first]
    return list(zip(first, second, strict=True)) if isinstance(first, list) else [(first, second)]


def _sum(values: Any, way: Any, step: float) -> Any:
    """`values + step way`, of each array."""
    moves = iter([part for part, _ in _parts(way, way)])
    return map_arrays(lambda part: part + step * next(moves), values)


def _cut(values: Any, rows: slice) -> Any:
    return map_arrays(lambda part: part[rows], values)


def _spoilt(values: Any, hidden: Any, other: float) -> Any:
    """The values with `other` at the hidden samples or positions."""
    return map_arrays(lambda part: _covered(part, hidden, other), values)


def _covered(part: Any, hidden: Any, other: float) -> Any:
    if part.ndim == 4 and hidden.ndim == 2 and part.shape[2] == part.shape[3] == hidden.shape[1]:  # noqa: PLR2004 - attention
        dark = (hidden[:, None, :, None] | hidden[:, None, None, :]) & np.ones(part.shape, bool)
        return np.where(dark, other, part)
    if hidden.ndim == 3:  # noqa: PLR2004 - of pixels, whose classes are axis 1
        return np.where(hidden[:, None], other, part)
    return np.where(hidden.reshape(*hidden.shape, *(1,) * (part.ndim - hidden.ndim)), other, part)


def _gradient(loss: Loss, student: Any, teacher: Any, options: dict[str, Any]) -> Any:
    """The gradient for the student's values, by automatic differentiation, in arrays of the same kind."""
    values = map_arrays(lambda part: pytorch().tensor(part.copy()).requires_grad_(), student)
    loss(values, _tensors(teacher), **_like(options, values)).backward()
    return map_arrays(lambda part: np.zeros(part.shape) if part.grad is None else np.asarray(part.grad), values)


def _assert_same(loss: Loss, first: Any, second: Any, what: str) -> None:
    wanted, found = (float(loss(student, teacher, **options)) for student, teacher, options in (first, second))
    # Only the order of a sum may differ.
    assert abs(found - wanted) <= 1e-12 * max(1.0, abs(wanted)), f"{what} {found} instead of {wanted}"
