"""What Kirsch needs of a framework, and how the framework of a model is found."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from kirsch.arguments import checked
from kirsch.errors import MissingExtraError, ModelError, UsageError
from kirsch.frameworks.annotations import Inputs, Model
from kirsch.graph.graph import Graph, Tracing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from numpy.typing import NDArray

    from kirsch.frameworks.data import Batch
    from kirsch.frameworks.training import Trained, Training, TrainingHooks
    from kirsch.graph.graph import Input
    from kirsch.graph.labels import Tensor
    from kirsch.graph.plan import Plan
    from kirsch.graph.verification import Verification


class Framework(Protocol):
    """The verbs that each framework folder fulfills; `model` is a model of that framework throughout."""

    name: str

    def trace(self, model: Any, example_inputs: Any, tracing: Tracing, *, of_part: bool = False) -> Graph:
        """The coupling analysis of a model, or of the part that `tracing` names; the model is left as it is.

        `of_part`: the example inputs are those of the part.
        """

    def prune(self, model: Any, plan: Plan, graph: Graph, *, verify: bool) -> tuple[Any, Verification | None]:
        """Return a model without the units that the plan removes, and its verification; the given one is unchanged."""

    def reweighted(self, model: Any, plan: Plan, graph: Graph) -> dict[str, float]:
        """Path of each module whose computed weight the cut changes for the units that stay → its relative size."""

    def configure(
        self, pruned: Any, model: Any, plan: Plan, graph: Graph, *, verify: bool
    ) -> tuple[dict[str, float], tuple[str, ...], str]:
        """Make the configuration that a pruned model carries, if any, build it anew.

        Where none does, the configuration stays as it is, and the model's own way to save a checkpoint, such as
        `save_pretrained`, raises an error from now on.

        Args:
            pruned: the new model.
            model: the one that was pruned.
            plan, graph: what was removed.
            verify: find the numbers and prove them; otherwise only those are taken that the plan states.

        Returns:
            New numbers of the configuration, notes, and why no checkpoint can be saved with what to do instead; ""
            where it can.
        """

    def inputs_like(self, specification: Sequence[Input], model: Any) -> Any:
        """Example inputs of the form, shapes and types that a plan stores, where a model lies."""

    def put_out(self, graph: Graph) -> dict[str, Tensor]:
        """Path of a module within the part that was traced → the one tensor that it puts out, with its labels."""

    def count(self, model: Any, example_inputs: Any) -> tuple[int, int]:
        """Parameters, and multiply-accumulates of one forward run that is counted as it happens."""

    def predict(self, model: Any, inputs: Any, *, batch_size: int = 256) -> Any:
        """Outputs of a classifier in inference mode: numpy floats of shape (N, K), for inputs of shape (N, ...)."""

    def seeded(self, build: Callable[[], Any], seed: int) -> Any:
        """What `build` gives when random numbers come from this seed; the caller's random state is left as it is."""

    def from_hub(self, library: str, name: str, *, pretrained: bool) -> Any:
        """A model of another library, such as timm, by its name."""

    def tensor(self, array: Any) -> Any:
        """A numpy array as an array of the framework."""

    def unsteady(self, model: Any, inputs: Any) -> tuple[str, str]:
        """Return why two runs in inference mode for one input differ, and what to do; empty texts if they agree."""

    def frozen(self, model: Any, like: Any) -> Any:
        """A copy in inference mode that takes no gradient, where another model lies."""

    def inferring(self, model: Any) -> Any:
        """The model itself, put into inference mode."""

    def expand(self, model: Any, layer: str, inputs: Any) -> list[str]:
        """The concrete layers that a text names, such as "layer*"; see `kirsch.frameworks.layers`."""

    def shapes(self, model: Any, inputs: Any) -> list[tuple[str, tuple[int, ...]]]:
        """Path and output shape of each module that runs once, in the order in which they end."""

    def dry_run(self, model: Any, layers: Sequence[str], inputs: Any) -> dict[str, Any]:
        """The values at some layers for one batch, in inference mode and without gradient."""

    def check_runs(self, model: Any, inputs: Any, *, training: bool = False) -> None:
        """Raise an error that describes the inputs if a model does not run on them; the model is left as it is.

        `training`: in training mode, a copy of it.
        """

    def unknown_arguments(self, model: Any, names: Sequence[str]) -> list[str]:
        """Those of some names that the forward of a model does not name among its arguments; none if it names none."""

    def squashed(self, model: Any, layer: str, inputs: Any, *, logarithm: bool = False) -> bool:
        """Whether the value at a layer comes out of a sigmoid or a softmax, seen in a run on some samples.

        `logarithm`: whether it is that of `logsigmoid` instead.
        """

    def watch(self, model: Any, layers: Sequence[str]) -> Any:
        """A callable inputs → values by layer, until its `close` is called."""

    def infer(self, run: Any, inputs: Any) -> Any:
        """What a model or a watch gives for one batch, without gradient, where the batch lies."""

    def adapter(self, name: str, student: Any, teacher: Any, options: dict[str, Any]) -> Any:
        """An adapter between two values; None where "auto" finds that none is needed."""

    def with_adapters(
        self,
        model: Any,
        layers: Sequence[str],
        adapters: dict[str, Any],
        pairs: dict[str, Any],
        logits: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> Any:
        """A student with its adapters: (inputs, teacher_source, ids) → values by layer, and joined values by adapter.

        `logits` makes logits of probabilities among the values by layer.

        It has `student`, `adapters` with a state by name, `parameters()` of both, `training`, `train(mode)`, `close()`.
        """

    def ensemble(self, models: Sequence[Any], combine: Callable[[list[Any]], Any]) -> Any:
        """Copies of several models as one, in inference mode; `combine` makes its scores of theirs."""

    def cohort(self, students: Sequence[Any]) -> Any:
        """Several students as one model, whose outputs "0", "1", ... are their scores."""

    def members(self, cohort: Any) -> list[Any]:
        """The students of a cohort, in their order."""

    def class_names(self, model: Any) -> list[str]:
        """What a model calls its classes, in their order; empty where it does not say."""

    def positions(self, model: Any, mask: Any) -> Any:
        """The mask (N, L) of what a model holds inside, of that of its inputs; another L where a model strides."""

    def student_of(self, model: Any) -> Any:
        """The student within a student, however it is wrapped; any other model itself."""

    def gradient_norms(self, student: Any, parts: dict[str, Any]) -> dict[str, float]:
        """How long the gradient of each part is for the student; empty where gradients are switched off.

        Raises:
            NumericError: a part gives the student no gradient.
        """

    def placed(self, batch: Batch, model: Any) -> Batch:
        """A batch as arrays of the framework, where a model lies."""

    def array_like(self, array: Any, like: Any) -> Any:
        """A numpy array where another array of the framework lies."""

    def train(self, model: Any, batches: Any, loss: Any, training: Training, hooks: TrainingHooks) -> Trained:
        """Train a copy of the model; the given model is left as it is."""

    def scales(self, model: Any) -> Iterable[Any]:
        """The scale of each batch normalization, as arrays that carry gradients."""

    def weights(self, model: Any) -> Iterable[Any]:
        """The weights of two or more axes, as arrays that carry gradients."""

    def exportable(self, model: Any, example_inputs: Any) -> Exportable:
        """Return a copy of a model in inference mode as a function of arrays, which can be written to a file."""

    def parameter_shapes(self, model: Any) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter of a model by its name."""

    def save_weights(self, model: Any, path: Path) -> None:
        """Write all parameters and buffers to a safetensors file."""

    def fingerprint(self, model: Any) -> str:
        """A sha256 over names, shapes, types and bytes of all that the model's state holds, on whatever device."""

    def load_weights(self, model: Any, path: Path) -> None:
        """Fill a model with the weights of `save_weights`; names, shapes and types must agree."""

    def take_types(self, model: Any, path: Path) -> bool:
        """Give a model's floating tensors the types that they have in a file of `save_weights`; says if any changed."""


class Exportable(Protocol):
    """A model as a function of arrays: one after the other in, one by name out.

    Attributes:
        name: of the model's class.
        inputs: name → example array.
        double: whether weights or inputs are float64.
    """

    name: str
    inputs: dict[str, NDArray[Any]]
    double: bool

    def outputs(self, inputs: Sequence[NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return all outputs for one batch by name."""

    def rounded(self, inputs: Sequence[NDArray[Any]], seed: int) -> dict[str, NDArray[Any]]:
        """Return the outputs where each operation's inputs are off by rounding, at random."""

    def unsteady(self, inputs: Sequence[NDArray[Any]]) -> tuple[str, str]:
        """Return why two runs for these inputs differ, and what to do; two empty texts if they do not."""

    def not_finite(self) -> str:
        """Return the first parameter or buffer that holds NaN or infinity, in words; "" if none does."""

    def write_onnx(self, path: Path, *, free_batch: bool = True) -> dict[str, Any]:
        """Write one ONNX file; gives opset, IR version, exporter, and name, shape and type of inputs and outputs."""


def framework_of(model: Any) -> Framework:
    """The framework that a model belongs to, found from the classes it derives from.

    Raises:
        ModelError: the model is of no framework that Kirsch knows.
        MissingExtraError: the framework's extra is not installed.
    """
    roots = {f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__}
    if "torch.nn.modules.module.Module" in roots:
        return pytorch()
    raise ModelError(
        f"A {type(model).__module__}.{type(model).__qualname__} is no model that Kirsch knows.",
        "It is not a torch.nn.Module.",
        "Give a torch.nn.Module.",
    )


def pytorch() -> Framework:
    """The PyTorch leaf, loaded when it is first needed."""
    try:
        framework: Framework = import_module("kirsch.frameworks.pytorch.framework").PyTorch()
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "torch", "for PyTorch models") from error
    return framework


def host(array: Any) -> NDArray[Any]:
    """An array of any framework, on any device, as a numpy array without gradient."""
    return np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)


@checked
def trace(
    model: Model,
    example_inputs: Inputs,
    *,
    outputs: str | Sequence[str] = (),
    decisions: Literal["refuse", "example"] = "refuse",
    scope: str = "",
    softmax: Literal["freeze", "kept"] = "freeze",
    as_graph: bool = False,
) -> Graph:
    """The coupling analysis of a model: what must stay together, what is free to go, what is frozen and why.

    Args:
        model: a model of any framework that Kirsch knows; it may live on the meta device. It is left as it is.
        example_inputs: one array, or a tuple of positional, or a dict of keyword arguments.
        outputs: names of the outputs whose shapes must stay: a key ("logits"), a place ("0") or a path ("aux.0"). By
            default all do, except hidden states and the like that stand beside logits or predictions.
        decisions: a forward that decides by the values of its input, such as `if x.sum() > 0` or the selection of boxes
            in a detector, takes another way for other inputs. "refuse": it is an error that names the line. "example":
            the way of the example inputs is followed; what other ways would do is not analyzed.
        scope: path of a part, "backbone", that is analyzed alone. What it is given is seen in a run of the whole; its
            inputs and outputs stay as they are. Plans for it are fractions of its own cost, and `kirsch.prune` gives
            the whole model with the part pruned in its place.
        softmax: a softmax over units adds up to one, so that taking some away changes all others; a choice of the k
            largest falls on others. "freeze": units that they span stay. "kept": they may go, and both are computed
            over what is kept, which is another function than the masked one; the verification says for how many
            operations that holds. Experts of a mixture go by it.
        as_graph: the pruned model is to be the traced program, a `torch.fx.GraphModule`, and not the module's own code.
            Integers in the code that hold units otherwise are then rewritten. It is for the shapes of the example
            inputs (the batch may differ where the code does not state it), and stays in inference mode: no dropout,
            and batch normalization by its running statistics.

    Returns:
        The `Graph` with `.groups`, `.blockers` and `.cost`.

    Raises:
        ModelError: the model cannot be copied or traced with these inputs; the sentence names where.
        UnknownNameError: it has no such output or part.
        UsageError: an argument is of the wrong kind, or `as_graph` is asked for a part, which must fit into the rest of
            the code.
    """
    if as_graph and scope:
        raise UsageError(
            "A part cannot be given as a graph.",
            "It must fit into the code of the rest.",
            "Trace the part by itself: kirsch.trace(model.part, its_inputs, as_graph=True).",
        )
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    tracing = Tracing(names, decisions, scope, softmax, as_graph)
    return framework_of(model).trace(model, example_inputs, tracing)
