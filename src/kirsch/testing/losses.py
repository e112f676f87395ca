"""Conformance suite for distillation losses. Each check takes a loss and asserts one property.

```python
@pytest.mark.parametrize("check", LOSS_CHECKS, ids=lambda check: check.__name__)
def test_my_loss(check):
    check(my_loss)
```

The checks call the loss with arrays of the kind `loss.takes`, or with logits if the loss has no such attribute.
"""

from __future__ import annotations

import itertools
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch import ops
from kirsch.distillation.losses.loss import TOKEN_KINDS, loss_options, step_arguments
from kirsch.errors import ShapeError
from kirsch.frameworks.find import pytorch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kirsch.distillation.losses import Loss

TEMPERATURES = (1.0, 4.0)
"""Temperatures with which a loss is tested, if it has the option."""

SHAPES: dict[str, Any] = {
    "logits": (5, 7),
    "values": (5, 3),
    "pixels": (2, 3, 4, 3),
    "maps": (3, 4, 4, 3),
    "features": (4, 6),
    "tokens": (3, 5, 4),
    "attention": (2, 2, 4, 4),
    "relations": [(2, 4, 12), (2, 4, 12)],
    "stages": [(2, 3, 4, 4), (2, 4, 2, 2)],
    "sets": {"logits": (2, 4, 5), "boxes": (2, 4, 4)},
}
"""Shape of the student's or the teacher's values, by kind of values."""

SEQUENCES = (3, 4, 7)
"""Shape of the logits of sequences, whose positions a mask can exclude."""


def check_loss_is_a_finite_scalar(loss: Loss) -> None:
    """The loss is one finite number without axes, in numpy and in PyTorch."""
    for options in example_options(loss):
        for student, teacher in (example_values(loss), _tensors(example_values(loss))):
            value = loss(student, teacher, **_like(options, student))
            assert np.shape(value) == (), f"the loss has shape {np.shape(value)}; expected a scalar"
            assert np.isfinite(float(value)), f"the loss of ordinary values is {float(value)}"


def check_loss_is_smallest_when_the_student_equals_the_teacher(loss: Loss) -> None:
    """The loss of a student that equals the teacher is a minimum, and smaller than that of a distant student.

    Skipped for losses with `least_at_teacher=False`, whose minimum is elsewhere.
    """
    if not getattr(loss, "least_at_teacher", True):
        return
    random = np.random.default_rng(1)
    _, teacher = example_values(loss)
    for options in example_options(loss):
        least = float(loss(teacher, teacher, **options))
        for distance in (1e-4, 1e-2, 1.0, 10.0):
            direction = ops.map_arrays(lambda part: random.standard_normal(part.shape), teacher)
            for step in (-distance, distance):  # a nonzero slope leads down in one of the directions
                value = float(loss(_add(teacher, direction, step), teacher, **options))
                # 1e-12: rounding of float64 in a sum over a few dozen values of size 10
                assert value >= least - 1e-12 * max(1.0, abs(least)), (
                    f"with {_describe(options)} the loss of a student at distance {distance} is {value}, "
                    f"that of a student equal to the teacher {least}"
                )
        assert value > least, f"the loss of a distant student is {value}, not above that of an equal one"


def check_gradient_equals_finite_differences(loss: Loss) -> None:
    """The gradient of each student value equals the central difference of the loss.

    A loss that detaches a part of the student on purpose cannot pass; skip this check for it, with the reason.
    """
    student, teacher = example_values(loss)
    step = 1e-5
    for options in example_options(loss):
        gradients = _gradient(loss, student, teacher, options)
        for part, gradient in _parts(student, gradients):
            for index in np.ndindex(*part.shape):
                value = part[index]
                part[index] = value + step
                above = float(loss(student, teacher, **options))
                part[index] = value - step
                below = float(loss(student, teacher, **options))
                part[index] = value
                slope = (above - below) / (2 * step)
                # A central difference errs by step² times the third derivative, and by rounding / step: 1e-10 each.
                assert abs(gradient[index] - slope) <= 1e-7 * max(1.0, abs(slope)), (
                    f"with {_describe(options)} the gradient at {index} is {gradient[index]}, the difference {slope}"
                )


