"""Pruning after regularized and learned training, against magnitude and random pruning; digits of scikit-learn.

Each row trains the same network for 20 epochs in all, on the same data, from the same weights. "after cut" is the
accuracy on the test part directly after pruning, "final" after the recovery, both of the last epoch. The test part is
not used for any choice. Prints one JSON line for each row, and the means.

    OMP_NUM_THREADS=1 python benchmarks/regularized.py > build/regularized.jsonl    # about 4 minutes on one core
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import TYPE_CHECKING, Any

import torch

import kirsch
from kirsch.data.sources.digits import digits
from kirsch.frameworks.pytorch.models.digits import DigitsNet
from kirsch.measurement.machine import environment

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

IMAGE = torch.zeros(1, 1, 8, 8)
WIDTHS = (8, 16, 24)


class Case:
    """One seed and goal: the data, the network and its trainings.

    Args:
        seed: seed of the split, the weights and the trainings.
        macs: goal.
    """

    def __init__(self, seed: int, macs: float) -> None:
        self.seed, self.goal, data = seed, kirsch.Goal(macs=macs), digits(seed=seed)
        self.data = kirsch.ArrayData(data.train.inputs, data.train.labels, batch_size=64)
        self.test = torch.tensor(data.test.inputs), torch.tensor(data.test.labels)

    def train(self, model: nn.Module, epochs: int, rate: float, **options: Any) -> nn.Module:
        """Return the model after some epochs."""
        training = kirsch.Training(epochs=epochs, learning_rate=rate, seed=self.seed)
        trained: nn.Module = kirsch.fit(model, self.data, training=training, progress=False, **options).model
        return trained

    def dense(self, **options: Any) -> nn.Module:
        """Return the network after 10 epochs."""
        torch.manual_seed(self.seed)
        model = DigitsNet(WIDTHS).eval()
        regularize = options.pop("regularize", None)
        terms = [] if regularize is None else [regularize(kirsch.trace(model, IMAGE))]
        return self.train(model, 10, 0.05, regularizers=terms)

    def plan(self, graph: kirsch.Graph, **options: Any) -> kirsch.Plan:
        """Return a plan for the goal."""
        return kirsch.plan(graph, self.goal, round_to=1, **options)

    def accuracy(self, model: nn.Module) -> float:
        """Return the fraction of the test part that is classified correctly."""
        with torch.no_grad():
            return float((model.eval()(self.test[0]).argmax(1) == self.test[1]).float().mean())


def by_importance(case: Case, importance: str, **options: Any) -> tuple[nn.Module, int]:
    """Return the model pruned by an importance after the training."""
    model = case.dense(**options)
    return kirsch.prune(model, case.plan(kirsch.trace(model, IMAGE), importance=importance)), 10


def growing(case: Case) -> tuple[nn.Module, int]:
    """Return the model pruned by the plan whose units were driven to zero."""
    model = case.dense()
    graph = kirsch.trace(model, IMAGE)
    plan = case.plan(graph)
    term = kirsch.GrowingRegularization(graph, plan, strength=2.0, epochs=3)
    return kirsch.prune(case.train(model, 5, 0.02, regularizers=[term]), plan), 5


def gates(case: Case, *, train_weights: bool) -> tuple[nn.Module, int]:
    """Return the model pruned by learned gates."""
    training = kirsch.Training(epochs=5, optimizer="adamw", learning_rate=2e-3, seed=case.seed)
    learned = kirsch.learn_gates(
        kirsch.trace(case.dense(), IMAGE),
        case.goal,
        case.data,
        training=training,
        train_weights=train_weights,
        round_to=1,
        progress=False,
    )
    return kirsch.prune(learned.model, learned.plan), 5


def movement(case: Case) -> tuple[nn.Module, int]:
    """Return the model pruned by the movement of its weights."""
    model = case.dense()
    scores = kirsch.Movement(kirsch.trace(model, IMAGE))
    tuned = case.train(model, 5, 0.02, hooks=kirsch.TrainingHooks(before_step=scores))
    return kirsch.prune(tuned, case.plan(kirsch.trace(tuned, IMAGE), importance=scores.scores())), 5


METHODS: dict[str, Callable[[Case], tuple[nn.Module, int]]] = {
    "random": lambda case: by_importance(case, "random"),
    "magnitude": lambda case: by_importance(case, "magnitude"),
    "group lasso, magnitude": lambda case: by_importance(
        case, "magnitude", regularize=lambda graph: kirsch.GroupLasso(graph, 1e-3)
    ),
    "growing regularization": growing,
    "gates and weights": lambda case: gates(case, train_weights=True),
    "gates alone": lambda case: gates(case, train_weights=False),
    "movement": movement,
}
"""Method → function that returns the pruned model, and the epochs that are left for its recovery."""


def main() -> None:
    """Run all methods, and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5, 0.25])
    chosen, rows = parser.parse_args(), []
    print(json.dumps({"environment": environment(), "widths": WIDTHS}), flush=True)
    for seed in chosen.seeds:
        for macs in chosen.macs:
            for name, method in METHODS.items():
                case = Case(seed, macs)
                small, epochs = method(case)
                row = {"method": name, "seed": seed, "macs": macs, "after cut": case.accuracy(small)}
                row["final"] = case.accuracy(case.train(small, epochs, 0.02))
                rows.append(row)
                print(json.dumps(row), flush=True)
    for macs in chosen.macs:
        for name in METHODS:
            found = [row for row in rows if (row["method"], row["macs"]) == (name, macs)]
            values = [f"{100 * statistics.mean(row[key] for row in found):.1f}" for key in ("after cut", "final")]
            print(f"{macs:.0%} {name}: after cut {values[0]} %, final {values[1]} %", file=sys.stderr)


if __name__ == "__main__":
    main()
