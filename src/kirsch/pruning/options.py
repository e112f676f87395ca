"""Options of a plan: the one definition that `kirsch.plan`, recipes and the command line share."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field

from kirsch.annotations import AtLeastZero, Between, Count, Fix, MaxDrop, Names, OneOrMore, Seed
from kirsch.errors import UnknownNameError, UsageError
from kirsch.graph.kinds import BLOCK, KINDS, RESIDUAL_STREAM
from kirsch.options import Options

if TYPE_CHECKING:
    from typing import Self

    from kirsch.pruning.importance import Importance

Norm: TypeAlias = Literal[1, 2]
Ranking: TypeAlias = Literal["auto", "global", "local", "isomorphic", "per_cost", "milp", "legr"]
FIXED_RANKINGS = ("global", "local", "isomorphic", "per_cost")
"""Rankings that follow from the importances; the last one only for importances that are not negative."""
FIRST_ORDER = ("taylor", "snip")
"""Importances that are absolute changes of the loss to first order."""
RoundTo: TypeAlias = Count | Literal["auto"] | Mapping[str, Count]
KindNames = Annotated[
    str | Sequence[str], OneOrMore(), Fix("Give one or several kinds of units, such as ['head', 'ffn unit'].")
]
Kinds: TypeAlias = KindNames | Mapping[str, Annotated[float, Between(0)]] | None
Amount = Annotated[
    Annotated[int, Between(1)] | Annotated[float, Between(0, 1, exclusive="least")],
    Fix("Give a number of units, such as 48, or a fraction, such as 0.5 or 1.0."),
]
"""A number of units, or a fraction of the units of a group."""
Keep: TypeAlias = Mapping[str, Amount] | None
MinKeep = Annotated[float, Between(0, 1, exclusive="least")]
ClassWeights: TypeAlias = Mapping[str | int, AtLeastZero] | None
Minimize: TypeAlias = Literal["macs", "parameters", "size", "memory"] | None

ONLY_WITH_MAX_DROP = ("metric", "class_weights", "minimize")
"""Options without effect on a plan without `max_drop`."""

_OF_WIDTHS = ("round_to", "uniform", "loadable", "min_keep", "keep", "keep_outputs")
ONLY_OF_UNITS = ("loss", "norm", "ranking", *_OF_WIDTHS, "evaluations")
"""Options without effect on a plan of blocks."""


class PlanOptions(Options):
    """Options of a plan: the keyword arguments of `kirsch.plan`, where each is described in full.

    The keys of the section `prune` of a recipe and the flags of `kirsch plan` and `kirsch prune` are made from it, with
    these types, defaults and descriptions.
    """

    importance: str | None = Field(
        None,
        description=(
            'score that ranks the units (default: "taylor" in recipes and kirsch.compress, else "magnitude"); '
            'from weights: "magnitude", "lamp", "fpgm", "bn_scale", "random"; '
            'from inputs: "activation", "apoz", "wanda", "flap", "thinet"; from inputs and labels: "taylor", "fisher", '
            '"taylor_weights", "snip", "grasp", "hessian", "leave_one_out"; for blocks: "influence" (default), '
            '"change", "random"'
        ),
    )
    loss: str = Field(
        "cross-entropy",
        description=(
            'loss for importances from labels: "cross-entropy", "binary", "squared-error", or "next-token" for causal '
            "language models"
        ),
    )
    norm: Norm = Field(2, description='norm that the importances "magnitude" and "lamp" use, 1 or 2')
    ranking: Ranking = Field(
        "auto",
        description=(
            "rank the units of all layers together (global), divided by their cost (per_cost), of each group by itself "
            "(local), of each class of groups in layers of the same types (isomorphic); milp: choose among widths of "
            "each group by the measured change of the outputs on data; or search for the widths with the best quality "
            "on data (legr); auto: per_cost for the importances taylor, fisher and snip, else global; global also for "
            "taylor and snip if the model has units of kind embedding dim, and for goals on the memory; in recipes, "
            "milp if its measurements cost at most one pass over the training data"
        ),
    )
    round_to: RoundTo = Field(
        "auto",
        description=(
            "the number of kept units of a group is a multiple of this number, which may be given for each kind of "
            'unit; "auto": 16, 8, 4 or 1, by the size of the group'
        ),
    )
    kinds: Kinds = Field(
        None,
        description=(
            "a list: only units of these kinds are removed; a dict from kind to weight: a kind with a "
            "higher weight loses more units, a kind with weight 0 loses none, a kind that is not in the dict has the "
            "weight 1; block: residual blocks, with other kinds only for the ranking milp; default: units of all "
            "kinds, but no residual blocks"
        ),
    )
    uniform: bool = Field(False, description="remove the same number of units from all layers of one kind and size")
    loadable: bool | None = Field(
        None,
        description=(
            "only make cuts that the configuration of a transformers model can state, so that from_pretrained loads "
            "the result without Kirsch; default: yes, unless the configuration cannot state the goal or the widths in "
            "keep, or the ranking (milp, legr) chooses the width of each layer by itself"
        ),
    )
    min_keep: MinKeep = Field(0.1, description="fraction of each group that is always kept")
    keep: Keep = Field(
        None,
        description=(
            "a dict from layer (a path, a glob pattern, or the name of a group) to the number of its output units that "
            "are kept, or the fraction of them; the goal then applies to the other layers"
        ),
    )
    max_drop: MaxDrop | None = Field(
        None,
        description=(
            "largest drop of the quality without training, measured on validation data: 0.02 is two percentage points; "
            "without a goal, the smallest such model is searched for"
        ),
    )
    metric: str | None = Field(
        None,
        description=(
            'metric of max_drop: "accuracy", "balanced_accuracy", "log_likelihood", "next_token_accuracy", '
            '"next_token_log_likelihood", "binary_accuracy", "r2"; without labels "agreement", "kl", "output_r2"; '
            "default: by the form of the labels"
        ),
    )
    class_weights: ClassWeights = Field(
        None,
        description="a dict from class to weight for the accuracy of max_drop; the weight of other classes is 1",
    )
    minimize: Minimize = Field(
        None, description="the cost that max_drop minimizes without a goal; default: macs, or parameters without MACs"
    )
    exclude: Names = Field((), description="layers or residual blocks whose parameters are not changed; glob patterns")
    keep_outputs: Names = Field((), description="layers that keep all their outputs and may lose inputs; glob patterns")
    seed: Seed = Field(0, description='seed of the importances "random" and "hessian", and of learned rankings')
    evaluations: Count = Field(200, description="number of plans that the ranking legr evaluates")

    def check(self) -> None:
        """Check the combinations of options, and the names of kinds, which the types do not restrict.

        Raises:
            UnknownNameError: kinds or round_to names an unknown kind.
            UsageError: kinds names blocks together with other kinds, or an option has no effect.
        """
        from kirsch.pruning.importance import IMPORTANCES, importance_of  # noqa: PLC0415 - `kirsch --help` loads no numpy

        for kind in self.kinds or ():
            if kind not in (*KINDS, BLOCK):
                raise UnknownNameError("kind of unit", kind, (*KINDS, BLOCK), len(KINDS) + 1, "kinds")
        for kind in self.round_to if isinstance(self.round_to, Mapping) else ():
            if kind not in KINDS:
                raise UnknownNameError("kind of unit", kind, KINDS, len(KINDS), "round_to")
        if not self.of_blocks and self.importance_name in IMPORTANCES:
            self.check_importance(importance_of(self.importance_name))
        self._check_measurements()
        if self.loadable and self.free_widths:
            raise UsageError(
                f"`loadable=True` cannot be used with {self.free_widths[0]}.",
                f"It {self.free_widths[1]}.",
                f"Give {self.free_widths[2]}, or remove `loadable`.",
            )
        if self.of_blocks:
            self._check_blocks()
        elif BLOCK in (self.kinds or ()) and self.ranking != "milp" and not self._keeps_blocks:
            raise UsageError(
                "`kinds` names 'block' together with other kinds.",
                "The units of a layer can be ranked only once it is known which blocks remain.",
                "Make two plans, one after the other: prune by a plan with kinds='block', trace the result, and make a "
                'plan with the other kinds. Or give ranking="milp", which chooses blocks and units together.',
            )

    def _check_measurements(self) -> None:
        """Check the options of plans that are measured."""
        unused = next((name for name in ONLY_WITH_MAX_DROP if getattr(self, name) is not None), None)
        if self.max_drop is None and unused is not None:
            raise UsageError(
                f"`{unused}` has no effect without `max_drop`.",
                "The quality of pruned models is measured only for `max_drop`.",
                f"Give max_drop, such as max_drop=0.02, or remove `{unused}`.",
            )
        if not self.is_learned and self.evaluations != type(self).model_fields["evaluations"].default:
            raise UsageError(
                f'`evaluations` has no effect with ranking="{self.ranking}".',
                fix='Remove `evaluations`, or give ranking="legr".',
            )

    def check_importance(self, importance: Importance) -> None:
        """Raise a UsageError for an option that the importance does not use, or that does not fit it."""
        if self.ranking == "per_cost" and importance.signed:
            raise UsageError(
                f'ranking="per_cost" cannot be used with importance={importance.name!r}.',
                "It divides importances by costs, which has no meaning for negative importances.",
                "Use another ranking, or an importance that is not negative, such as 'taylor'.",
            )
        used = {"norm": "norm" in importance.options, "loss": "statistics" in importance.options}
        used["loss"] &= importance.needs != "inputs" or importance.name.startswith("given")
        # They state whether the outputs are logits, or which loss pruned models have.
        used["loss"] |= self.ranking == "milp" or self.is_learned
        for name, is_used in used.items():
            if not is_used and getattr(self, name) != type(self).model_fields[name].default:
                raise UsageError(
                    f"`{name}` has no effect with importance={importance.name!r}.",
                    fix=f"Remove `{name}`, or use an importance that depends on it.",
                )

    def _check_blocks(self) -> None:
        fields = type(self).model_fields
        unused = next((name for name in ONLY_OF_UNITS if getattr(self, name) != fields[name].default), None)
        if unused is not None:
            raise UsageError(
                f"`{unused}` has no effect on a plan with kinds='block'.",
                "A block is removed as a whole; the option applies to the units of layers.",
                f"Remove `{unused}`, or use other `kinds`.",
            )

    @property
    def of_blocks(self) -> bool:
        """Whether the plan removes residual blocks instead of units of layers."""
        return self.kinds is not None and not isinstance(self.kinds, Mapping) and set(self.kinds) == {BLOCK}

    @property
    def _keeps_blocks(self) -> bool:
        return isinstance(self.kinds, Mapping) and self.kinds.get(BLOCK) == 0

    @property
    def block_weight(self) -> float:
        """Weight of residual blocks in a plan that removes both units and blocks; 0 in other plans."""
        if self.ranking != "milp" or self.of_blocks or BLOCK not in (self.kinds or ()):
            return 0.0
        return float(self.kinds[BLOCK]) if isinstance(self.kinds, Mapping) else 1.0

    @property
    def is_learned(self) -> bool:
        """Whether the ranking evaluates pruned models on data."""
        return self.ranking == "legr"

    @property
    def free_widths(self) -> tuple[str, str, str] | None:
        """The option by which layers that share a number of a configuration get different widths; None without one.

        Returns:
            The option, why it cannot be used with `loadable`, and what can be given instead, in words.
        """
        if self.ranking == "milp" or self.is_learned:
            return f'ranking="{self.ranking}"', "chooses the width of each layer by itself", 'ranking="global"'
        return None

    @property
    def importance_name(self) -> str:
        """Name of the importance; the default if the option is None."""
        default = "influence" if self.of_blocks else "magnitude"
        return default if self.importance is None else self.importance

    def with_ranking(self, importance: Importance, kinds: Collection[str], *, limits_memory: bool) -> Self:
        """Return the options with the ranking that fits the importance and the model, if it is "auto".

        Changes of the loss can be added. The smallest sum at a given cost is that of the units with the lowest
        importance per cost. There are two exceptions. Changes to first order are too small for units of a residual
        stream, which cost most; docs/benchmarks.md has the figures. The memory is a maximum, which the units of one
        group hardly change.

        Args:
            importance: the importance.
            kinds: kinds of the units of the model.
            limits_memory: whether the goal limits the memory.
        """
        if self.ranking != "auto" or self.of_blocks:
            return self
        of_stream = importance.name in FIRST_ORDER and RESIDUAL_STREAM in kinds
        per_cost = importance.of_loss and not importance.signed and not of_stream and not limits_memory
        return self.changed(ranking="per_cost" if per_cost else "global")

    @property
    def kind_weights(self) -> dict[str, float]:
        """Weight of each kind of unit: importances are divided by the weight, and a kind of weight 0 is kept."""
        kinds = self.kinds
        if isinstance(kinds, Mapping):
            return {kind: float(kinds.get(kind, 1)) for kind in KINDS}
        return {kind: float(kinds is None or kind in kinds) for kind in KINDS}

    def to_dict(self) -> dict[str, Any]:
        """Return the options as JSON values, for the method of a plan."""
        return self.model_dump(mode="json") | {"importance": self.importance_name}