def check_teacher_has_no_gradient(loss: Loss) -> None:
    """The student has a gradient and the teacher has none, even if the teacher's tensors require gradients.

    The check of the teacher is skipped for losses with `learned=True`, whose target is trained.
    """
    student, teacher = (
        ops.map_arrays(lambda part: part.requires_grad_(), _tensors(side)) for side in example_values(loss)
    )
    loss(student, teacher, **_like(list(example_options(loss))[-1], student)).backward()
    assert ops.first_array(student).grad is not None, "the student has no gradient"
    if not getattr(loss, "learned", False):
        assert all(part.grad is None for part, _ in _parts(teacher, teacher)), "the teacher has a gradient"


def check_numpy_and_pytorch_agree(loss: Loss) -> None:
    """The losses of the same float64 values are equal in both frameworks."""
    student, teacher = example_values(loss)
    for options in example_options(loss):
        first = float(loss(student, teacher, **options))
        tensors = _tensors(student), _tensors(teacher)
        second = float(loss(*tensors, **_like(options, tensors[0])))
        # Order of summation, and last bits of exp and log.
        assert abs(first - second) <= 1e-12 * max(1.0, abs(first)), f"the loss is {first} in numpy, {second} in PyTorch"


def check_loss_is_finite_for_huge_values(loss: Loss) -> None:
    """Loss and gradient are finite for values of ±10,000, in 64, 32 and 16 bits.

    Gradients in float16 are not checked, since products of such values overflow.
    """
    torch = import_module("torch")
    random = np.random.default_rng(2)
    signs = ops.map_arrays(lambda part: random.choice([-1.0, 1.0], part.shape), example_values(loss)[0])
    huge, opposite = ops.map_arrays(lambda part: 1e4 * part, signs), ops.map_arrays(lambda part: -1e4 * part, signs)
    for options in example_options(loss):
        for student, teacher in ((huge, opposite), (huge, huge), (huge, signs)):
            value = float(loss(student, teacher, **options))
            assert np.isfinite(value), f"the loss of huge values is {value}"
            for _, gradient in _parts(student, _gradient(loss, student, teacher, options)):
                assert np.isfinite(gradient).all(), "the gradient for huge values is not finite"
    for dtype, options in itertools.product((torch.float32, torch.bfloat16, torch.float16), example_options(loss)):
        for sides in ((huge, opposite), (huge, huge), (huge, signs)):
            student, teacher = (_rounded(_tensors(side), dtype) for side in sides)
            ops.map_arrays(lambda part: part.requires_grad_(), student)
            total = loss(student, teacher, **_like(options, student))
            value = float(total.detach())
            assert np.isfinite(value), f"the loss of huge {dtype} values is {value}"
            if dtype != torch.float16:
                total.backward()
                grads = [part.grad for part, _ in _parts(student, student) if part.grad is not None]
                assert all(bool(torch.isfinite(grad).all()) for grad in grads), (
                    f"the gradient for huge {dtype} values is not finite"
                )


def check_loss_is_finite_in_half_precision(loss: Loss) -> None:
    """Loss and gradient of 16-bit values under autocast are close to those of the same rounded values in 64 bits."""
    torch = import_module("torch")
    for dtype in (torch.bfloat16, torch.float16):
        for options in example_options(loss):
            student, teacher = (_rounded(_tensors(side), dtype) for side in example_values(loss))
            ops.map_arrays(lambda part: part.requires_grad_(), student)
            with torch.autocast("cpu", dtype=dtype):
                total = loss(student, teacher, **_like(options, student))
            total.backward()
            assert total.dtype == torch.float32, f"the loss of {dtype} values has {total.dtype}; expected torch.float32"
            value = float(total.detach())
            assert np.isfinite(value), f"the loss of {dtype} values is {value}"
            assert all(bool(torch.isfinite(part.grad).all()) for part, _ in _parts(student, student)), (
                f"the gradient of {dtype} values is not finite"
            )
            student64, teacher64 = (
                _rounded(side, torch.float64) for side in (ops.map_arrays(lambda p: p.detach(), student), teacher)
            )
            expected = float(loss(student64, teacher64, **_like(options, student64)))
            # float32 has 7 digits, of which sums and differences of a few dozen values may lose 3.
            assert abs(value - expected) <= 1e-4 * max(1.0, abs(expected)), (
                f"the loss of {dtype} values is {value}; in 64 bits it is {expected}"
            )
            arrays_s, arrays_t = (ops.map_arrays(np.asarray, side) for side in (student64, teacher64))
            exact = _gradient(loss, arrays_s, arrays_t, options)
            for (part, _), (gradient, _) in zip(_parts(student, student), _parts(exact, exact), strict=True):
                error = np.linalg.norm(np.asarray(part.grad.double()) - gradient)
                # The gradient is rounded to the 8 bits of bfloat16.
                assert error <= 1e-2 * np.linalg.norm(gradient) + 1e-6, (
                    f"the gradient of {dtype} values has the error {error}, and the norm {np.linalg.norm(gradient)}"
                )


