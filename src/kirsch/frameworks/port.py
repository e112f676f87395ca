"""Protocol that each framework implements, and the framework of a model."""

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
    from kirsch.graph.inputs import Input
    from kirsch.graph.labels import Tensor
    from kirsch.graph.plan import Plan
    from kirsch.graph.verification import Verification


class Framework(Protocol):
    """Operations that each framework implements; `model` is a model of the framework."""

    name: str

    def trace(self, model: Any, example_inputs: Any, tracing: Tracing, *, of_part: bool = False) -> Graph:
        """Return the coupling analysis of a model, or of the part that `tracing` names; the model is not changed.

        `of_part`: whether the example inputs are those of the part.
        """

    def prune(self, model: Any, plan: Plan, graph: Graph, *, verify: bool) -> tuple[Any, Verification | None]:
        """Return a copy of the model without the units that the plan removes, and its verification."""

    def reweighted(self, model: Any, plan: Plan, graph: Graph) -> dict[str, float]:
        """Return path → relative change, of modules whose computed weights change for the kept units."""

    def configure(
        self, pruned: Any, model: Any, plan: Plan, graph: Graph, *, verify: bool
    ) -> tuple[dict[str, float], tuple[str, ...], str]:
        """Update the configuration of a pruned model, if it has one, so that it describes the pruned model.

        If no configuration describes the pruned model, the configuration is not changed, and the model's own methods
        that save a checkpoint, such as `save_pretrained`, raise an error from then on.

        Args:
            pruned: pruned model.
            model: model before pruning.
            plan, graph: plan that was applied, and the graph of the model.
            verify: search for the new values and verify them; otherwise use only the values that the plan states.

        Returns:
            New values of the configuration, notes, and the reason with a fix if no checkpoint can be saved; "" if it
            can.
        """

    def inputs_like(self, specification: Sequence[Input], model: Any) -> Any:
        """Return example inputs of the form, shapes and types that a plan stores, on the device of a model."""

    def put_out(self, graph: Graph) -> dict[str, Tensor]:
        """Return path → labeled output tensor, of the modules in the traced part that return one tensor."""

    def count(self, model: Any, example_inputs: Any) -> tuple[int, int]:
        """Return the parameters, and the multiply-accumulates counted during one forward pass."""

    def predict(self, model: Any, inputs: Any, *, batch_size: int = 256) -> Any:
        """Return the outputs of a classifier in inference mode, numpy (N, K), for inputs of shape (N, ...)."""

    def seeded(self, build: Callable[[], Any], seed: int) -> Any:
        """Return the result of `build` with this random seed; the caller's random state is not changed."""

    def from_hub(self, library: str, name: str, *, pretrained: bool) -> Any:
        """Return a model of another library, such as timm, by its name."""

    def tensor(self, array: Any) -> Any:
        """Convert a numpy array to an array of the framework."""

    def unsteady(self, model: Any, inputs: Any) -> tuple[str, str]:
        """Return why two runs in inference mode on the same inputs differ, and the fix; empty strings if they agree."""

    def frozen(self, model: Any, like: Any) -> Any:
        """Return a frozen copy of a model in inference mode, on the device of the model `like`."""

    def inferring(self, model: Any) -> Any:
        """Set a model to inference mode, and return it."""

    def expand(self, model: Any, layer: str, inputs: Any) -> list[str]:
        """Return the layers that match a pattern such as "layer*"; see `kirsch.frameworks.layers`."""

    def shapes(self, model: Any, inputs: Any) -> list[tuple[str, tuple[int, ...]]]:
        """Return path and output shape of each module that is called once, in the order in which the calls end."""

    def dry_run(self, model: Any, layers: Sequence[str], inputs: Any) -> dict[str, Any]:
        """Return the features of some layers for one batch, in inference mode and without gradient."""

    def check_runs(self, model: Any, inputs: Any, *, training: bool = False) -> None:
        """Raise an error that describes the inputs if a model does not run on them; the model is not changed.

        `training`: whether to run a copy of the model in training mode.
        """

    def unknown_arguments(self, model: Any, names: Sequence[str]) -> list[str]:
        """Return the names that are not arguments of a model's forward; empty if its arguments are not named."""

    def squashed(self, model: Any, layer: str, inputs: Any, *, logarithm: bool = False) -> bool:
        """Return whether the feature of a layer is the output of a sigmoid or a softmax, in a run on some samples.

        `logarithm`: whether it is the output of `logsigmoid` instead.
        """

    def watch(self, model: Any, layers: Sequence[str]) -> Any:
        """Return a function inputs → features by layer; its `close` removes the hooks."""

    def infer(self, run: Any, inputs: Any) -> Any:
        """Return the outputs of a model, or the features of a `watch`, for one batch, without gradient."""

    def adapter(self, name: str, student: Any, teacher: Any, options: dict[str, Any]) -> Any:
        """Return an adapter between two features; None if "auto" finds that none is needed."""

    def with_adapters(
        self,
        model: Any,
        layers: Sequence[str],
        adapters: dict[str, Any],
        pairs: dict[str, Any],
        logits: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> Any:
        """Return a student with adapters: (inputs, teacher_source, ids) → features by layer, adapted ones by adapter.

        `logits` converts probabilities among the features to logits.

        The result has `student`, `adapters` with a state by name, `parameters()` of both, `training`, `train(mode)` and
        `close()`.
        """

    def ensemble(self, models: Sequence[Any], combine: Callable[[list[Any]], Any]) -> Any:
        """Return copies of several models as one model in inference mode; `combine` maps their logits to one array."""

    def cohort(self, students: Sequence[Any]) -> Any:
        """Return several students as one model, whose outputs "0", "1", ... are their logits."""

    def members(self, cohort: Any) -> list[Any]:
        """Return the students of a cohort, in order."""

    def class_names(self, model: Any) -> list[str]:
        """Return the class names of a model, in order; empty if the model has none."""

    def positions(self, model: Any, mask: Any) -> Any:
        """Return the mask (N, L') of a model's features from the mask (N, L) of its inputs."""

    def student_of(self, model: Any) -> Any:
        """Return the student inside a wrapped student; other models are returned unchanged."""

    def gradient_norms(self, student: Any, parts: dict[str, Any]) -> dict[str, float]:
        """Return the norm of the gradient of each part for the student; empty if gradients are disabled.

        Raises:
            NumericError: a part has no gradient for the student.
        """

    def placed(self, batch: Batch, model: Any) -> Batch:
        """Return a batch as arrays of the framework, on the device of a model."""

    def array_like(self, array: Any, like: Any) -> Any:
        """Convert a numpy array to an array of the framework, on the device of another array."""

    def train(self, model: Any, batches: Any, loss: Any, training: Training, hooks: TrainingHooks) -> Trained:
        """Train a copy of the model; the model itself is not changed."""

    def scales(self, model: Any) -> Iterable[Any]:
        """Return the scale of each batch normalization, as arrays with gradients."""

    def weights(self, model: Any) -> Iterable[Any]:
        """Return the weights with two or more axes, as arrays with gradients."""

    def exportable(self, model: Any, example_inputs: Any) -> Exportable:
        """Return a copy of a model in inference mode as a function of arrays, which can be written to a file."""

    def parameter_shapes(self, model: Any) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter of a model by name."""

    def save_weights(self, model: Any, path: Path) -> None:
        """Write all parameters and buffers to a safetensors file."""

    def fingerprint(self, model: Any) -> str:
        """Return the sha256 over names, shapes, types and bytes of all parameters and buffers."""

    def load_weights(self, model: Any, path: Path) -> None:
        """Load the weights of `save_weights` into a model; names, shapes and types must agree."""

    def take_types(self, model: Any, path: Path) -> bool:
        """Convert a model's floating tensors to the types in a file of `save_weights`; return whether any changed."""


class Exportable(Protocol):
    """Model as a function that takes positional arrays and returns arrays by name.

    Attributes:
        name: name of the model's class.
        inputs: example arrays by name.
        double: whether weights or inputs are float64.
    """

    name: str
    inputs: dict[str, NDArray[Any]]
    double: bool

    def outputs(self, inputs: Sequence[NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return all outputs for one batch by name."""

    def rounded(self, inputs: Sequence[NDArray[Any]], seed: int) -> dict[str, NDArray[Any]]:
        """Return the outputs with random rounding errors in the inputs of each operation."""

    def unsteady(self, inputs: Sequence[NDArray[Any]]) -> tuple[str, str]:
        """Return why two runs on these inputs differ, and the fix; empty strings if they agree."""

    def not_finite(self) -> str:
        """Return a description of the first parameter or buffer with NaN or infinity; "" if all are finite."""

    def write_onnx(self, path: Path, *, free_batch: bool = True) -> dict[str, Any]:
        """Write an ONNX file; return opset, IR version, exporter, and name, shape and type of inputs and outputs."""


def framework_of(model: Any) -> Framework:
    """Return the framework of a model, by its base classes.

    Raises:
        ModelError: the model belongs to no supported framework.
        MissingExtraError: the framework's extra is not installed.
    """
    bases = {f"{base.__module__}.{base.__qualname__}" for base in type(model).__mro__}
    if "torch.nn.modules.module.Module" in bases:
        return pytorch()
    raise ModelError(
        f"A {type(model).__module__}.{type(model).__qualname__} is not a model of a supported framework.",
        fix="Give a torch.nn.Module.",
    )


def pytorch() -> Framework:
    """Return the PyTorch framework, which is imported on first use."""
    try:
        framework: Framework = import_module("kirsch.frameworks.pytorch.framework").PyTorch()
    except ModuleNotFoundError as error:
        raise MissingExtraError(error.name or "torch", "torch", "for PyTorch models") from error
    return framework


def host(array: Any) -> NDArray[Any]:
    """Convert an array of any framework and device to a numpy array without gradient."""
    return np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)


@checked
def trace(
    model: Model,
    example_inputs: Inputs,
    *,
    outputs: str | Sequence[str] = (),
    decisions: Literal["refuse", "example"] = "refuse",
    module: str = "",
    softmax: Literal["freeze", "kept"] = "freeze",
    as_graph: bool = False,
) -> Graph:
    """Analyze a model: groups of units that must be removed together, and frozen units with the reasons.

    Args:
        model: model of a supported framework; it may be on the meta device. It is not changed.
        example_inputs: one array, a tuple of positional arguments, or a dict of keyword arguments.
        outputs: names of the outputs whose shapes must not change: a key ("logits"), an index ("0") or a path
            ("aux.0"). By default all outputs, except hidden states and the like beside logits or predictions.
        decisions: treatment of code that branches on values of its input, such as `if x.sum() > 0` or the selection of
            boxes in a detector. "refuse": raise an error that names the line. "example": follow the branch of the
            example inputs; other branches are not analyzed.
        module: path of a part, such as "backbone", that is analyzed alone. The inputs of the part are recorded in a run
            of the whole model; shapes of its inputs and outputs do not change. Goals of plans are fractions of the cost
            of the part, and `kirsch.prune` returns the whole model with the pruned part.
        softmax: treatment of units under a softmax, whose removal changes all other values, or under a selection of the
            k largest, which then selects others. "freeze": these units are kept. "kept": these units may be removed,
            and softmax or selection run over the kept units, which is a different function from the masked model; the
            verification reports the number of such operations. Needed to remove experts of a mixture.
        as_graph: whether the pruned model is the traced program, a `torch.fx.GraphModule`, in place of the module's own
            code. Integers in the code that would freeze units are then rewritten. The program is valid for the shapes
            of the example inputs (the batch size may differ unless the code contains it) and stays in inference mode:
            no dropout, and batch normalization with running statistics.

    Returns:
        The `Graph` with `.groups`, `.blockers` and `.cost`.

    Raises:
        ModelError: the model cannot be copied or traced with these inputs; names the line of code.
        UnknownNameError: the model has no such output or part.
        UsageError: an argument has the wrong type, or `as_graph` is combined with `module`.
    """
    if as_graph and module:
        raise UsageError(
            "`as_graph` of kirsch.trace cannot be combined with `module`.",
            "A part must fit into the code of the rest of the model.",
            "Trace the part by itself: kirsch.trace(model.part, inputs_of_part, as_graph=True).",
        )
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    tracing = Tracing(names, decisions, module, softmax, as_graph)
    return framework_of(model).trace(model, example_inputs, tracing)
