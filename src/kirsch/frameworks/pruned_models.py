"""Parts of the protocols `Calibration` and `Surgery` that compare a pruned model with its original and change it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    import numpy as np
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph


@dataclass(frozen=True)
class LinearLayer:
    """A linear layer or a convolution that reads its weight alone.

    Args:
        axis: axis of the weight over which its products with the activations are summed, 0 or 1.
        bias: path of the bias, if no other operation reads it; else None.
    """

    axis: int
    bias: str | None


class PairedRuns(Protocol):
    """Runs of a traced model and of its pruned copy on the same data, in inference mode. `graph.model` is the model."""

    def linear_layers(self, graph: Graph) -> dict[str, LinearLayer]:
        """Return the weights that exactly one operation reads, a linear layer or a convolution, by path.

        Transposed convolutions are left out.
        """

    def reading_order(self, graph: Graph, pruned: Any, inputs: Any, names: Collection[str]) -> list[list[str]]:
        """Return the named weights in the order in which the pruned model multiplies them with activations.

        Consecutive weights that read the same activations are in one list. Weights that are multiplied more than once
        are left out.
        """

    def paired_inputs(
        self,
        graph: Graph,
        pruned: Any,
        inputs: Any,
        names: Collection[str],
        choose: Callable[[str, int], NDArray[np.int64] | None],
        see: Callable[[str, tuple[int, int], Any, Any], None],
    ) -> None:
        """Call `see(name, groups, x, y)` with the activations that a weight reads in the model and in its pruned copy.

        `groups` are the numbers of groups of a convolution in the two models, else 1. The activations have the shape
        (outputs, channels, kernel size), as those of `weight_input_patches`, at the same positions.
        `choose(name, outputs)` returns the numbers of the outputs that are passed, in any number of calls; None: all
        outputs, in one call.
        """

    def paired_outputs(self, graph: Graph, pruned: Any, inputs: Any) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """Return the floating outputs of the model and of its pruned copy that have the same name and shape.

        Hidden states and caches are left out if the model has other outputs.
        """


class ChangedValues(Protocol):
    """Changes of the parameters and statistics of a pruned model, in place."""

    def parameter_values(self, pruned: Any, graph: Graph, name: str) -> NDArray[Any]:
        """Return a copy of a parameter of a pruned model; `name` is its path in the traced part of the model."""

    def set_parameters(self, pruned: Any, graph: Graph, values: Mapping[str, NDArray[Any]]) -> None:
        """Set parameters of a pruned model in place; names are paths in the traced part of the model."""

    def batch_norms(self, model: Any) -> list[str]:
        """Return the paths of the batch normalizations with running statistics."""

    def estimate_batch_norms(self, model: Any, batches: Iterable[tuple[int, Any]]) -> None:
        """Replace the running statistics of batch normalization, in place, by those of batches.

        `batches` are the size and the inputs of each batch; the result is the mean over all samples of the statistics
        of their batches.
        """
