"""Distilling in the `Trainer` of transformers.

    trainer = DistillationTrainer(student, args, teacher=teacher, objective=kirsch.Objective.preset("causal"), ...)
    trainer.train()

or, for a Trainer of one's own, `class Mine(DistillationMixin, Seq2SeqTrainer)`. All losses, places and adapters of an
objective work. The Trainer evaluates and saves the student alone. Checkpoints of a pruned student that no configuration
describes hold its weights without a configuration: training can be resumed from them, and `from_pretrained` refuses
them. `save_model` of such a student raises an error; see `kirsch.prune`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kirsch import strict_json
from kirsch.distillation.checks import check_last_batch
from kirsch.distillation.distiller import Distiller
from kirsch.errors import CheckpointError, DataError, MissingExtraError, UsageError
from kirsch.frameworks.data import Batch
from kirsch.frameworks.port import framework_of
from kirsch.frameworks.pytorch.transformers.pretrained import refused
from kirsch.frameworks.structure import IDS, TARGETS
from kirsch.frameworks.training import require_labels

try:
    from accelerate.utils import gather_object
    from transformers import Trainer
    from transformers.utils import SAFE_WEIGHTS_NAME
except ModuleNotFoundError as error:
    raise MissingExtraError(error.name or "transformers", "hf", "to distill in the Trainer of transformers") from error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kirsch.distillation.objective import Objective
    from kirsch.frameworks.annotations import Regularizer

    Loop = Any
else:
    Loop = object

STATE = "distiller.safetensors"
"""In a checkpoint: adapters, and as metadata what else a `Distiller` needs to go on."""


class DistillationMixin(Loop):  # type: ignore[misc]  # a Trainer stands behind it, and tells no types
    """Has a Trainer minimize an objective; to be named before the Trainer among the bases.

    The model that is trained is the student with its adapters, so that they are in the optimizer, in DDP, in the norm
    that gradients are clipped by, and in checkpoints; `save_model` writes the student. Batches of one step, and
    processes, are weighed by how many samples or positions count in them. The log has each term's part of the loss, and
    its share of the gradient in the first process.

    Args:
        args, kwargs: of the Trainer; the student is its model. What it says about losses has no place beside an
            objective: `compute_loss_func` and `label_smoothing_factor` are refused.
        teacher: see `kirsch.Distiller`. Its copy is let go of only with the trainer.
        objective: what is minimized. Evaluation reports the student's own loss.
        regularizers: further terms of the student alone.

    Attributes:
        distiller: the `kirsch.Distiller`, from the first call of `train` on; its adapters begin from `args.seed`.

    Raises:
        UsageError: model or loss are spread or stated in a way that distillation cannot follow.
        CheckpointError: a checkpoint to go on from lacks the adapters.
        DataError: no target of a step counts, or there is no batch.
    """

    loss_is_scaled_for_ga = True
    model_wrapped: Any

    def __init__(
        self, *args: Any, teacher: Any, objective: Objective, regularizers: Sequence[Regularizer] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._taught = (teacher, objective, regularizers)
        self.distiller: Distiller | None = None
        self._counts: dict[str, int] = {}  # of the step under way, over all processes
        self._parts: dict[str, Any] = {}
        self._to_log: dict[str, float] = {}
        self._check(objective)

    def _check(self, objective: Objective) -> None:
        """Refuse what would be wrong without a word."""
        spread = {
            "FSDP": self.is_fsdp_enabled or self.is_fsdp_xla_enabled,
            "DeepSpeed": self.is_deepspeed_enabled,
            "DataParallel": self.args.n_gpu > 1,
            "a device map": self.is_model_parallel or self.is_distributed_loading_by_transformers,
            "tensor, context or sequence parallelism": self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1,
        }
        for name, used in spread.items():
            if used:
                raise UsageError(
                    f"The Trainer would spread the student by {name}.",
                    "What stands beside it cannot follow there.",
                    "Start a process for each GPU, as `torchrun --nproc-per-node=N` does, each with the whole student.",
                )
        if self.compute_loss_func is not None or self.label_smoother is not None:
            name = "label_smoothing_factor" if self.compute_loss_func is None else "compute_loss_func"
            raise UsageError(
                f"The Trainer is given {name}, and an objective.",
                "The objective alone says what is minimized.",
                "Leave it out: Objective(label_weight=..., label_smoothing=..., label_loss=...).",
            )
        if objective.balance == "gradient" and self.accelerator.num_processes > 1:
            raise UsageError(
                "Each process would balance the terms by the gradients of its own samples.",
                fix='Take balance="fixed", or one process.',
            )
        shifts, kind = _predicts_next(self.model), type(self.model).__name__
        if shifts and not objective.causal:
            raise UsageError(
                f"A {kind} predicts the next token, and the objective holds its scores against the label of the same.",
                fix='Give Objective.preset("causal"), or an objective with causal=True.',
            )
        if objective.causal and shifts is False:
            raise UsageError(
                f"The objective is causal, and a {kind} does not predict the next token.",
                fix="Give an objective with causal=False.",
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See the Trainer; hooks are gone from the student afterwards, also after an exception."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.distiller is not None:
                self.distiller.close()
                self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
            self.model_wrapped = self.model

    def _bound(self) -> Distiller:
        """The distiller of the present model, made from the first batch that training will see."""
        if self.distiller is None or self.distiller.student is not self.model:
            teacher, objective, regularizers = self._taught

            def fetch() -> tuple[Any, Any]:
                whole = self.get_train_dataloader()
                loader = getattr(whole, "base_dataloader", whole)
                return loader, next(iter(loader), None)

            framework = framework_of(self.model)
            loader, first = framework.seeded(fetch, self.args.seed)  # the order of the run is left as it is
            if first is None:
                raise DataError("The training data is empty.", fix="Give at least one batch.")
            if self.accelerator.num_processes == 1:
                check_last_batch(framework, self.model, loader, Batch.of(first))
            self.distiller = Distiller(
                self.model, teacher, objective, first, seed=self.args.seed, regularizers=regularizers
            )
        return self.distiller

    def create_optimizer(self, model: Any = None) -> Any:  # noqa: ARG002 - the one that is given has no adapters
        """One over student and adapters."""
        found = self._bound()
        optimizer = super().create_optimizer(found.module)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [p for p in found.adapters.parameters() if p.requires_grad and id(p) not in held]
        if missing and self.lr_scheduler is not None:
            raise UsageError(
                "The optimizer and the scheduler given to the Trainer do not know the adapters of the objective.",
                "A scheduler cannot take up parameters that are added later.",
                "Give optimizer_cls_and_kwargs= instead of optimizers=, or the optimizer without a scheduler.",
            )
        if missing:
            optimizer.add_param_group({"params": missing})
        return optimizer

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        if not training:
            return super()._wrap_model(model, training=False, dataloader=dataloader)
        return self.accelerator.prepare_model(self._bound().module)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The batches of one step, and how many items count in them over all processes."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        own = self._bound().counts(samples)
        total = self.accelerator.reduce(torch.tensor(list(own.values()), device=device), "sum").tolist()
        self._counts = dict(zip(own, total, strict=True))
        if samples:
            require_labels(self._counts, f"step {self.state.global_step + 1}")
        return samples, self._counts["labels"]

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """What the objective charges the student in training, and its own loss otherwise.

        In training, `return_outputs` adds the `LossOutput`.
        """
        if model is self.model:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        found = self._bound()
        with self.accelerator.autocast():
            of = self._counts if num_items_in_batch is not None else None
            charge = found(inputs, self.state.epoch or 0.0, of=of, module=model)
        processes = 1 if of is None else self.accelerator.num_processes  # DDP divides the sum of gradients by it
        for name, part in {**charge.parts, **charge.aside}.items():
            self._parts[name] = self._parts.get(name, 0.0) + part.detach() * processes
        return (charge.total * processes, charge) if return_outputs else charge.total * processes

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        steps = self.state.global_step - self._globalstep_last_logged
        if self.control.should_log and steps > 0:
            own = {name: float(part) / steps for name, part in self._parts.items()}
            every = gather_object([own])  # a process may lack a part, so that no tensors could be gathered
            names = dict.fromkeys(name for parts in every for name in parts)
            mean = {f"loss/{name}": sum(parts.get(name, 0.0) for parts in every) / len(every) for name in names}
            self._to_log = mean | {f"gradient_share/{name}": share for name, share in self._bound().shares.items()}
            self._parts = {}
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See the Trainer; beside a training loss stand its parts and the shares of the gradient."""
        if "loss" in logs:
            logs = logs | self._to_log
            self._to_log = {}
        super().log(logs, start_time)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """See the Trainer; a student takes no numbers of samples, and calls its targets labels."""
        given = {name: inputs[name] for name in inputs if name != IDS}
        target = next((name for name in TARGETS if name in given), None)
        if target is not None:
            given["labels"] = given.pop(target)
        return super().prediction_step(model, given, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # Ids are for adapters that remember samples, and for stores.
        self._signature_columns += [name for name in (IDS, *TARGETS) if name not in self._signature_columns]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See the Trainer; a checkpoint to resume from holds the weights alone where `save_pretrained` is refused."""
        if not (_internal_call and refused(self.model)):
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            framework_of(self.model).save_weights(self.model, folder / SAFE_WEIGHTS_NAME)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """See the Trainer; no repository is made for a student whose checkpoints `from_pretrained` could not load."""
        if refused(self.model):
            self.model.push_to_hub(self.args.hub_model_id)  # raises the error that says why
        super().init_hf_repo(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = self._bound().state_dict()
            adapters = {name: value.detach().contiguous() for name, value in state.pop("adapters").items()}
            save_file(adapters, Path(output_dir) / STATE, metadata={"state": json.dumps(state)})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:  # first, since the optimizer cannot say whose parameters it lacks
            self._load_distiller(Path(checkpoint) / STATE)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_distiller(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(
                f"{path.parent} has no {STATE}.",
                "It was saved with save_only_model=True, or by a Trainer that does not distill.",
                "Start anew from the student in it: from_pretrained, without resume_from_checkpoint.",
            )
        with safe_open(path, framework="pt") as file:
            adapters = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
            stated = (file.metadata() or {}).get("state", "")
        try:
            state = strict_json.parse(stated, finite=False)  # a share of a gradient that overflowed is NaN
        except ValueError as error:
            raise CheckpointError(
                f"The state in {path} is damaged.", f"{error}.", "Take another checkpoint."
            ) from error
        self._bound().load_state_dict({**state, "adapters": adapters})


class DistillationTrainer(DistillationMixin, Trainer):  # type: ignore[misc]  # the same
    """The Trainer of transformers with an objective; see `DistillationMixin`."""


def _predicts_next(model: Any) -> bool | None:
    """Whether labels are those of the position before; None where a model does not say."""
    if not hasattr(model, "can_generate"):
        return None
    return bool(model.can_generate()) and not getattr(model.config, "is_encoder_decoder", False)
