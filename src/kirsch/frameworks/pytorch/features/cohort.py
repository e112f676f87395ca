"""Several students as one module, so that one forward runs them all and one optimizer trains them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from kirsch.errors import UsageError
from kirsch.frameworks.pytorch.inference.predict import logits_of_each

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


class Cohort(nn.Module):
    """Students that run on the same batches.

    Args:
        students: models.

    Raises:
        UsageError: two of them share a parameter.
    """

    def __init__(self, students: Iterable[nn.Module]) -> None:
        super().__init__()
        self.students = nn.ModuleList(students)
        owners: dict[int, tuple[int, str]] = {}
        for place, student in enumerate(self.students):
            for name, parameter in student.named_parameters():
                other, its = owners.setdefault(id(parameter), (place, name))
                if other != place:
                    raise UsageError(
                        f"Students {other} and {place} share a parameter: `{its}` of the one is `{name}` of the other.",
                        fix="Build each by itself, or give copies: copy.deepcopy.",
                    )

    def forward(self, *args: Any, **options: Any) -> dict[str, Tensor]:
        """The scores of each student by its number: "0", "1", ..."""
        return {str(place): scores for place, scores in enumerate(logits_of_each(self.students, args, options))}
