"""Terms of the training loss that drive weights or units towards zero, in preparation for pruning."""

from kirsch.pruning.regularizers.group_lasso import GroupLasso
from kirsch.pruning.regularizers.growing import GrowingRegularization
from kirsch.pruning.regularizers.l1 import L1
from kirsch.pruning.regularizers.slimming import Slimming

__all__ = ["L1", "GroupLasso", "GrowingRegularization", "Slimming"]
