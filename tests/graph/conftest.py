"""Small networks whose operations the tests record as `kirsch.graph.facts.Facts`, in place of a framework's tracer."""

from __future__ import annotations

import math

import pytest

from kirsch.graph import relations
from kirsch.graph.facts import Facts, Operation
from kirsch.graph.graph import Graph
from kirsch.graph.labels import Tensor


class Network:
    """Builder of a small network: each method adds an operation, and `graph` returns the dependency graph."""

    def __init__(self):
        self.facts = Facts()
        self.tensors = {}

    def parameter(self, name, *shape):
        """Add a parameter with new labels and the cost of its elements."""
        axes = [self.facts.fresh(size) if size > 1 else None for size in shape]
        self.tensors[name] = Tensor.of(shape, axes)
        self.facts.cost("parameters", 1, axes, owner=name.rpartition(".")[0])
        return self.tensors[name]

    def linear(self, name, x, width, *, bias=True):
        """Add a linear layer (N, I) → (N, O) with a weight of shape (O, I)."""
        rows, columns = x.shape
        weight = self.parameter(f"{name}.weight", width, columns)
        operands = [(x, "ni"), (weight, "oi")]
        if bias:
            operands.append((self.parameter(f"{name}.bias", width), "o"))
        self.facts.begin(Operation("linear", name, "net.py:1"))
        self.facts.cost("macs", rows, weight.axes)
        return relations.relate(self.facts, operands, "no", (rows, width))

    def add(self, *tensors):
        self.facts.begin(Operation("add"))
        return relations.elementwise(self.facts, tensors, tensors[0].shape)

    def view(self, x, *shape, kind="view"):
        self.facts.begin(Operation("view"))
        return relations.reshape(self.facts, x, shape, kind)

    def softmax(self, x, *dims, module="softmax"):
        self.facts.begin(Operation("softmax", module, "net.py:7"))
        relations.freeze(self.facts, [x], "a softmax is computed over the axis", dims)
        return x

    def output(self, x):
        self.facts.begin(Operation("output"))
        for axis in x.axes:
            self.facts.freeze(axis, "it is an output", boundary=True)
        return x

    def graph(self, name="Net", values=math.nan):
        """Return the graph. `values` is not callable by default: the analysis must not read the values of weights."""
        return Graph(name, self.facts, self.tensors, tuple(self.tensors), (), values, lambda model: True)


@pytest.fixture(scope="session")
def network():
    """Return the class `Network`; a test may build several networks."""
    return Network


@pytest.fixture(scope="session")
def chain():
    """Build two linear layers, 3 → `width` → 2, on one row."""

    def build(width=5):
        net = Network()
        hidden = net.linear("first", Tensor.of((1, 3)), width)
        net.output(net.linear("second", hidden, 2))
        return net

    return build


@pytest.fixture(scope="session")
def heads():
    """Build a linear layer, a reshape to (heads, width), a sum with a vector (width), and a linear layer."""

    def build(number=2, width=3):
        net = Network()
        y = net.linear("query", Tensor.of((1, 4)), number * width, bias=False)
        y = net.view(y, 1, number, width)
        y = net.add(y, net.parameter("scale", width))
        y = net.view(y, 1, number * width)
        net.output(net.linear("out", y, 2, bias=False))
        return net

    return build


@pytest.fixture(scope="session")
def shuffle():
    """Build a network that adds 4 channels to their shuffle, in which channels 1 and 2 are swapped."""

    def build():
        net = Network()
        x = net.linear("before", Tensor.of((1, 3)), 4, bias=False)
        y = relations.permute(net.view(x, 1, 2, 2), (0, 2, 1))
        y = net.add(net.view(y, 1, 4), x)
        net.output(net.linear("after", y, 2, bias=False))
        return net

    return build
