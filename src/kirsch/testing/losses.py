"""What any distillation loss must pass. Each check takes the loss and asserts one statement.

```python
@pytest.mark.parametrize("check", LOSS_CHECKS, ids=lambda check: check.__name__)
def test_my_loss(check):
    check(my_loss)
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from kirsch.errors import ShapeError
from kirsch.frameworks.port import pytorch

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kirsch.distillation.losses import Loss

TEMPERATURES = (1.0, 4.0)


def check_loss_is_a_finite_scalar(loss: Loss) -> None:
    """One finite number comes back, of no axes, in numpy and in PyTorch."""
    for temperature in TEMPERATURES:
        for student, teacher in (_scores(), tuple(map(_tensor, _scores()))):
            found = loss(student, teacher, temperature=temperature)
            assert np.shape(found) == (), f"a scalar is needed; the loss has shape {np.shape(found)}"
            assert np.isfinite(float(found)), f"the loss of ordinary scores is {float(found)}"


def check_loss_is_smallest_when_the_student_equals_the_teacher(loss: Loss) -> None:
    """No student, near or far, is charged less than the teacher itself, and a far one is charged more."""
    random = np.random.default_rng(1)
    _, teacher = _scores()
    for temperature in TEMPERATURES:
        least = float(loss(teacher, teacher, temperature=temperature))
        for distance in (1e-4, 1e-2, 1.0, 10.0):
            way = distance * random.standard_normal(teacher.shape)
            for other in (teacher - way, teacher + way):  # both ways: a slope leads down on one of them
                found = float(loss(other, teacher, temperature=temperature))
                # 1e-12: what the rounding of float64 may cost in a sum over a few dozen scores of size 10
                assert found >= least - 1e-12 * max(1.0, abs(least)), (
                    f"at temperature {temperature} a student {distance} away is charged {found}, "
                    f"one that equals the teacher {least}"
                )
        assert found > least, f"a student far from the teacher is charged {found}, no more than one that equals it"


def check_gradient_is_that_of_finite_differences(loss: Loss) -> None:
    """The gradient for each of the student's scores is the slope of the loss.

    A loss that holds a part of the student constant on purpose cannot pass; leave this check out for it, and say why.
    """
    student, teacher = _scores()
    step = 1e-5
    for temperature in TEMPERATURES:
        found = _gradient(loss, student, teacher, temperature)
        for place in np.ndindex(*student.shape):
            up, down = student.copy(), student.copy()
            up[place] += step
            down[place] -= step
            rise = float(loss(up, teacher, temperature=temperature)) - float(
                loss(down, teacher, temperature=temperature)
            )
            slope = rise / (2 * step)
            # Central differences err by step² times the third derivative, and by rounding / step: 1e-10 each here.
            assert abs(found[place] - slope) <= 1e-7 * max(1.0, abs(slope)), (
                f"at temperature {temperature} the gradient for score {place} is {found[place]}, the slope {slope}"
            )


def check_teacher_takes_no_gradient(loss: Loss) -> None:
    """Backward reaches the student and stops at the teacher, even where the teacher asks for a gradient."""
    student, teacher = (_tensor(scores).requires_grad_() for scores in _scores())
    loss(student, teacher, temperature=TEMPERATURES[-1]).backward()
    assert student.grad is not None, "the student takes no gradient"
    assert teacher.grad is None, "the teacher takes a gradient"


def check_numpy_and_pytorch_agree(loss: Loss) -> None:
    """The same scores in float64 give the same number in both frameworks."""
    student, teacher = _scores()
    for temperature in TEMPERATURES:
        first = float(loss(student, teacher, temperature=temperature))
        second = float(loss(_tensor(student), _tensor(teacher), temperature=temperature))
        # They differ in the order of sums and in the last bits of exp and log.
        assert abs(first - second) <= 1e-12 * max(1.0, abs(first)), f"numpy gives {first}, PyTorch {second}"


def check_loss_is_finite_for_huge_scores(loss: Loss) -> None:
    """Scores of ±10,000, for and against the teacher, overflow nothing: neither the loss nor its gradient."""
    signs = np.where(np.random.default_rng(2).random((4, 6)) < 0.5, -1.0, 1.0)  # noqa: PLR2004 - a fair coin
    for temperature in TEMPERATURES:
        for student, teacher in ((1e4 * signs, -1e4 * signs), (1e4 * signs, 1e4 * signs), (1e4 * signs, signs)):
            found = float(loss(student, teacher, temperature=temperature))
            assert np.isfinite(found), f"the loss of huge scores is {found}"
            gradient = _gradient(loss, student, teacher, temperature)
            assert np.isfinite(gradient).all(), "the gradient for huge scores is not finite"


def check_order_of_samples_does_not_matter(loss: Loss) -> None:
    """The same samples in another order give the same number."""
    student, teacher = _scores()
    order = np.random.default_rng(3).permutation(len(student))
    _assert_same(
        loss, (student, teacher), (student[order], teacher[order]), "in another order the same samples are charged"
    )


def check_loss_is_a_mean_over_samples(loss: Loss) -> None:
    """Each sample twice gives the same number, so that the batch size does not change the learning rate."""
    student, teacher = _scores()
    twice = np.concatenate([student, student]), np.concatenate([teacher, teacher])
    _assert_same(loss, (student, teacher), twice, "each sample twice is charged")


def check_unequal_shapes_are_refused(loss: Loss) -> None:
    """Scores of other samples or other classes raise a ShapeError, even where numpy would broadcast them."""
    student, teacher = _scores()
    for other in (teacher[:1], teacher[:, :1], teacher[:, :-1], teacher[0]):
        for pair in ((student, other), (_tensor(student), _tensor(other))):
            try:
                loss(*pair, temperature=1.0)
            except ShapeError:
                continue
            except (IndexError, RuntimeError, TypeError, ValueError) as error:
                found = f"raise a {type(error).__name__}"
            else:
                found = "are accepted"
            message = f"scores of shape {student.shape} and {other.shape} {found}; call arrays.same_shape first"
            raise AssertionError(message)


def check_inputs_are_left_as_they_are(loss: Loss) -> None:
    """Neither the student's nor the teacher's scores are written to."""
    arrays = _scores()
    before = [scores.copy() for scores in arrays]
    loss(*arrays, temperature=TEMPERATURES[-1])
    loss(*map(_tensor, arrays), temperature=TEMPERATURES[-1])  # tensors share the memory of the arrays
    for name, first, second in zip(("student", "teacher"), before, arrays, strict=True):
        assert np.array_equal(first, second), f"the {name}'s scores are changed"


LOSS_CHECKS: tuple[Callable[[Loss], None], ...] = (
    check_loss_is_a_finite_scalar,
    check_loss_is_smallest_when_the_student_equals_the_teacher,
    check_gradient_is_that_of_finite_differences,
    check_teacher_takes_no_gradient,
    check_numpy_and_pytorch_agree,
    check_loss_is_finite_for_huge_scores,
    check_order_of_samples_does_not_matter,
    check_loss_is_a_mean_over_samples,
    check_unequal_shapes_are_refused,
    check_inputs_are_left_as_they_are,
)


def _scores() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A student's and a teacher's scores, shape (5, 7), float64, of ordinary size."""
    random = np.random.default_rng(0)
    return 2 * random.standard_normal((5, 7)), 3 * random.standard_normal((5, 7))


def _tensor(scores: NDArray[np.float64]) -> Any:
    return pytorch().tensor(scores)


def _gradient(
    loss: Loss, student: NDArray[np.float64], teacher: NDArray[np.float64], temperature: float
) -> NDArray[np.float64]:
    """The gradient for the student's scores, by automatic differentiation."""
    scores = _tensor(student.copy()).requires_grad_()
    loss(scores, _tensor(teacher), temperature=temperature).backward()
    return np.asarray(scores.grad)


def _assert_same(loss: Loss, first: Any, second: Any, what: str) -> None:
    for temperature in TEMPERATURES:
        wanted, found = (float(loss(*pair, temperature=temperature)) for pair in (first, second))
        # Only the order of a sum may differ.
        assert abs(found - wanted) <= 1e-12 * max(1.0, abs(wanted)), f"{what} {found} instead of {wanted}"
