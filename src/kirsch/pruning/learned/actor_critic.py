"""An actor-critic agent that chooses the kept fraction of one group after the other, as in AMC.

The actor maps the state of a group to a fraction, and the critic maps both to the quality of the pruned model. The
critic is fitted to the evaluated allocations, and the actor is moved up the gradient of the critic (DDPG).

Source: He et al. 2018, arXiv:1802.03494, section 3 and algorithm 1; DDPG: Lillicrap et al. 2016, arXiv:1509.02971.
Different from both: since the only reward is the quality at the end of an episode, and is not discounted, the critic is
fitted to it directly, without target networks. Qualities are standardized over all episodes, which replaces the moving
average as a baseline. The memory has all episodes, and starts with the allocations of the fixed rankings. The states
have the kinds and costs of units of any group in place of the shapes of convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kirsch.pruning.learned.networks import Adam, Network

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from kirsch.pruning.learned.allocations import Allocations, Counts
    from kirsch.pruning.search import Candidate

    Array = NDArray[np.float64]

HIDDEN = 64
"""Units of each of the two hidden layers of actor and critic. AMC has 300, for ten times as many episodes."""

BATCH = 64
UPDATES = 20
"""Updates of actor and critic after each new allocation."""

LEARNING_RATES = (1e-3, 1e-3)
"""Learning rates of actor and critic."""

EXPLORATION = 0.25
"""Fraction of the episodes with random actions, before the actor is used."""

NOISE = (0.5, 0.05)
"""Standard deviation of the noise of the actor's actions in the first and last episode after the exploration."""


@dataclass(frozen=True)
class Episode:
    """States and actions that lead to an allocation.

    Args:
        states: state before each action, shape (groups, features).
        actions: kept fraction of each group, shape (groups, 1).
    """

    states: Array
    actions: Array


def explore(allocations: Allocations, random: np.random.Generator) -> None:
    """Search for the allocation of the best quality with an actor-critic agent."""
    walk = Walk(allocations)
    agent = Agent(walk.features, random)
    episodes = [walk.episode(counts) for counts in allocations.known()]
    qualities = list(allocations.known().values())
    while allocations.progress < 1:
        passed = (allocations.progress - EXPLORATION) / (1 - EXPLORATION)
        if passed < 0:
            chosen = walk.counts(lambda _state: float(random.uniform()))
        else:
            noise = NOISE[0] * (NOISE[1] / NOISE[0]) ** passed
            chosen = walk.counts(lambda state, noise=noise: agent.action(state, noise))  # type: ignore[misc]
        counts, evaluated = allocations.of_counts(chosen), allocations.evaluated
        quality = allocations.evaluate(counts)
        if allocations.evaluated > evaluated:
            episodes.append(walk.episode(counts))
            qualities.append(quality)
            if passed >= 0:
                agent.learn(episodes, qualities)


