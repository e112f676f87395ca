"""PyTorch as Kirsch's port sees it; each verb lives in the file of its name."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from kirsch.errors import KirschError, LoadError, ModelError, UnknownNameError, VerificationError, said
from kirsch.frameworks.pytorch import (
    adapters,
    cohort,
    configuration,
    count,
    dropping,
    ensemble,
    export,
    fingerprint,
    graph_module,
    hub,
    outputs,
    predict,
    pupil,
    regions,
    scope,
    sites,
    surgery,
    trace,
    train,
    verify,
    watch,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from kirsch.frameworks.data import Batch
    from kirsch.frameworks.training import Trained, Training, TrainingHooks
    from kirsch.graph.graph import Graph, InputSpec, Tracing
    from kirsch.graph.labels import Tensor
    from kirsch.graph.plan import Plan
    from kirsch.graph.proof import Verification


class PyTorch:
    """Fulfils `kirsch.frameworks.port.Framework`."""

    name = "pytorch"

    def trace(self, model: Any, example_inputs: Any, tracing: Tracing, *, of_part: bool = False) -> Graph:
        """See the port."""
        return trace.trace(model, example_inputs, tracing, of_part=of_part)

    def prune(self, model: Any, plan: Plan, graph: Graph, *, verify: bool) -> tuple[Any, Verification | None]:
        """See the port."""
        configuration.check(model, plan)
        keep, path = plan.keep(graph), graph.tracing.scope
        own = scope.part_of(model, path)
        make = graph_module.graph_module if graph.tracing.as_graph else surgery.cut
        pruned = make(own, graph, keep)
        gone = [block for block in graph.traced.blocks if block.path in plan.without]
        moved = dropping.drop(pruned, gone, graph.traced.args, graph.traced.options) if gone else None
        proof = self._prove(pruned, own, graph, keep, plan.without, moved) if verify else None
        return scope.with_part(model, path, pruned) if path else pruned, proof

    def _prove(
        self, pruned: Any, model: Any, graph: Graph, keep: Any, without: Sequence[str] = (), moved: Any = None
    ) -> Verification:
        try:
            return verify.verify(pruned, model, graph, keep, without, moved)
        except KirschError:
            raise
        except Exception as error:  # whatever the model's own code raises
            raise VerificationError(
                f"The pruned {graph.model_name} does not run.",
                said(error),
                "Exclude the layers that are unusual, and report the model; the model given is unchanged.",
            ) from error

    def configure(
        self, pruned: Any, plan: Plan, graph: Graph, *, verify: bool
    ) -> tuple[dict[str, float], tuple[str, ...]]:
        """See the port."""
        return configuration.configure(pruned, plan, graph, verify=verify)

    def inputs_like(self, specification: Sequence[InputSpec]) -> Any:
        """See the port."""
        generator = torch.Generator().manual_seed(0)
        values = {}
        for place, spec in enumerate(specification):
            dtype = getattr(torch, spec.dtype)
            values[spec.name or place] = (
                torch.randn(spec.shape, generator=generator).to(dtype)
                if dtype.is_floating_point
                else torch.randint(0, spec.high + 1, spec.shape, generator=generator).to(dtype)
            )
        return values if any(spec.name for spec in specification) else tuple(values.values())

    def put_out(self, graph: Graph) -> dict[str, Tensor]:
        """See the port."""
        return regions.put_out(graph.traced.states)

    def count(self, model: Any, example_inputs: Any) -> tuple[int, int]:
        """See the port."""
        return count.count(model, example_inputs)

    def predict(self, model: Any, inputs: Any, *, batch_size: int = 256) -> Any:
        """See the port."""
        return predict.predict(model, inputs, batch_size=batch_size)

    def infer(self, run: Any, inputs: Any) -> Any:
        """See the port."""
        return predict.infer(run, inputs)

    def expand(self, model: Any, site: str, inputs: Any) -> list[str]:
        """See the port."""
        return sites.expand(model, site, predict.tensors(inputs, model))

    def shapes(self, model: Any, inputs: Any) -> list[tuple[str, tuple[int, ...]]]:
        """See the port."""
        return sites.shapes(model, predict.tensors(inputs, model))

    def dry_run(self, model: Any, sites_: Sequence[str], inputs: Any) -> dict[str, Any]:
        """See the port."""
        return watch.dry_run(model, sites_, predict.tensors(inputs, model))

    def watch(self, model: Any, sites_: Sequence[str]) -> Any:
        """See the port."""
        return watch.Watch(model, sites_)

    def joint(self, name: str, student: Any, teacher: Any, options: dict[str, Any]) -> Any:
        """See the port."""
        shapes = [
            [part.shape for part in side] if isinstance(side, list) else side.shape for side in (student, teacher)
        ]
        dtype = (student[0] if isinstance(student, list) else student).dtype
        made = adapters.build(name, *shapes, options={"dtype": dtype, **options})
        return None if made is None else made.to((student[0] if isinstance(student, list) else student).device)

    def pupil(self, student: Any, sites_: Sequence[str], joints: dict[str, Any], pairs: dict[str, Any]) -> Any:
        """See the port."""
        return pupil.Pupil(student, sites_, joints, pairs)

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
        return pupil.student_of(model)

    def gradient_norms(self, pupil_: Any, parts: dict[str, Any]) -> dict[str, float]:
        """See the port."""
        return pupil.gradient_norms(pupil_, parts) if torch.is_grad_enabled() else {}

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

    def outputs(self, model: Any, inputs: Any) -> list[Any]:
        """See the port."""
        return predict.outputs(model, inputs)

    def frozen(self, model: Any, like: Any) -> Any:
        """See the port."""
        try:
            with torch.no_grad():  # for TorchScript, whose copies would depend on the original
                own = copy.deepcopy(model).eval()
        except RuntimeError as error:
            raise ModelError(
                f"The teacher, a {type(model).__name__}, cannot be copied.",
                said(error),
                "Keep no tensors in it that a forward computed: torch.nn.utils.parametrizations.weight_norm keeps "
                "none, in place of torch.nn.utils.weight_norm.",
            ) from error
        for parameter in own.parameters():  # one by one, as TorchScript wants it
            parameter.requires_grad = False
        return own.to(predict.device_of(like))

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

    def export_onnx(self, model: Any, example_inputs: Any, path: Path) -> dict[str, Any]:
        """See the port."""
        return export.export_onnx(model, example_inputs, path)

    def save_weights(self, model: Any, path: Path) -> None:
        """See the port."""
        safetensors.torch.save_model(model, str(path))

    def fingerprint(self, model: Any) -> str:
        """See the port."""
        return fingerprint.fingerprint(model)

    def load_weights(self, model: Any, path: Path) -> None:
        """See the port."""
        try:
            state = OrderedDict(safetensors.torch.load_file(str(path)))
            own = model.state_dict()
            # Some models (torchvision's MNASNet) ask for the version of their weights, which the file does not carry.
            state._metadata = getattr(own, "_metadata", None)  # type: ignore[attr-defined]  # noqa: SLF001 - as PyTorch does
            keys = model.load_state_dict(state, strict=False)
        except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
            lines = [line.strip() for line in str(error).splitlines()[:3]]  # a title, then what does not fit
            raise _unfit(model, path, " ".join(lines)) from error
        stored = {own[name].data_ptr() for name in state if name in own}  # tied tensors are stored once
        missing = [name for name in keys.missing_keys if own[name].data_ptr() not in stored]
        lacks = [f"The file lacks {', '.join(missing[:3])}."] if missing else []
        spare = [f"The model has no {', '.join(keys.unexpected_keys[:3])}."] if keys.unexpected_keys else []
        if lacks or spare:
            raise _unfit(model, path, " ".join([*lacks, *spare]))


def _unfit(model: Any, path: Path, why: str) -> LoadError:
    what = f"The weights in {path} do not fit a {type(model).__name__}."
    return LoadError(what, why, "Give the model that they were saved from.")