def check_masked_positions_contribute_nothing(loss: Loss) -> None:
    """Values at masked positions, even NaN, change neither the loss nor the gradient."""
    if "mask" not in step_arguments(loss):
        return
    shapes: list[Any] = [None, SEQUENCES] if getattr(loss, "takes", "logits") == "logits" else [None]
    for shape in shapes:
        _check_masked(loss, shape)


def _check_masked(loss: Loss, shape: Any) -> None:
    student, teacher = example_values(loss, shape)
    mask = example_mask(loss, shape)
    for plain in example_options(loss, shape):
        options = {**plain, "mask": mask}
        expected = float(loss(student, teacher, **options))
        gradient = _gradient(loss, student, teacher, options)
        for other in (0.0, 1e4, np.nan):
            first, second = _fill_masked(student, ~mask, other), _fill_masked(teacher, ~mask, other)
            value = float(loss(first, second, **options))
            assert abs(value - expected) <= 1e-12 * max(1.0, abs(expected)), (
                f"with {other} at masked positions the loss is {value}, otherwise {expected}"
            )
            for after, before in _parts(_gradient(loss, first, second, options), gradient):
                assert np.allclose(after, before, rtol=1e-9, atol=1e-12), (
                    f"{other} at masked positions changes the gradient"
                )


def check_order_of_samples_does_not_matter(loss: Loss) -> None:
    """The loss of the same samples in another order is the same."""
    values = example_values(loss)
    indices = np.arange(len(ops.first_array(values[0])))
    order = np.concatenate([indices[1::2], indices[::2]])  # a reversal would keep the neighbors of each sample
    for options in example_options(loss):
        permuted = [ops.map_arrays(lambda part: part[order], side) for side in values]
        other = {name: value[order] if name in ("labels", "mask") else value for name, value in options.items()}
        _assert_same(loss, (*values, options), (*permuted, other), "for the same samples in another order")


def check_loss_is_a_mean_over_samples(loss: Loss) -> None:
    """Two copies of each sample do not change the loss, so that its scale does not depend on the batch size.

    Skipped for losses with `relational=True`, which relate samples to each other.
    """
    if getattr(loss, "relational", False):
        return
    values = example_values(loss)
    for options in example_options(loss):
        twice = [ops.map_arrays(lambda part: np.concatenate([part, part]), side) for side in values]
        other = {n: np.concatenate([v, v]) if n in ("labels", "mask") else v for n, v in options.items()}
        _assert_same(loss, (*values, options), (*twice, other), "with each sample twice")


def check_parts_of_a_batch_add_up_to_it(loss: Loss) -> None:
    """The mean of the losses of two parts of a batch, weighted by their numbers of items, is the loss of the batch.

    A training step then does not depend on how its samples are distributed over batches and processes. Skipped for
    losses with `relational=True` or `over="contents"`.
    """
    over = getattr(loss, "over", "samples")
    if getattr(loss, "relational", False) or over == "contents":
        return
    student, teacher = example_values(loss)
    masks: list[Any] = [None]
    if "mask" in step_arguments(loss):
        mask = example_mask(loss)
        mask[(..., 0) if mask.ndim > 1 else 0] = True  # no part is masked completely
        masks.append(mask)
    for plain, mask in itertools.product(example_options(loss), masks):
        options = plain if mask is None else {**plain, "mask": mask}
        parts = []
        for part in (slice(1), slice(1, None)):
            sides = [_rows(side, part) for side in (student, teacher)]
            own = {name: value[part] if name in ("labels", "mask") else value for name, value in options.items()}
            parts.append(
                (_item_count(over, loss, own.get("mask"), len(ops.first_array(sides[0]))), float(loss(*sides, **own)))
            )
        value = sum(count * part for count, part in parts) / sum(count for count, _ in parts)
        expected = float(loss(student, teacher, **options))
        assert abs(value - expected) <= 1e-9 * max(1.0, abs(expected)), (  # the order of summation differs
            f"the mean over {over} of two parts is {value}, the loss of the batch {expected}"
        )


