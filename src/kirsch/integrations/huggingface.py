"""Distillation with the `Trainer` of transformers.

    trainer = DistillationTrainer(student, args, teacher=teacher, objective=kirsch.Objective.preset("causal"), ...)
    trainer.train()

or, for another Trainer class, `class MyTrainer(DistillationMixin, Seq2SeqTrainer)`. All losses, layers and adapters of
an objective are supported. The Trainer evaluates and saves the student alone. If no configuration describes a pruned
student, its checkpoints contain weights without a configuration: training can be resumed from them, but
`from_pretrained` cannot load them, and `save_model` raises an error; see `kirsch.prune`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from kirsch import strict_json
from kirsch.data.arrays import is_on_accelerator
from kirsch.data.batches import Batch
from kirsch.data.structure import IDS, TARGETS
from kirsch.distillation.checks import check_single_samples
from kirsch.distillation.distiller import Distiller
from kirsch.errors import CheckpointError, DataError, MissingExtraError, UsageError
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.pytorch.transformers.pretrained import refused
from kirsch.frameworks.training import require_labels

try:
    from accelerate.data_loader import DataLoaderShard
    from accelerate.utils import gather_object
    from transformers import Trainer
    from transformers.utils import SAFE_WEIGHTS_NAME
except ModuleNotFoundError as error:
    raise MissingExtraError(error.name or "transformers", "hf", "to distill in the Trainer of transformers") from error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kirsch.data.annotations import Regularizer
    from kirsch.distillation.objective import Objective

    Loop = Any
else:
    Loop = object

STATE = "distiller.safetensors"
"""File of a checkpoint with the state of the `Distiller`: adapters, and the rest of the state as metadata."""


class DistillationMixin(Loop):  # type: ignore[misc]  # the Trainer is not typed
    """Mixin that makes a Trainer minimize an objective; list it before the Trainer among the base classes.

    The model in training is the student with its adapters. The optimizer, DDP, gradient clipping and checkpoints
    therefore include the adapters; `save_model` writes the student alone. Each optimizer step minimizes the mean over
    all samples or positions that contribute to the loss, in all batches and processes of the step. The log contains
    each term of the loss, and the share of this term in the gradient of the first process.

    Args:
        args, kwargs: arguments of the Trainer; its model is the student. `compute_loss_func` and
            `label_smoothing_factor` are refused, since the objective defines the loss.
        teacher: see `kirsch.Distiller`. The copy of the teacher is kept until the trainer is deleted.
        objective: objective to minimize. Evaluation uses the student's own loss.
        regularizers: additional loss terms that depend on the student only.

    Attributes:
        distiller: the `kirsch.Distiller`, None before the first call of `train`. The seed of its adapters is
            `args.seed`.

    Raises:
        UsageError: the model is distributed in an unsupported way, or the Trainer defines a loss of its own.
        CheckpointError: a checkpoint to resume from has no adapters.
        DataError: all targets of a step are masked, or the data is empty.
    """

    loss_is_scaled_for_ga = True
    model_wrapped: Any

    def __init__(
        self, *args: Any, teacher: Any, objective: Objective, regularizers: Sequence[Regularizer] = (), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._distillation = (teacher, objective, regularizers)
        self.distiller: Distiller | None = None
        self._counts: dict[str, int] = {}  # denominators of the current step, summed over all processes
        self._batches: list[tuple[Any, dict[str, int]]] = []  # batches of the current step, with their counts
        # targets of the batch on its device, their version (PyTorch counts changes in place), and the counts
        self._prepared: tuple[Any, int, dict[str, int] | None] = (None, 0, None)
        self._parts: dict[str, Any] = {}
        self._to_log: dict[str, float] = {}
        self._check(objective)

    def _check(self, objective: Objective) -> None:
        """Refuse settings with which training would run, but not minimize the objective."""
        unsupported = {
            "FSDP": self.is_fsdp_enabled or self.is_fsdp_xla_enabled,
            "DeepSpeed": self.is_deepspeed_enabled,
            "DataParallel": self.args.n_gpu > 1,
            "a device map": self.is_model_parallel or self.is_distributed_loading_by_transformers,
            "tensor, context or sequence parallelism": self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1,
        }
        for name, used in unsupported.items():
            if used:
                raise UsageError(
                    f"The Trainer would distribute the student with {name}.",
                    "Distillation needs the whole student in each process.",
                    "Start one process per GPU with `torchrun --nproc-per-node=N`.",
                )
        if self.compute_loss_func is not None or self.label_smoother is not None:
            name = "label_smoothing_factor" if self.compute_loss_func is None else "compute_loss_func"
            raise UsageError(
                f"The Trainer has both `{name}` and an objective.",
                "The objective defines the loss.",
                f"Remove `{name}`, and use Objective(label_weight=..., label_smoothing=..., label_loss=...).",
            )
        if objective.balance == "gradient" and self.accelerator.num_processes > 1:
            raise UsageError(
                'The objective has balance="gradient", and there are several processes.',
                "Each process would weight the terms by the gradients of its own samples.",
                'Use balance="fixed", or one process.',
            )
        shifts, kind = _predicts_next(self.model), type(self.model).__name__
        if shifts and not objective.causal:
            raise UsageError(
                f"A {kind} predicts the next token, and the objective is not causal: it would compare the logits with "
                "the labels of the same positions.",
                fix='Use Objective.preset("causal"), or an objective with causal=True.',
            )
        if objective.causal and shifts is False:
            raise UsageError(
                f"The objective is causal, and a {kind} does not predict the next token.",
                fix="Use an objective with causal=False.",
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See the Trainer; the hooks on the student are removed afterwards, also after an exception."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._batches, self._prepared = [], (None, 0, None)
            if self.distiller is not None:
                self.distiller.close()
                self.accelerator.unwrap_model(self.model_wrapped, keep_fp32_wrapper=False)
            self.model_wrapped = self.model

    def _current_distiller(self) -> Distiller:
        """Return the distiller of the current model; the first call creates it from the first training batch."""
        if self.distiller is None or self.distiller.student is not self.model:
            teacher, objective, regularizers = self._distillation

            def fetch() -> tuple[Any, Any]:
                prepared = self.get_train_dataloader()
                loader = getattr(prepared, "base_dataloader", prepared)
                return loader, next(iter(loader), None)

            framework = framework_of(self.model)
            # `seeded` restores the random state afterwards, so that the order of the training samples does not change.
            loader, first = framework.training.seeded(fetch, self.args.seed)
            if first is None:
                raise DataError("The training data is empty.", fix="Give at least one batch.")
            if self.accelerator.num_processes == 1:
                check_single_samples(framework.inference, self.model, loader, Batch.of(first))
            self.distiller = Distiller(
                self.model, teacher, objective, first, seed=self.args.seed, regularizers=regularizers
            )
        return self.distiller

    def create_optimizer(self, model: Any = None) -> Any:  # noqa: ARG002 - the argument lacks the adapters
        """Create an optimizer of the parameters of student and adapters."""
        distiller = self._current_distiller()
        optimizer = super().create_optimizer(distiller.module)
        optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
        missing = [p for p in distiller.adapters.parameters() if p.requires_grad and id(p) not in optimized]
        if missing and self.lr_scheduler is not None:
            raise UsageError(
                "The optimizer given to the Trainer lacks the adapters of the objective.",
                "They cannot be added, since a scheduler is given, too.",
                "Give optimizer_cls_and_kwargs= instead of optimizers=, or the optimizer without a scheduler.",
            )
        if missing:
            optimizer.add_param_group({"params": missing})
        return optimizer

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        if not training:
            return super()._wrap_model(model, training=False, dataloader=dataloader)
        return self.accelerator.prepare_model(self._current_distiller().module)

    def get_train_dataloader(self) -> Any:
        """See the Trainer; its `training_step` moves the batches to the device, after their labels were counted."""
        loader = super().get_train_dataloader()
        if isinstance(loader, DataLoaderShard) and not self.args.accelerator_config.non_blocking:
            loader.device = None
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the batches of one step, and the number of labels in them over all processes.

        With several processes, this waits for the accelerator once per step, because the loss is divided by the sum of
        the counts of all processes.
        """
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        distiller = self._current_distiller()
        counts_of = [distiller.counts([batch]) for batch in samples]
        self._batches = [
            (batch, counts)
            for batch, counts in zip(samples, counts_of, strict=True)
            if not is_on_accelerator(Batch.of(batch).targets)
        ]
        self._counts = {name: sum(counts[name] for counts in counts_of) for name in distiller.counts([])}
        if self.accelerator.num_processes > 1:
            local = torch.tensor(list(self._counts.values()), device=device)
            self._counts = dict(zip(self._counts, self.accelerator.reduce(local, "sum").tolist(), strict=True))
        if samples:
            require_labels(self._counts, f"step {self.state.global_step + 1}")
        return samples, self._counts["labels"]

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = super()._prepare_inputs(inputs)
        counts = next((counts for batch, counts in self._batches if batch is inputs), None)
        if counts is not None:
            targets = Batch.of(prepared).targets
            self._prepared = targets, getattr(targets, "_version", 0), counts
        return prepared

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of the objective in training, and the student's own loss in evaluation.

        In training, `return_outputs` adds the `LossOutput`.
        """
        if model is self.model:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        distiller = self._current_distiller()
        targets, version, batch_counts = self._prepared
        self._prepared = None, 0, None  # keeps no batch on the device
        found = Batch.of(inputs).targets
        if found is not targets or getattr(found, "_version", 0) != version:  # a subclass has changed the labels
            batch_counts = None
        with self.accelerator.autocast():
            counts = self._counts if num_items_in_batch is not None else None
            loss = distiller(
                inputs, self.state.epoch or 0.0, step_counts=counts, batch_counts=batch_counts, module=model
            )
        processes = 1 if counts is None else self.accelerator.num_processes  # DDP averages gradients over processes
        for name, part in {**loss.terms, **loss.adapter_losses}.items():
            self._parts[name] = self._parts.get(name, 0.0) + part.detach() * processes
        return (loss.total * processes, loss) if return_outputs else loss.total * processes

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        steps = self.state.global_step - self._globalstep_last_logged
        if self.control.should_log and steps > 0:
            local = {name: float(part) / steps for name, part in self._parts.items()}
            gathered = gather_object([local])  # as objects, because a process may lack a term
            names = dict.fromkeys(name for parts in gathered for name in parts)
            mean = {f"loss/{name}": sum(parts.get(name, 0.0) for parts in gathered) / len(gathered) for name in names}
            self._to_log = mean | {
                f"gradient_share/{name}": share for name, share in self._current_distiller().shares.items()
            }
            self._parts = {}
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See the Trainer; the terms of the loss and their shares of the gradient are logged with the training loss."""
        if "loss" in logs:
            logs = logs | self._to_log
            self._to_log = {}
        super().log(logs, start_time)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """See the Trainer; ids are removed from the inputs, and the targets are renamed to "labels"."""
        arguments = {name: inputs[name] for name in inputs if name != IDS}
        target = next((name for name in TARGETS if name in arguments), None)
        if target is not None:
            arguments["labels"] = arguments.pop(target)
        return super().prediction_step(model, arguments, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # The Trainer removes other columns. Adapters with a memory bank, and stores, need the ids.
        self._signature_columns += [name for name in (IDS, *TARGETS) if name not in self._signature_columns]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """See the Trainer; a checkpoint contains only the weights if `save_pretrained` raises an error."""
        if not (_internal_call and refused(self.model)):
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            framework_of(self.model).inference.save_weights(self.model, folder / SAFE_WEIGHTS_NAME)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """See the Trainer; raises an error for a student whose checkpoints `from_pretrained` cannot load."""
        if refused(self.model):
            self.model.push_to_hub(self.args.hub_model_id)  # raises the error with the reason
        super().init_hf_repo(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = self._current_distiller().state_dict()
            adapters = {name: value.detach().contiguous() for name, value in state.pop("adapters").items()}
            save_file(adapters, Path(output_dir) / STATE, metadata={"state": json.dumps(state)})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:  # before the optimizer, whose error would not mention the adapters
            self._load_distiller(Path(checkpoint) / STATE)
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_distiller(self, path: Path) -> None:
        if not path.is_file():
            raise CheckpointError(
                f"{path.parent} has no {STATE}.",
                "It was saved with save_only_model=True, or by a Trainer without distillation.",
                "Start a new training from its student: from_pretrained, without resume_from_checkpoint.",
            )
        with safe_open(path, framework="pt") as file:
            adapters = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            text = (file.metadata() or {}).get("state", "")
        try:
            state = strict_json.parse(text, finite=False)  # gradient shares are NaN after an overflow
        except ValueError as error:
            raise CheckpointError(
                f"The state in {path} is damaged.", f"{error}.", "Resume from another checkpoint."
            ) from error
        self._current_distiller().load_state_dict({**state, "adapters": adapters})


class DistillationTrainer(DistillationMixin, Trainer):  # type: ignore[misc]  # the Trainer is not typed
    """Trainer of transformers that minimizes an objective; see `DistillationMixin`."""


def _predicts_next(model: Any) -> bool | None:
    """Return whether a model predicts the next token; None if unknown."""
    if not hasattr(model, "can_generate"):
        return None
    return bool(model.can_generate()) and not getattr(model.config, "is_encoder_decoder", False)
