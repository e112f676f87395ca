"""Protocols that a framework package implements.

A `Framework` has one object for each of the seven protocols `Analysis`, `Calibration`, `Surgery`, `Masking`,
`Features`, `TrainingLoop` and `Inference`. `StudentWithAdapters` and `Exportable` are objects that methods of these
protocols return.

`model` is a model of the framework. `batch` and `inputs` hold numpy arrays or arrays of the framework. Features and
adapters are objects of the framework, which other packages only pass on. `kirsch.testing.FRAMEWORK_CHECKS` is the
conformance suite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from kirsch.frameworks.pruned_models import ChangedValues, PairedRuns

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from kirsch.data.batches import Batch
    from kirsch.frameworks.gates import Gating
    from kirsch.frameworks.masking import Masking
    from kirsch.frameworks.students import StudentWithAdapters
    from kirsch.frameworks.training import Trained, Training, TrainingHooks
    from kirsch.graph.configuration import Configurable
    from kirsch.graph.graph import Graph, Tracing
    from kirsch.graph.inputs import Input
    from kirsch.graph.labels import Labels
    from kirsch.graph.plan import Plan
    from kirsch.graph.verification import Verification
    from kirsch.registry import Registry


class Analysis(Protocol):
    """Analysis of models; the result is a `Graph`."""

    def trace(self, model: Any, example_inputs: Any, /, tracing: Tracing, *, of_part: bool = False) -> Graph:
        """Return the coupling analysis of a model, or of the part that `tracing` names; the model is not changed.

        Args:
            model: the model; its parameters may be on the meta device, without values.
            example_inputs: one array, a tuple of positional arguments, or a dict of keyword arguments.
            tracing: options of the analysis.
            of_part: whether the example inputs are inputs of the part, not of the whole model.
        """

    def count(self, model: Any, example_inputs: Any) -> tuple[int, int]:
        """Return the number of parameters, and the number of multiply-accumulates in one forward pass."""

    def inputs_like(self, specification: Sequence[Input], model: Any) -> Any:
        """Return random inputs of the structure, shapes and types that a plan stores, on the device of a model."""


class Calibration(PairedRuns, Protocol):
    """Runs of a traced model on calibration data, in inference mode. `graph.model` is the model.

    `batch` is a batch of inputs with targets, and `loss` a function of the model's logits and the targets. Arrays by
    parameter are arrays of the framework; tied parameters are listed once.
    """

    def outputs(self, graph: Graph, inputs: Any, without: Collection[str] = ()) -> list[NDArray[Any]]:
        """Return the floating outputs; the blocks named in `without` return their input unchanged."""

    def block_features(
        self, graph: Graph, inputs: Any, see: Callable[[str, NDArray[Any], NDArray[Any], bool], None]
    ) -> None:
        """Call `see(path, input, output, joined)` for each block, with float arrays of shape (..., features).

        `joined`: whether it is not known which axis holds the features, so that all positions of a sample are one row.
        """

    def weight_inputs(
        self, graph: Graph, inputs: Any, see: Callable[[str, int, Labels | None, Any, Any], None]
    ) -> set[str]:
        """Call `see(name, axis, labels, x, experts)` for each product of a weight with activations.

        Return the names of the weights that other operations use, and whose products are not passed to `see`, such as
        a weight from which another one is computed.

        `name` and `axis` are the weight and the axis over which the product is summed, `labels` the labels of the
        channels (None if they are frozen), and `x` the activations, shape (positions, channels). If the weight is a
        stack of the weights of experts, `experts` is the index on its axis 0 for each position; else None.
        """

    def weight_input_patches(
        self,
        graph: Graph,
        inputs: Any,
        names: Collection[str],
        see: Callable[[str, int, Labels | None, int, Any, Any], None],
    ) -> None:
        """Call `see(name, axis, labels, groups, x, experts)` for each product of a named weight with activations.

        `groups` is the number of groups of a convolution, else 1. `x` holds the activations that each output of the
        layer reads, shape (outputs, channels, kernel size), of one sample at a time for a kernel larger than 1. The
        other arguments are those of `weight_inputs`.
        """

    def layer_inputs(
        self, model: Any, inputs: Any, names: Collection[str], see: Callable[[str, int, int, Any], None]
    ) -> None:
        """Call `see(name, axis, groups, x)` for each product of a named weight with activations, in a run of a model.

        The model need not be traced. The arguments are those of `weight_input_patches`, without labels and experts.
        """

    def weights(self, graph: Graph) -> dict[str, Any]:
        """Return the parameters by path, without gradient."""

    def gradients(self, graph: Graph, batch: Batch, loss: Callable[[Any, Any], Any]) -> dict[str, Any]:
        """Return the gradient of the loss for each parameter, also for frozen parameters.

        The lookups of an embedding table that also multiplies activations, as in tied embeddings, do not count.
        """

    def hessian_products(
        self, graph: Graph, batch: Batch, loss: Callable[[Any, Any], Any], vectors: Iterable[Mapping[str, Any]]
    ) -> Iterator[dict[str, Any]]:
        """Yield the product of the Hessian of the loss with each vector, for the parameters of the vector.

        A vector has an array for each of some parameters, and is 0 for the others.
        """

    def loss_without(
        self, graph: Graph, batch: Batch, loss: Callable[[Any, Any], Any], keep: NDArray[np.bool_]
    ) -> float:
        """Return the loss after the removal of the components for which `keep` is False."""

    def outputs_without(
        self, graph: Graph, batches: Iterable[Any], keep: NDArray[np.bool_], without: Collection[str] = ()
    ) -> Iterator[list[NDArray[Any]]]:
        """Yield the floating outputs for each batch, the logits first, without some components and residual blocks.

        The model is cut once, and not traced again. Hidden states, attention weights and caches are not returned.
        """


class Surgery(ChangedValues, Protocol):
    """Application of plans to models; the result is the pruned model."""

    def prune(self, model: Any, plan: Plan, graph: Graph, *, verify: bool) -> tuple[Any, Verification | None]:
        """Return a copy of the model without the units that the plan removes, and its verification."""

    def changed_computed_weights(self, model: Any, plan: Plan, graph: Graph) -> dict[str, float]:
        """Return the modules whose computed weights, such as those of spectral normalization, change in the kept units.

        The result maps the path of a module to the size of its weight after the cut, relative to the size before.
        """

    def configurable(self, graph: Graph) -> Configurable | None:
        """Return the cuts that the configuration of the traced model can state; None if it has no configuration.

        The result searches for the cuts when they are first read.
        """

    def configure(
        self, pruned: Any, model: Any, plan: Plan, graph: Graph, *, verify: bool
    ) -> tuple[dict[str, float], tuple[str, ...], str]:
        """Update the configuration of a pruned model, if there is one, to the values of the pruned model.

        If no configuration describes the pruned model, the configuration is not changed, and the model's own methods
        that save a checkpoint, such as `save_pretrained`, raise an error from then on.

        Args:
            pruned: pruned model.
            model: model before pruning.
            plan, graph: plan that was applied, and the graph of the model.
            verify: search for the new values and verify them; otherwise use only the values that the plan states.

        Returns:
            New values of the configuration; notes; and the reason with a fix if no checkpoint can be saved, else "".
        """

    def vocabulary_size(self, model: Any) -> int:
        """Return the number of tokens of a language model; raises a ModelError if it cannot be changed."""

    def special_tokens(self, model: Any) -> set[int]:
        """Return the ids in the settings of a language model, such as that of the end of a text."""

    def trim_vocabulary(self, model: Any, keep: Sequence[int], inputs: Any) -> Any:
        """Return a copy of a language model with the tokens `keep` alone; see `kirsch.trim_vocabulary`."""


class Features(Protocol):
    """Features of layers, adapters, and models that wrap other models; layer names: see `kirsch.frameworks.layers`."""

    def expand(self, model: Any, text: str, inputs: Any) -> list[str]:
        """Return the layers that a pattern such as "layer*" matches."""

    def shapes(self, model: Any, inputs: Any) -> list[tuple[str, tuple[int, ...]]]:
        """Return path and output shape of each module that is called once, in the order in which the calls end."""

    def extract(self, model: Any, layers: Sequence[str], inputs: Any) -> dict[str, Any]:
        """Return the features of some layers for one batch, in inference mode and without gradient."""

    def capture(self, model: Any, layers: Sequence[str]) -> Any:
        """Return a function inputs → features by layer, for `Inference.infer`; its `close` removes the hooks."""

    def is_squashed(self, model: Any, layer: str, inputs: Any, *, logarithm: bool = False) -> bool:
        """Return whether the feature of a layer is the output of a sigmoid or a softmax, in a run on some samples.

        `logarithm`: return whether the feature is the output of `logsigmoid` instead.
        """

    def mean_gradients(self, model: Any, layers: Sequence[str], inputs: Any) -> dict[str, float]:
        """Return the norm of the gradient of the mean of each feature, in inference mode, for the trainable parameters.

        It is 0 for a feature that depends on no trainable parameter.
        """

    def sources_of(self, model: Any, layers: Sequence[str], candidates: Sequence[str], inputs: Any) -> list[str]:
        """Return the candidates from whose arrays the model computes one of the layers, so that gradients reach them.

        `candidates`: outputs as layer names, such as "output.embedding".
        """

    def feature_mask(self, model: Any, mask: Any) -> Any:
        """Return the mask (N, L') of a model's features from the mask (N, L) of its inputs."""

    def build_adapter(self, name: str, student: Any, teacher: Any, options: dict[str, Any]) -> Any:
        """Return an adapter between two features; None if "auto" finds that none is needed."""

    def with_adapters(
        self,
        model: Any,
        layers: Sequence[str],
        adapters: dict[str, Any],
        pairs: dict[str, Any],
        logits: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> StudentWithAdapters:
        """Return a student with adapters.

        Args:
            model: student.
            layers: layers whose features are returned, without patterns.
            adapters: adapters by name.
            pairs: the student's layer whose feature each adapter takes, by the adapter's name: a layer name, or a list
                or dict of layer names.
            logits: function from the features by layer to the same features, with probabilities converted to logits.
                None if no feature holds probabilities.
        """

    def student_of(self, model: Any) -> Any:
        """Return the student inside a wrapped student; other models are returned unchanged."""

    def ensemble(self, models: Sequence[Any], combine: Callable[[list[Any]], Any]) -> Any:
        """Return copies of several models as one model in inference mode.

        `combine` takes the list of their logits and returns one array.
        """

    def cohort(self, students: Sequence[Any]) -> Any:
        """Return several students as one model, whose outputs "0", "1", ... are their logits."""

    def members(self, cohort: Any) -> list[Any]:
        """Return the students of a cohort, in order."""


class TrainingLoop(Protocol):
    """Training, gradients, and random numbers."""

    def train(self, model: Any, batches: Any, loss: Any, training: Training, hooks: TrainingHooks) -> Trained:
        """Train a copy of the model; the model itself is not changed.

        `loss` is a `kirsch.frameworks.training.LossFunction`.
        """

    def seeded(self, build: Callable[[], Any], seed: int) -> Any:
        """Return the result of `build` with this random seed; the caller's random state is not changed."""

    def gradient_norms(self, student: Any, parts: dict[str, Any]) -> dict[str, float]:
        """Return the norm of each loss term's gradient for the student; empty if gradients are disabled.

        `parts`: the loss terms by name.

        Raises:
            NumericError: a loss term has no gradient for the student.
        """

    def batch_norm_scales(self, model: Any) -> Iterable[Any]:
        """Return the scale of each batch normalization, as arrays with gradients."""

    def weight_arrays(self, model: Any) -> Iterable[Any]:
        """Return the weights with two or more axes, as arrays with gradients."""

    def parameters_by_path(self, model: Any) -> dict[str, Any]:
        """Return the parameters of a model by path, as arrays with gradients; tied parameters once.

        The paths are those of the model that was traced, also if the model is wrapped for distributed training, for
        compilation or with adapters.
        """

    def gradients_by_path(self, model: Any) -> dict[str, Any]:
        """Return the gradients of the last backward pass by path, for the parameters that have one."""

    def gated(self, model: Any, gating: Gating) -> Any:
        """Return a copy of a model whose weights are multiplied by trainable gates, which are random in training mode.

        With `train_weights=False` of the gating, only the gates have gradients.
        """

    def gate_values(self, model: Any) -> NDArray[Any]:
        """Return the trainable numbers of a result of `gated`, times the speed of the gating, as float64."""

    def without_gates(self, model: Any) -> Any:
        """Return a copy of the model in a result of `gated`, whose weights include the factors used after training."""


class Inference(Protocol):
    """Running of models, conversion of arrays, weight files, and export."""

    def predict(self, model: Any, inputs: Any, *, batch_size: int = 256) -> NDArray[Any]:
        """Return the outputs of a classifier in inference mode, numpy (N, K), for inputs of shape (N, ...)."""

    def infer(self, run: Any, inputs: Any) -> Any:
        """Return the logits of a model, or the features of a `Features.capture`, for one batch, without gradient."""

    def inference_mode(self, model: Any) -> Any:
        """Set a model to inference mode, and return it."""

    def frozen_copy(self, model: Any, like: Any) -> Any:
        """Return a frozen copy of a model in inference mode, on the device of the model `like`."""

    def check_runs(self, model: Any, inputs: Any, *, training: bool = False) -> None:
        """Raise an error that describes the inputs if a model does not run on them; the model is not changed.

        `training`: whether to run a copy of the model in training mode.
        """

    def check_training_outputs(self, model: Any, inputs: Any) -> None:
        """Refuse a model whose logits in training mode are another output than its logits in inference mode.

        Raises:
            UsageError: the losses would train another output than the logits.
        """

    def named_arguments(self, model: Any, inputs: Any) -> Any:
        """Return a tuple or list of inputs as a dict by the names of the arguments of a model's `forward`.

        Other inputs, and those of a `forward` whose arguments have no names, are returned unchanged.
        """

    def unknown_arguments(self, model: Any, names: Sequence[str]) -> list[str]:
        """Return the names that are not arguments of a model's `forward`; empty if the arguments are unknown."""

    def nondeterminism(self, model: Any, inputs: Any) -> tuple[str, str]:
        """Return why two runs in inference mode on the same inputs differ, and the fix; empty strings if they agree."""

    def class_names(self, model: Any) -> list[str]:
        """Return the class names of a model, in order; empty if the model has none."""

    def from_numpy(self, arrays: Any, *, like: Any = None) -> Any:
        """Convert a numpy array, or each array in a tuple or dict, to an array of the framework.

        `like`: array of the framework on whose device the results are.
        """

    def to_device(self, batch: Batch, model: Any) -> Batch:
        """Return a batch as arrays of the framework, on the device of a model."""

    def parameter_shapes(self, model: Any) -> dict[str, tuple[int, ...]]:
        """Return the shape of each parameter of a model by name."""

    def fingerprint(self, model: Any) -> str:
        """Return the sha256 over names, shapes, types and bytes of all parameters and buffers."""

    def save_weights(self, model: Any, path: Path) -> None:
        """Write all parameters and buffers to a safetensors file."""

    def load_weights(self, model: Any, path: Path) -> None:
        """Load a file of `save_weights` into a model.

        Names and shapes must agree. The type of an array in the file must be that of the model's array, or a narrower
        floating-point type.
        """

    def match_dtypes(self, model: Any, path: Path) -> bool:
        """Convert a model's floating arrays to the types in a file of `save_weights`; return whether any changed."""

    def exportable(self, model: Any, example_inputs: Any) -> Exportable:
        """Return a copy of a model in inference mode as a function of arrays, which can be written to a file."""

    def from_hub(self, library: str, name: str, *, pretrained: bool) -> Any:
        """Return a model of another library, such as timm, by its name."""


@dataclass(frozen=True)
class Framework:
    """A framework: its name, one object for each of the seven protocols, and its built-in models.

    Args:
        name: name of the framework.
        analysis, calibration, surgery, masking, features, training, inference: implementations, such as modules with
            these functions.
        models: functions that build the built-in models, by names such as "digits:teacher".
    """

    name: str
    analysis: Analysis
    calibration: Calibration
    surgery: Surgery
    masking: Masking
    features: Features
    training: TrainingLoop
    inference: Inference
    models: Registry[Callable[[], Any]]


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

    def nondeterminism(self, inputs: Sequence[NDArray[Any]]) -> tuple[str, str]:
        """Return why two runs on these inputs differ, and the fix; empty strings if they agree."""

    def not_finite(self) -> str:
        """Return a description of the first parameter or buffer with NaN or infinity; "" if all are finite."""

    def write_onnx(self, path: Path, *, free_batch: bool = True) -> dict[str, Any]:
        """Write an ONNX file; return opset, IR version, exporter, and name, shape and type of inputs and outputs."""