def check_unequal_shapes_are_refused(loss: Loss) -> None:
    """Unequal numbers of samples, or unequal widths, raise a ShapeError, even if the shapes broadcast."""
    student, teacher = example_values(loss)
    cuts: list[Any] = [lambda part: part[:1]]
    if getattr(loss, "widths", "same") == "same":
        axis = {"maps": 1, "stages": 1, "pixels": 1}.get(getattr(loss, "takes", "logits"), -1)
        cuts += [lambda part: part.take([0], axis), lambda part: part.take(range(part.shape[axis] - 1), axis)]
    for options in example_options(loss):
        for cut in cuts:
            other = ops.map_arrays(cut, teacher)
            for pair in ((student, other), (_tensors(student), _tensors(other))):
                try:
                    loss(*pair, **_like(options, pair[0]))
                except ShapeError:
                    continue
                except (IndexError, RuntimeError, TypeError, ValueError) as error:
                    result = f"raise a {type(error).__name__}"
                else:
                    result = "are accepted"
                shapes = ops.first_array(student).shape, ops.first_array(other).shape
                message = f"values of shape {shapes[0]} and {shapes[1]} {result}; call check_same_shape first"
                raise AssertionError(message)


def check_inputs_are_not_changed(loss: Loss) -> None:
    """The loss does not write to the values of student and teacher."""
    sides = example_values(loss)
    before = [ops.map_arrays(lambda part: part.copy(), side) for side in sides]
    for options in example_options(loss):
        loss(*sides, **options)
        tensors = [_tensors(side) for side in sides]  # they share memory with the arrays
        loss(*tensors, **_like(options, tensors[0]))
    for name, first, second in zip(("student", "teacher"), before, sides, strict=True):
        assert all(np.array_equal(a, b) for a, b in _parts(first, second)), f"the {name}'s values are changed"


LOSS_CHECKS: tuple[Callable[[Loss], None], ...] = (
    check_loss_is_a_finite_scalar,
    check_loss_is_smallest_when_the_student_equals_the_teacher,
    check_gradient_equals_finite_differences,
    check_teacher_has_no_gradient,
    check_numpy_and_pytorch_agree,
    check_loss_is_finite_for_huge_values,
    check_loss_is_finite_in_half_precision,
    check_masked_positions_contribute_nothing,
    check_order_of_samples_does_not_matter,
    check_loss_is_a_mean_over_samples,
    check_parts_of_a_batch_add_up_to_it,
    check_unequal_shapes_are_refused,
    check_inputs_are_not_changed,
)


def example_values(loss: Loss, shape: Any = None) -> tuple[Any, Any]:
    """Return random values of student and teacher, float64, of the kind that the loss takes."""
    random = np.random.default_rng(0)

    def draw(shape: Any, scale: float) -> Any:
        if isinstance(shape, dict):
            return {n: boxes(part) if n == "boxes" else draw(part, scale) for n, part in shape.items()}
        if isinstance(shape, list):
            return [draw(part, scale) for part in shape]
        return scale * random.standard_normal(shape)

    def boxes(shape: Any) -> Any:
        """Return center and size as fractions of the image; the boxes have an area and overlap."""
        return random.uniform(0.2, 0.6, shape)

    shape = shape or SHAPES[getattr(loss, "takes", "logits")]
    return draw(shape, 2.0), draw(shape, 3.0)


def example_mask(loss: Loss, shape: Any = None) -> Any:
    """Return a mask that is True for some samples, shape (N,), or positions, shape (N, L)."""
    takes, shape = getattr(loss, "takes", "logits"), ops.first_array(example_values(loss, shape)[0]).shape
    mask_shape = {
        "attention": (shape[0], shape[-1]),
        "pixels": (shape[0], *shape[2:]),
        "tokens": shape[:2],
        "relations": shape[:2],
        "logits": shape[:-1],
    }.get(takes, shape[:1])
    mask = np.random.default_rng(4).random(mask_shape) < 0.6  # noqa: PLR2004 - about 60 % are True
    mask.reshape(-1)[0] = True
    return mask