class Walk:
    """Walk over the groups of a model that chooses the kept fraction of each.

    The load of an allocation is the largest of its costs, each divided by its limit. The features of a state are: the
    position of the group; the logarithm of its number of units; the load without it; a one-hot vector of its kind; the
    load that was removed before; the load that can be removed later; and the fraction chosen before.

    Args:
        allocations: the search.
    """

    def __init__(self, allocations: Allocations) -> None:
        self._allocations = allocations
        candidates = allocations.candidates
        kinds = sorted({candidate.groups[0].kind for candidate in candidates})
        self._none = [candidate.steps[0] for candidate in candidates]
        self._most = allocations.chooser.least()
        self._load_before = self._load(self._none)
        rows = []
        for index, candidate in enumerate(candidates):
            alone = [*self._none[:index], self._most[index], *self._none[index + 1 :]]
            share = (self._load_before - self._load(alone)) / self._load_before
            position, size = index / len(candidates), np.log2(candidate.size) / 10
            rows.append([position, size, share, *(float(candidate.groups[0].kind == kind) for kind in kinds)])
        self._fixed = np.array(rows)
        self.features = self._fixed.shape[1] + 3

    def _load(self, counts: Sequence[int]) -> float:
        chooser, goal = self._allocations.chooser, self._allocations.goal
        fractions = goal.fractions(chooser.price(counts), self._allocations.graph.cost)
        return max(value / limit for value, limit in fractions.values())

    def counts(self, act: Callable[[Array], float]) -> list[int]:
        """Return the allocation of one walk.

        A group loses more units than chosen if the goal cannot be met otherwise, even if all later groups lose as many
        units as they may (algorithm 1 of AMC).

        Args:
            act: function that returns the kept fraction, in 0 to 1, for a state.
        """
        counts, last = list(self._none), 1.0
        for index, candidate in enumerate(self._allocations.candidates):
            if candidate.kept is None:
                chosen = act(self._state(index, counts, last))
                wanted = candidate.allowed(round((1 - chosen) * candidate.size))
                counts[index] = self._bounded(counts, index, candidate, wanted)
                last = 1 - counts[index] / candidate.size
        return counts

    def _bounded(self, counts: Sequence[int], index: int, candidate: Candidate, wanted: int) -> int:
        """Return the smallest allowed number of removed units from `wanted` on with which the goal can be met."""
        steps = [step for step in candidate.steps if wanted <= step <= max(wanted, self._most[index])]
        low, high = 0, len(steps) - 1
        while low < high:
            middle = (low + high) // 2
            if self._load([*counts[:index], steps[middle], *self._most[index + 1 :]]) <= 1:
                high = middle
            else:
                low = middle + 1
        return steps[low]

    def _state(self, index: int, counts: Sequence[int], last: float) -> Array:
        now = self._load([*counts[:index], *self._none[index:]])
        reduced = (self._load_before - now) / self._load_before
        rest = (now - self._load([*counts[:index], *self._most[index:]])) / self._load_before
        return np.array([*self._fixed[index], reduced, rest, last])

    def episode(self, counts: Counts) -> Episode:
        """Return the states and actions that lead to an allocation."""
        states, actions, last = [], [], 1.0
        for index, candidate in enumerate(self._allocations.candidates):
            states.append(self._state(index, counts, last))
            last = 1 - counts[index] / candidate.size
            actions.append([last])
        return Episode(np.array(states), np.array(actions))


class Agent:
    """Actor and critic.

    Args:
        features: number of features of a state.
        random: generator of weights, noise and batches.
    """

    def __init__(self, features: int, random: np.random.Generator) -> None:
        self.actor = Network([features, HIDDEN, HIDDEN, 1], random)
        self.critic = Network([features + 1, HIDDEN, HIDDEN, 1], random)
        self._optimizers = Adam(self.actor, LEARNING_RATES[0]), Adam(self.critic, LEARNING_RATES[1])
        self._random = random

    def action(self, state: Array, noise: float) -> float:
        """Return the action of the actor with noise: a draw of a normal distribution, truncated to 0 to 1."""
        mean = float(_sigmoid(self.actor(state[None]))[0, 0])
        while not 0 <= (drawn := float(self._random.normal(mean, noise))) <= 1:
            pass
        return drawn

    def learn(self, episodes: Sequence[Episode], qualities: Sequence[float]) -> None:
        """Update actor and critic on random transitions of the episodes with a finite quality."""
        finite = np.flatnonzero(np.isfinite(qualities))
        if not len(finite):
            return
        values = np.array(qualities)[finite]
        values = (values - values.mean()) / (values.std() or 1.0)
        states = np.concatenate([episodes[index].states for index in finite.tolist()])
        actions = np.concatenate([episodes[index].actions for index in finite.tolist()])
        targets = np.repeat(values, [len(episodes[index].actions) for index in finite.tolist()])[:, None]
        for _ in range(UPDATES):
            batch = self._random.integers(0, len(states), BATCH)
            self._fit_critic(states[batch], actions[batch], targets[batch])
            self._improve_actor(states[batch])

    def _fit_critic(self, states: Array, actions: Array, targets: Array) -> None:
        """Take a step on the mean squared error of the critic."""
        values = self.critic.forward(np.hstack([states, actions]))
        gradients, _ = self.critic.backward(values, 2 * (values[-1] - targets) / len(targets))
        self._optimizers[1].step(gradients)

    def _improve_actor(self, states: Array) -> None:
        """Take a step that increases the critic's value of the actor's actions."""
        values = self.actor.forward(states)
        actions = _sigmoid(values[-1])
        judged = self.critic.forward(np.hstack([states, actions]))
        _, inputs = self.critic.backward(judged, np.full_like(judged[-1], -1 / len(states)))
        gradients, _ = self.actor.backward(values, inputs[:, -1:] * actions * (1 - actions))
        self._optimizers[0].step(gradients)


def _sigmoid(x: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))
