"""The `Framework` of PyTorch. The methods call functions of the packages beside this file."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from kirsch.errors import KirschError, UnknownNameError, VerificationError, error_text
from kirsch.frameworks.pytorch.analysis import count, randomness, regions, stand_ins, trace
from kirsch.frameworks.pytorch.analysis.program import user_line
from kirsch.frameworks.pytorch.features import adapters, capture, cohort, ensemble, layers, squashed, student
from kirsch.frameworks.pytorch.inference import calling, outputs, predict
from kirsch.frameworks.pytorch.io import export, fingerprint, hub, weights
from kirsch.frameworks.pytorch.modules import copying, submodule, unsupported
from kirsch.frameworks.pytorch.surgery import cut as surgery
from kirsch.frameworks.pytorch.surgery import dropping, graph_module
from kirsch.frameworks.pytorch.training import train
from kirsch.frameworks.pytorch.transformers import configuration
from kirsch.frameworks.pytorch.verification import verify
from kirsch.graph.constants import AS_GRAPH
from kirsch.graph.verification import UNUSUAL_LAYERS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from kirsch.frameworks.data import Batch
    from kirsch.frameworks.training import Trained, Training, TrainingHooks
    from kirsch.graph.graph import Graph, Tracing
    from kirsch.graph.inputs import Input
    from kirsch.graph.labels import Tensor
    from kirsch.graph.plan import Plan
    from kirsch.graph.verification import Verification


class PyTorch:
    """Implements `kirsch.frameworks.port.Framework`."""

    name = "pytorch"

    def trace(self, model: Any, example_inputs: Any, tracing: Tracing, *, of_part: bool = False) -> Graph:
        """See the port."""
        return trace.trace(model, example_inputs, tracing, of_part=of_part)

    def prune(self, model: Any, plan: Plan, graph: Graph, *, verify: bool) -> tuple[Any, Verification | None]:
        """See the port."""
        configuration.check(model, plan)
        keep, path = plan.keep(graph), graph.tracing.module
        part = submodule.part_of(model, path)
        pruned = (graph_module.graph_module if graph.tracing.as_graph else surgery.cut)(part, graph, keep)
        dropped = [block for block in graph.traced.blocks if block.path in plan.without]
        moved = dropping.drop(pruned, dropped, graph.traced.args, graph.traced.options) if dropped else None
        verification = self._verify(pruned, part, graph, keep, plan.without, moved) if verify else None
        return submodule.with_part(model, path, pruned) if path else pruned, verification

    def _verify(
        self, pruned: Any, model: Any, graph: Graph, keep: Any, without: Sequence[str] = (), moved: Any = None
    ) -> Verification:
        try:
            return verify.verify(pruned, model, graph, keep, without, moved)
        except VerificationError as error:
            turned = _turned(graph, keep)
            if not turned:
                raise
            fix = f"Exclude {UNUSUAL_LAYERS}, or {AS_GRAPH}."
            raise VerificationError(error.what, f"{error.why}{turned}", fix) from error
        except KirschError:
            raise
        except Exception as error:  # whatever the model's own code raises
            traced = graph.traced
            both = predict.Call(traced.args, traced.options) if traced.args and traced.options else None
            self.check_runs(model, both or traced.options or traced.args)  # the inputs may be at fault
            line = user_line(error)
            raise VerificationError(
                f"The pruned {graph.model_name} does not run.",
                f"{error_text(error)}{f' It is raised at {line}.' if line else ''}{_turned(graph, keep)}",
                f"Exclude {UNUSUAL_LAYERS}, and report the model. The original is unchanged."
                if graph.tracing.as_graph
                else f"Exclude {UNUSUAL_LAYERS}, or {AS_GRAPH}. The original is unchanged.",
            ) from error

    def reweighted(self, model: Any, plan: Plan, graph: Graph) -> dict[str, float]:
        """See the port."""
        part = submodule.part_of(model, graph.tracing.module)
        return verify.computed(part, graph, plan.keep(graph), torch.float64)

    def configure(
        self, pruned: Any, model: Any, plan: Plan, graph: Graph, *, verify: bool
    ) -> tuple[dict[str, float], tuple[str, ...], str]:
        """See the port."""
        configured = configuration.configure(pruned, model, plan, graph, verify=verify)
        return configured.numbers, configured.notes, f"{configured.why} {configured.fix}".strip()

    def inputs_like(self, specification: Sequence[Input], model: Any) -> Any:
        """See the port."""
        return stand_ins.stand_ins(specification, model)

    def put_out(self, graph: Graph) -> dict[str, Tensor]:
        """See the port."""
        return regions.module_outputs(graph.traced.states)

    def count(self, model: Any, example_inputs: Any) -> tuple[int, int]:
        """See the port."""
        return count.count(model, example_inputs)

    def predict(self, model: Any, inputs: Any, *, batch_size: int = 256) -> Any:
        """See the port."""
        return predict.predict(model, inputs, batch_size=batch_size)

    def infer(self, run: Any, inputs: Any) -> Any:
        """See the port."""
        return predict.infer(run, inputs)

    def expand(self, model: Any, layer: str, inputs: Any) -> list[str]:
        """See the port."""
        return layers.expand(model, layer, predict.tensors(inputs, model))

    def shapes(self, model: Any, inputs: Any) -> list[tuple[str, tuple[int, ...]]]:
        """See the port."""
        return layers.shapes(model, predict.tensors(inputs, model))

    def dry_run(self, model: Any, layers_: Sequence[str], inputs: Any) -> dict[str, Any]:
        """See the port."""
        unsupported.check_values(model)
        return capture.dry_run(model, layers_, predict.tensors(inputs, model))

    def check_runs(self, model: Any, inputs: Any, *, training: bool = False) -> None:
        """See the port."""
        try:
            if not training:
                capture.dry_run(model, (), predict.tensors(inputs, model))
                return
            args, options = predict.arguments(predict.copied(predict.tensors(inputs, model)))
            with torch.random.fork_rng(), torch.no_grad():
                predict.called(copying.copy_of(model).train(), args, options)
        except (KirschError, MemoryError, OSError):  # the cause may be the machine, which the caller reports
            raise
        except Exception as error:  # whatever the model's own code raises
            raise calling.not_running(model, inputs, error) from error

    def unknown_arguments(self, model: Any, names: Sequence[str]) -> list[str]:
        """See the port."""
        return calling.unknown(model, names)

    def squashed(self, model: Any, layer: str, inputs: Any, *, logarithm: bool = False) -> bool:
        """See the port."""
        return squashed.squashed(model, layer, predict.tensors(inputs, model), logarithm=logarithm)

    def watch(self, model: Any, layers_: Sequence[str]) -> Any:
        """See the port."""
        return capture.FeatureCapture(model, layers_)

    def adapter(self, name: str, student: Any, teacher: Any, options: dict[str, Any]) -> Any:
        """See the port."""
        shapes = [
            [part.shape for part in side] if isinstance(side, list) else side.shape for side in (student, teacher)
        ]
        dtype = (student[0] if isinstance(student, list) else student).dtype
        adapter = adapters.build(name, *shapes, options={"dtype": dtype, **options})
        return None if adapter is None else adapter.to((student[0] if isinstance(student, list) else student).device)

    def with_adapters(
        self,
        model: Any,
        layers_: Sequence[str],
        adapters: dict[str, Any],
        pairs: dict[str, Any],
        logits: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> Any:
        """See the port."""
        return student.StudentWithAdapters(model, layers_, adapters, pairs, logits)

    def ensemble(self, models: Sequence[Any], combine: Callable[[list[Any]], Any]) -> Any:
        """See the port."""
        return ensemble.Ensemble(models, combine).eval()

    def cohort(self, students: Sequence[Any]) -> Any:
        """See the port."""
        return cohort.Cohort(students)

    def members(self, cohort_: Any) -> list[Any]:
        """See the port."""
        return list(cohort_.students)

    def class_names(self, model: Any) -> list[str]:
        """See the port."""
        return outputs.class_names(model)

    def positions(self, model: Any, mask: Any) -> Any:
        """See the port."""
        return outputs.positions(model, mask)

    def student_of(self, model: Any) -> Any:
        """See the port."""
        return student.student_of(model)

    def gradient_norms(self, model: Any, parts: dict[str, Any]) -> dict[str, float]:
        """See the port."""
        return student.gradient_norms(model, parts) if torch.is_grad_enabled() else {}

    def placed(self, batch: Batch, model: Any) -> Batch:
        """See the port."""
        inputs, targets, ids = (predict.tensors(part, model) for part in (batch.inputs, batch.targets, batch.ids))
        return dataclasses.replace(batch, inputs=inputs, targets=targets, ids=ids)

    def array_like(self, array: Any, like: Any) -> Any:
        """See the port."""
        return torch.as_tensor(array, device=like.device)

    def seeded(self, build: Callable[[], Any], seed: int) -> Any:
        """See the port."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return build()

    def from_hub(self, library: str, name: str, *, pretrained: bool) -> Any:
        """See the port."""
        if library != "timm":
            raise UnknownNameError("library of models", library, ["timm"])
        return hub.from_timm(name, pretrained=pretrained)

    def tensor(self, array: Any) -> Any:
        """See the port."""
        return torch.from_numpy(array)

    def unsteady(self, model: Any, inputs: Any) -> tuple[str, str]:
        """See the port."""
        args, options = predict.arguments(predict.tensors(inputs, model))
        with predict.inference(model):
            return randomness.unsteady(model, lambda: predict.run(model, args, options))

    def frozen(self, model: Any, like: Any) -> Any:
        """See the port."""
        unsupported.check_values(model)
        copied = copying.copy_of(model)
        copied.eval()
        for parameter in copied.parameters():  # TorchScript modules lack requires_grad_
            parameter.requires_grad = False
        return copied.to(predict.device_of(like))

    def inferring(self, model: Any) -> Any:
        """See the port."""
        return model.eval()

    def train(self, model: Any, batches: Any, loss: Any, training: Training, hooks: TrainingHooks) -> Trained:
        """See the port."""
        return train.train(model, batches, loss, training, hooks)

    def scales(self, model: Any) -> Iterator[Any]:
        """See the port."""
        norms = torch.nn.modules.batchnorm._BatchNorm  # noqa: SLF001 - the common base has no public name
        return (m.weight for m in model.modules() if isinstance(m, norms) and m.weight is not None)

    def weights(self, model: Any) -> Iterator[Any]:
        """See the port."""
        return (p for p in model.parameters() if p.dim() > 1)

    def exportable(self, model: Any, example_inputs: Any) -> export.TorchExportable:
        """See the port."""
        return export.TorchExportable(model, example_inputs)

    def parameter_shapes(self, model: Any) -> dict[str, tuple[int, ...]]:
        """See the port."""
        return {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}

    def save_weights(self, model: Any, path: Path) -> None:
        """See the port."""
        weights.save_weights(model, path)

    def fingerprint(self, model: Any) -> str:
        """See the port."""
        return fingerprint.fingerprint(model)

    def load_weights(self, model: Any, path: Path) -> None:
        """See the port."""
        weights.load_weights(model, path)

    def take_types(self, model: Any, path: Path) -> bool:
        """See the port."""
        return weights.take_types(model, path)


def _turned(graph: Graph, keep: Any) -> str:
    """Return a sentence on the comparisons in the model's code whose result changes with a cut; "" if none does."""
    lines = graph.turned(keep)
    if not lines:
        return ""
    several = len(lines) > 1
    return (
        f" The result{'s' * several} of the comparison{'s' * several} at {', '.join(lines[:3])} "
        f"change{'s' * (not several)} with the cut, so the forward may take another branch."
    )
