"""The training loop, on Hugging Face Accelerate.

On one CPU, the result of a resumed run is bit-identical to that of an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.utils._pytree import tree_map

from kirsch.data.batches import Batch, SeededData, naming
from kirsch.errors import CheckpointError, DataError, NumericError, UsageError
from kirsch.frameworks.pytorch.features.student import StudentWithAdapters, gradient_norms, student_of
from kirsch.frameworks.pytorch.inference.predict import array_to_device, device_of, inference
from kirsch.frameworks.pytorch.modules.copying import copy_of
from kirsch.frameworks.pytorch.modules.unsupported import check_trainable
from kirsch.frameworks.pytorch.training.epoch_losses import PART, TOTAL, EpochLosses, NotFiniteLosses, prefixed
from kirsch.frameworks.pytorch.training.finite import FIX, check_initial, not_finite, not_finite_names
from kirsch.frameworks.pytorch.training.loaders import generators_of, length_of, set_epoch
from kirsch.frameworks.pytorch.training.optimizer import (
    Average,
    accelerator_for,
    learning_rate,
    needs_length,
    optimizer_of,
    separate_precision,
)
from kirsch.frameworks.pytorch.training.seed import seeded
from kirsch.frameworks.pytorch.training.state import digest, load_arrays, to_array, to_tensor
from kirsch.frameworks.training import GradientShares, Trained, TrainingState, metrics_of, require_labels

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kirsch.frameworks.training import LossFunction, LossOutput, Training, TrainingHooks


def train(model: nn.Module, batches: Any, loss: LossFunction, training: Training, hooks: TrainingHooks) -> Trained:
    """Train a copy of a model.

    Under `torchrun`, each process iterates over all batches and trains on its part of each batch. Up to rounding, the
    result is that of a single process, for models whose outputs for a sample do not depend on the other samples. If a
    batch has too few samples for the processes, each process trains on all samples.

    Args:
        model: the model, which is not changed; a `StudentWithAdapters` to train adapters with it.
        batches: `SeededData` such as `ArrayData`, a DataLoader, or an iterable of values that `Batch.of` accepts. It
            must yield the same batches in each process.
        loss: the function to minimize.
        training: settings.
        hooks: callbacks of the caller.

    Raises:
        NumericError: a loss term has no gradient on the first batch of an epoch, or values are not finite.
        DataError: an epoch has no batches, or all targets of a step are masked.
        CheckpointError: the state to resume from belongs to another model or to other settings. The settings include
            the number of epochs, because the schedule depends on it.
        UsageError: no parameter is trainable, this machine lacks the precision, or the processes have different
            batches.
        Stopped: `hooks.stop` requested it, after a call of `hooks.save`.
    """
    home = device_of(model)
    with contextlib.ExitStack() as ending:
        if hooks.close is not None:
            ending.callback(hooks.close)
        ending.enter_context(torch.inference_mode(mode=False))  # before the copy, whose tensors need gradients
        ending.enter_context(torch.enable_grad())  # the caller may have disabled gradients
        check_trainable(student_of(model))
        wrapped = model if isinstance(model, StudentWithAdapters) else StudentWithAdapters(model)
        module: Any = copy_of(wrapped, name=type(student_of(model)).__name__)
        ending.callback(module.close)
        ending.enter_context(torch.random.fork_rng())
        ending.enter_context(separate_precision())
        run = _Run(module, batches, loss, training, hooks)
        run.train()
    return Trained(run.result().to(home).eval(), run.history, run.first_batch)


@dataclasses.dataclass(frozen=True)
class _Shard:
    """The samples of a batch on which one process trains; `replicated` if all processes train on all samples.

    `counts` is the result of `LossFunction.counts`, computed before the batch was moved to the device.
    """

    batch: Batch
    counts: dict[str, int]
    replicated: bool


class _Run:
    """The state of a training run."""

    def __init__(
        self, module: StudentWithAdapters, batches: Any, loss: LossFunction, training: Training, hooks: TrainingHooks
    ) -> None:
        self.training, self.hooks, self.loss = training, hooks, loss
        self.module = module
        self.not_finite = check_initial(module.student)
        self.accelerator = accelerator_for(training)
        optimizer = optimizer_of(module, training, type(module.student).__name__)
        self.average = Average(module.student, training.ema_decay) if training.ema_decay is not None else None
        self.model, self.optimizer = self.accelerator.prepare(module, optimizer)
        # Accelerate must not prepare the data: it would fill short batches with samples that then count twice.
        self.batches = batches
        self.generators = generators_of(batches) if isinstance(batches, torch.utils.data.DataLoader) else []
        self._synchronize_generators()
        normalized = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())  # noqa: SLF001 - the common base has no public name
        self.min_samples = self.accelerator.num_processes * (2 if normalized else 1)  # a smaller batch is not divided
        self.length = length_of(batches)
        if self.length is None and needs_length(training):
            states = [generator.get_state() for generator in self.generators]
            self.length = seeded(lambda: sum(1 for _ in batches), training.seed)
            for generator, state in zip(self.generators, states, strict=True):
                generator.set_state(state)
        self.history: list[dict[str, Any]] = []
        self.first_batch: dict[str, Any] = {}
        self.epoch, self.batch = 0, 0
        self.samples = 0  # completed in this epoch
        self.losses = EpochLosses(self.accelerator.device, {})
        self.last_batch: Any = None
        self.shares = GradientShares()
        if hooks.resume is not None:
            self._restore(hooks.resume)
        self.generator_states = [generator.get_state() for generator in self.generators]  # at the start of the epoch

    def result(self) -> nn.Module:
        """Return the student to validate and return: the moving average if there is one."""
        return self.average.model if self.average is not None else self.module.student

    def train(self) -> None:
        while self.epoch < self.training.epochs:
            started = time.perf_counter()
            self.model.train()
            shards = self._remaining_shards()
            while window := list(itertools.islice(shards, self.training.gradient_accumulation_steps)):
                self._step(window)
                if self.hooks.batch is not None:
                    self.hooks.batch(self.epoch + 1, self.training.epochs, self.batch, self.length)
                self._stop_if_requested()
            self._end_epoch(time.perf_counter() - started)

    def _synchronize_generators(self) -> None:
        """Set the generators of all processes to the states of the first process."""
        if self.accelerator.num_processes > 1 and self.generators:
            states = broadcast_object_list([generator.get_state() for generator in self.generators])
            for generator, state in zip(self.generators, states, strict=True):
                generator.set_state(state)

    def _remaining_shards(self) -> Iterator[_Shard]:
        """Yield this process's part of each remaining batch of the epoch.

        PyTorch's generators are set from (seed, epoch, batch) before each batch is loaded, because a DataLoader draws
        the order and the augmentation while it loads. A resumed run thus draws the same numbers. It loads and skips the
        completed batches, except of `SeededData`, which can start at any batch.
        """
        start = self.batch if isinstance(self.batches, SeededData) else 0
        self._seed(start)
        if isinstance(self.batches, SeededData):
            batches: Iterator[Any] = self.batches.epoch(self.training.seed, self.epoch, start)
        else:
            set_epoch(self.batches, self.epoch)
            batches = iter(self.batches)
        completed = self.batch  # self.batch increases while a window of batches is collected
        for number in itertools.count(start):
            self._seed(number)
            loaded = list(itertools.islice(batches, 1))
            if not loaded:
                return
            name = f"Batch {number + 1} of epoch {self.epoch + 1}"
            with naming(name):
                batch = Batch.of(*loaded)
                for text in self.loss.check(batch):
                    self.hooks.warn(f"{name}: {text}")
            if number == 0 and self.accelerator.num_processes > 1:
                self._require_same(batch)
            if number >= completed:
                yield self._shard(batch)

    def _require_same(self, batch: Batch) -> None:
        """Raise an error if processes have different batches, for example because of a DistributedSampler."""
        identity = next(part for part in (batch.ids, batch.targets, batch.inputs) if part is not None)
        digests = gather_object([(len(batch), digest(identity))])
        if any(other != digests[0] for other in digests):
            raise UsageError(
                f"The processes have different first batches in epoch {self.epoch + 1}.",
                "Each process iterates over all batches and trains on its part of each one. With different batches, "
                "samples would be left out.",
                "Remove DistributedSampler and similar samplers, and draw random numbers only from PyTorch's "
                "generators. If only the augmentation differs, give batches with the ids of the samples.",
            )

    def _shard(self, batch: Batch) -> _Shard:
        """Return the samples of a batch for this process, on its device."""
        device, samples = self.accelerator.device, len(batch)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        replicated = processes > 1 and samples < self.min_samples

        def take(value: Any) -> Any:
            if processes == 1 or replicated or not hasattr(value, "shape") or value.shape[:1] != (samples,):
                return value
            return value[rank::processes]

        seeds = batch.seeds
        if seeds is not None and processes > 1 and not replicated:  # seeds stay on the host
            seeds = seeds[rank::processes]
        inputs, targets, ids = (tree_map(take, values) for values in (batch.inputs, batch.targets, batch.ids))
        counts = self.loss.counts([Batch(inputs, targets, ids, batch.view, seeds)])
        inputs, targets, ids = (tree_map(partial(array_to_device, device), values) for values in (inputs, targets, ids))
        return _Shard(Batch(inputs, targets, ids, batch.view, seeds), counts, replicated)

    def _seed(self, batch: int, *, per_process: bool = False) -> None:
        """Seed PyTorch's generators from seed, epoch and batch; with `per_process`, from the process number, too."""
        entropy = [self.training.seed, self.epoch, batch]
        if per_process and self.accelerator.num_processes > 1:
            entropy.append(self.accelerator.process_index)
        (state,) = np.random.SeedSequence(entropy).generate_state(1, np.uint64).tolist()
        # Without a GPU, torch.manual_seed stores a stack trace for a later initialization of a GPU: 0.3 ms a call.
        on_cpu = self.accelerator.device.type == "cpu"
        (torch.default_generator.manual_seed if on_cpu else torch.manual_seed)(state)

    def _step(self, window: Sequence[_Shard]) -> None:
        """Make one optimizer step on the gradients of one or more batches. Each sample has the same weight."""
        epoch = self.epoch + (self.batch / self.length if self.length else 0.0)
        rate = learning_rate(self.training, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # A replicated shard has the same samples in all processes, so only the main process counts them.
        shard_counts = [shard.counts for shard in window if self.accelerator.is_main_process or not shard.replicated]
        counts = self._sum_over_processes({name: sum(each[name] for each in shard_counts) for name in window[0].counts})
        require_labels(counts, f"the step at epoch {self.epoch + 1}, batch {self.batch + 1}")
        samples = sum(len(shard.batch) for shard in window)
        self.optimizer.zero_grad(set_to_none=True)
        for shard in window:
            last = shard is window[-1]
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                self._backward(shard, epoch, counts, samples)
            self.samples += len(shard.batch)
            self.batch += 1
        if self.training.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.training.max_grad_norm)
        elif self.hooks.before_step is not None:
            self.accelerator.unscale_gradients()  # of float16; clipping includes it
        if self.hooks.before_step is not None:
            self.hooks.before_step(self.module.student)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.module.student)

    def _backward(self, shard: _Shard, epoch: float, counts: dict[str, int], samples: int) -> None:
        """Add the gradients of one batch.

        Args:
            shard: the samples of this process.
            epoch: time of the step, in epochs.
            counts: counts of the step over all processes; see `LossFunction`.
            samples: number of samples of this process in the step.
        """
        batch = shard.batch
        if self.accelerator.num_processes > 1:
            self._seed(self.batch, per_process=True)
        with self.accelerator.autocast(), naming(f"Batch {self.batch + 1} of epoch {self.epoch + 1}"):
            loss = self.loss(self.model, batch, epoch, counts, batch_counts=shard.counts)
        if not self.batch:
            self._check_shares(loss)
        # DDP averages the gradients of the processes, but the loss of the step is the sum of the losses of the shards.
        factor = 1 if shard.replicated else self.accelerator.num_processes
        values = {TOTAL: loss.total, **prefixed(loss.terms), **prefixed(loss.adapter_losses)}
        self.last_batch = batch
        with self._naming_losses():
            self.losses.add(self.batch + 1, factor * samples, values)
        self.accelerator.backward(loss.total * factor)

    def _sums(self) -> dict[str, float]:
        """Return the sums of the losses of the epoch by name."""
        with self._naming_losses():
            return self.losses.sums()

    @contextlib.contextmanager
    def _naming_losses(self) -> Iterator[None]:
        """Raise a `NumericError` that names the cause if losses are not finite."""
        try:
            yield
        except NotFiniteLosses as error:
            terms = {name.removeprefix(PART): value for name, value in error.terms.items() if name != TOTAL}
            raise not_finite(self.module.student, self.last_batch, terms, self.epoch + 1, error.batch) from None

    def _sum_over_processes(self, counts: dict[str, int]) -> dict[str, int]:
        """Return the sums of counts over the processes.

        With several processes, this waits for the accelerator once per step, because the loss is divided by these sums.
        """
        if self.accelerator.num_processes == 1:
            return counts
        total = self.accelerator.reduce(torch.tensor(list(counts.values()), device=self.accelerator.device), "sum")
        return dict(zip(counts, total.tolist(), strict=True))

    def _check_shares(self, loss: LossOutput) -> None:
        """Record the shares of the terms in loss and gradient, and warn of terms that are far too small or large."""
        norms = self._norms(loss)
        balanced = self.loss.balance(norms)
        warnings = self.shares.update(balanced)
        if not self.epoch:
            terms = {name: float(term.detach()) for name, term in loss.terms.items()}
            value = float(loss.total.detach())
            for name, norm in norms.items():
                if norm != balanced[name]:
                    value += terms[name] * (balanced[name] / norm - 1)
                    terms[name] *= balanced[name] / norm
            shares = {name: term / value if value else 0.0 for name, term in terms.items()}
            self.first_batch = {"loss_shares": shares, "gradient_shares": self.shares.latest}
            self._emit({"event": "first_batch", **self.first_batch})
        for sentence in warnings:
            self.hooks.warn(sentence, epoch=self.epoch + 1)

    def _norms(self, loss: LossOutput) -> dict[str, float]:
        """Return the norm of each term's gradient over the batch. Gradients are summed over the processes."""
        if self.accelerator.num_processes == 1:
            return gradient_norms(self.module, loss.terms)
        zero = 0.0 * loss.total.detach()  # for a term to which no sample of this process contributes
        names = dict.fromkeys(gather_object(list(loss.terms)))

        def summed(gradient: torch.Tensor) -> torch.Tensor:
            total: torch.Tensor = self.accelerator.reduce(gradient, "sum")
            return total

        return gradient_norms(self.module, {name: loss.terms.get(name, zero) for name in names}, summed)

    def _end_epoch(self, seconds: float) -> None:
        if not self.samples:
            raise DataError("An epoch had no batches.", fix="Give data that can be iterated over more than once.")
        self._check_finite()
        means = {name: value / self.samples for name, value in self._sums().items()}
        record: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "loss": means.pop("loss"),
            "terms": {name.removeprefix(PART): mean for name, mean in means.items()},
            "gradient_shares": self.shares.latest,
            "learning_rate": learning_rate(self.training, self.epoch + 0.5),
            "seconds": seconds,
        }
        if self.hooks.validate is not None:
            with inference(self.result()):
                metrics = metrics_of(self.hooks.validate, self.result())
            taken = sorted(metrics.keys() & record.keys())
            if taken:
                raise UsageError(
                    f"`validate` returns {taken[0]!r}, a name that the record of an epoch already has.",
                    fix="Rename the metric.",
                )
            record.update(metrics)
        self.history.append(record)
        self.losses = EpochLosses(self.accelerator.device, {})
        self.samples, self.batch, self.epoch = 0, 0, self.epoch + 1
        self.generator_states = [generator.get_state() for generator in self.generators]
        self._emit({"event": "epoch", "epochs": self.training.epochs, **record})
        if self.hooks.save is not None:
            self.hooks.save(self._state())
        self._stop_if_requested(saved=True)

    def _stop_if_requested(self, *, saved: bool = False) -> None:
        error = self.hooks.requested_stop()
        if error is None:
            return
        if not saved and self.hooks.save is not None:
            self._check_finite()
            self.hooks.save(self._state())
        raise error

    def _check_finite(self) -> None:
        """Raise an error if a weight is not finite, before the model is validated, saved or returned."""
        self._sums()  # raises an error with the first batch whose loss is not finite
        name = next((name for name in not_finite_names(self.module.student) if name not in self.not_finite), None)
        if name is not None:
            raise NumericError(f"The {name} is no longer finite in epoch {self.epoch + 1}.", fix=FIX)

    def _emit(self, event: dict[str, Any]) -> None:
        if self.hooks.event is not None:
            self.hooks.event(event)

    def _state(self) -> TrainingState:
        arrays = {f"model.{name}": to_array(value) for name, value in self.module.state_dict().items()}
        if self.average is not None:
            arrays |= {f"average.{name}": to_array(value) for name, value in self.average.model.state_dict().items()}
        for number, entries in self.optimizer.state_dict()["state"].items():
            for name, value in entries.items():
                if isinstance(value, torch.Tensor):
                    arrays[f"optimizer.{number}.{name}"] = to_array(value)
        arrays |= {f"generator.{number}": to_array(state) for number, state in enumerate(self.generator_states)}
        values: dict[str, Any] = {"epoch": self.epoch, "batch": self.batch, "samples": self.samples}
        values |= {"sums": self._sums(), "history": self.history}
        values |= {"first_batch": self.first_batch, "shares": self.shares.latest, "loss": self.loss.state()}
        values["settings"] = self._settings()
        return TrainingState(arrays, copy.deepcopy(values))

    def _settings(self) -> dict[str, Any]:
        """Return the settings that must be equal when a run is resumed, as JSON values."""
        settings = {n: list(v) if isinstance(v, tuple) else v for n, v in self.training.model_dump().items()}
        return {**settings, "batches of an epoch": self.length}

    def _require_settings(self, state: TrainingState) -> None:
        before = state.values.get("settings", {})
        changes = [
            f"{name} is {now!r}, and was {before[name]!r}"
            for name, now in self._settings().items()
            if name in before and before[name] != now
        ]
        if changes:
            raise CheckpointError(
                f"The run was started with other settings: {'; '.join(changes)}.",
                "The optimizer, the order of the samples and the learning rate depend on the settings, including the "
                "number of epochs.",
                "Resume with the previous settings, or start the run again.",
            )

    def _restore(self, state: TrainingState) -> None:
        load_arrays(self.module, state, "model.")
        self._require_settings(state)
        if self.average is not None:
            load_arrays(self.average.model, state, "average.")
        entries: dict[int, dict[str, torch.Tensor]] = {}
        for name, array in state.arrays.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".", 2)
                entries.setdefault(int(number), {})[key] = to_tensor(array)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})
        for index, generator in enumerate(self.generators):
            generator.set_state(to_tensor(state.arrays[f"generator.{index}"]))
        self.epoch, self.batch = int(state.values["epoch"]), int(state.values["batch"])
        self.samples = state.values["samples"]
        self.losses = EpochLosses(self.accelerator.device, state.values["sums"])
        self.history = list(state.values["history"])
        self.first_batch = dict(state.values["first_batch"])
        self.shares.restore(state.values["shares"], self.first_batch.get("gradient_shares", {}))
        self.loss.restore(state.values["loss"])
