"""Mean absolute activation of a unit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kirsch.pruning.importance.importance import importance, mean_per_unit, relative_to_mean

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kirsch.graph.graph import Graph
    from kirsch.graph.group import Group
    from kirsch.pruning.importance.statistics import Statistics


@importance("activation", needs="inputs")
def activation(graph: Graph, group: Group, *, statistics: Statistics) -> NDArray[np.float64]:
    """Return the mean |a| of the activations of each unit where weights read them, relative to the other units.

    The mean is over all positions of all samples and over the channels of the unit. The means of each weight that reads
    the unit are divided by their mean over the units, and averaged over the weights.

    Source: Muralidharan et al. 2024 (Minitron), arXiv:2407.14679, section 2.2.
    """
    means = [mean_per_unit(graph, group, inputs.labels, inputs.mean_absolute) for inputs in statistics.of_inputs(group)]
    return np.asarray(np.mean([relative_to_mean(values) for values in means], axis=0))
