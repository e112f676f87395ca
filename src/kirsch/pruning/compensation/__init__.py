"""Changes of the kept weights that replace the removed units, from calibration data and without training."""

from kirsch.pruning.compensation.compensate import compensate
from kirsch.pruning.compensation.methods import Compensate, check_data, check_model, methods_of
from kirsch.pruning.compensation.record import Compensation

__all__ = ["Compensate", "Compensation", "check_data", "check_model", "compensate", "methods_of"]