def _item_count(over: str, loss: Loss, mask: Any, samples: int) -> int:
    """Return the number of items that the mean of a loss is taken over."""
    if mask is None:
        return samples
    if over == "pairs":
        return int((mask.sum(1) ** 2).sum())
    return samples if over == "samples" and getattr(loss, "takes", "logits") in TOKEN_KINDS else int(mask.sum())


def example_options(loss: Loss, shape: Any = None) -> Iterator[dict[str, Any]]:
    """Yield keyword arguments for a loss: each temperature, together with labels if the loss takes them."""
    arguments: dict[str, Any] = {}
    if "labels" in step_arguments(loss):
        shape = ops.first_array(example_values(loss, shape)[0]).shape
        random = np.random.default_rng(5)
        regression = getattr(loss, "takes", "logits") == "values"
        arguments["labels"] = random.standard_normal(shape) if regression else random.integers(0, shape[-1], shape[:-1])
    for temperature in TEMPERATURES if "temperature" in loss_options(loss) else (None,):
        yield arguments if temperature is None else {**arguments, "temperature": temperature}


def _describe(options: dict[str, Any]) -> str:
    return f"temperature {options['temperature']}" if "temperature" in options else "default options"


def _tensors(values: Any) -> Any:
    return ops.map_arrays(pytorch().inference.from_numpy, values)


def _rounded(values: Any, dtype: Any) -> Any:
    return ops.map_arrays(lambda part: part.to(dtype), values)


def _like(options: dict[str, Any], values: Any) -> dict[str, Any]:
    """Return the options with their arrays converted to the framework of the values."""
    if isinstance(ops.first_array(values), np.ndarray):
        return options
    return {name: _tensors(value) if isinstance(value, np.ndarray) else value for name, value in options.items()}


def _parts(first: Any, second: Any) -> list[tuple[Any, Any]]:
    """Return pairs of corresponding arrays of two sides."""
    if isinstance(first, dict):
        return [(first[name], second[name]) for name in first]
    return list(zip(first, second, strict=True)) if isinstance(first, list) else [(first, second)]


def _add(values: Any, direction: Any, step: float) -> Any:
    """Return `values + step * direction` for each array."""
    directions = iter([part for part, _ in _parts(direction, direction)])
    return ops.map_arrays(lambda part: part + step * next(directions), values)


def _rows(values: Any, rows: slice) -> Any:
    return ops.map_arrays(lambda part: part[rows], values)


def _fill_masked(values: Any, masked: Any, other: float) -> Any:
    """Return the values with `other` at the masked samples or positions."""
    return ops.map_arrays(lambda part: _fill_array(part, masked, other), values)


def _fill_array(part: Any, masked: Any, other: float) -> Any:
    if part.ndim == 4 and masked.ndim == 2 and part.shape[2] == part.shape[3] == masked.shape[1]:  # noqa: PLR2004 - attention
        pairs = (masked[:, None, :, None] | masked[:, None, None, :]) & np.ones(part.shape, bool)
        return np.where(pairs, other, part)
    if masked.ndim == 3:  # noqa: PLR2004 - pixels, with classes on axis 1
        return np.where(masked[:, None], other, part)
    return np.where(masked.reshape(*masked.shape, *(1,) * (part.ndim - masked.ndim)), other, part)


def _gradient(loss: Loss, student: Any, teacher: Any, options: dict[str, Any]) -> Any:
    """Return the gradient for the student's values, by automatic differentiation, as numpy arrays."""
    values = ops.map_arrays(lambda part: pytorch().inference.from_numpy(part.copy()).requires_grad_(), student)
    loss(values, _tensors(teacher), **_like(options, values)).backward()
    return ops.map_arrays(lambda part: np.zeros(part.shape) if part.grad is None else np.asarray(part.grad), values)


def _assert_same(loss: Loss, first: Any, second: Any, case: str) -> None:
    expected, value = (float(loss(student, teacher, **options)) for student, teacher, options in (first, second))
    # Only the order of summation may differ.
    assert abs(value - expected) <= 1e-12 * max(1.0, abs(expected)), f"{case} the loss is {value}, not {expected}"
