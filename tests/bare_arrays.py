"""An array library with only the features that a loss may use: operators, basic indexing, a shape, channels last.

Its arrays have no methods, and Python cannot read their values, as in a function that a compiler traces. Numpy computes
the results.
"""

from __future__ import annotations

import operator
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np

from kirsch.ops import numpy_arrays, operations


class BareArray:
    """Array with operators, basic indexing and a shape."""

    __slots__ = ("_values",)
    __array_ufunc__ = None  # numpy leaves `number * array` to this class
    __hash__ = None

    def __init__(self, values):
        self._values = np.asarray(values)

    @property
    def shape(self):
        return self._values.shape

    def __getitem__(self, index):
        parts = index if isinstance(index, tuple) else (index,)
        if not all(part is None or part is Ellipsis or isinstance(part, (int, slice)) for part in parts):
            raise TypeError(f"An array was indexed with {index}; integers, slices, None and ... are allowed.")
        return BareArray(self._values[index])


def _binary(function, *, swapped=False):
    def apply(self, other):
        if not isinstance(other, (BareArray, int, float)):
            return NotImplemented
        sides = (values_of(other), self._values) if swapped else (self._values, values_of(other))
        return BareArray(function(*sides))

    return apply


def _unary(function):
    return lambda self: BareArray(function(self._values))


def _refuse(name):
    def refuse(self, *_):
        raise TypeError(f"An array has no {name}: Python cannot read its values.")

    return refuse


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul", "and_", "or_", "lt", "le", "gt", "ge", "eq", "ne"):
    _dunder = _name.strip("_")
    setattr(BareArray, f"__{_dunder}__", _binary(getattr(operator, _name)))
    if _name not in ("lt", "le", "gt", "ge", "eq", "ne"):
        setattr(BareArray, f"__r{_dunder}__", _binary(getattr(operator, _name), swapped=True))
for _name in ("neg", "invert"):
    setattr(BareArray, f"__{_name}__", _unary(getattr(operator, _name)))
for _name in ("bool", "float", "int", "index", "iter", "len", "array", "contains"):
    setattr(BareArray, f"__{_name}__", _refuse(f"__{_name}__"))


def values_of(argument):
    """Return the numpy values of an array, or of each array in a list. Return other arguments unchanged."""
    if isinstance(argument, (list, tuple)):
        return type(argument)(values_of(part) for part in argument)
    return argument._values if isinstance(argument, BareArray) else argument


def _bare(result):
    if isinstance(result, tuple):
        return tuple(_bare(part) for part in result)
    return BareArray(result) if isinstance(result, (np.ndarray, np.generic)) else result


def _operation(name):
    def call(*args, **options):
        arguments = [values_of(arg) for arg in args]
        return _bare(getattr(numpy_arrays, name)(*arguments, **{key: values_of(v) for key, v in options.items()}))

    return call


NAMES = {name for name, value in vars(operations).items() if getattr(value, "__module__", "") == operations.__name__}
OPERATIONS = SimpleNamespace(
    **{name: _operation(name) for name in NAMES - {"channel_axis"}},
)
OPERATIONS.CHANNEL_AXIS = -1
OPERATIONS.is_traced = lambda x: True
OPERATIONS.convert_to_numpy = values_of
OPERATIONS.without_autocast = lambda x: nullcontext()
