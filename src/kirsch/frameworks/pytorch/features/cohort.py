"""Several students in one module, with one forward pass and one optimizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from kirsch.errors import UsageError
from kirsch.frameworks.pytorch.inference.predict import logits_of_each

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


class Cohort(nn.Module):
    """Students that are trained on the same batches.

    Args:
        students: the models.

    Raises:
        UsageError: two students share a parameter.
    """

    def __init__(self, students: Iterable[nn.Module]) -> None:
        super().__init__()
        self.students = nn.ModuleList(students)
        owners: dict[int, tuple[int, str]] = {}
        for number, student in enumerate(self.students):
            for name, parameter in student.named_parameters():
                other, other_name = owners.setdefault(id(parameter), (number, name))
                if other != number:
                    raise UsageError(
                        f"Students {other} and {number} share a parameter: `{other_name}` of the first is `{name}` of "
                        "the second.",
                        fix="Build each student separately, or pass copies made by copy.deepcopy.",
                    )

    def forward(self, *args: Any, **options: Any) -> dict[str, Tensor]:
        """Return the logits by number of the student: "0", "1", ..."""
        return {str(number): logits for number, logits in enumerate(logits_of_each(self.students, args, options))}


def cohort(students: Iterable[nn.Module]) -> Cohort:
    """Return several students as one model, whose outputs "0", "1", ... are their logits."""
    return Cohort(students)


def members(cohort: Cohort) -> list[nn.Module]:
    """Return the students of a cohort, in order."""
    return list(cohort.students)
