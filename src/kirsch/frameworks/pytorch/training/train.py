"""The training loop, on Hugging Face Accelerate. A run that is resumed ends in the same bits on one CPU."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from kirsch.errors import CheckpointError, DataError, NumericError, UsageError
from kirsch.frameworks.data import Batch, SeededData, naming
from kirsch.frameworks.pytorch.features.student import StudentWithAdapters, gradient_norms, student_of
from kirsch.frameworks.pytorch.inference.predict import device_of, inference, on
from kirsch.frameworks.pytorch.modules.copying import copy_of
from kirsch.frameworks.pytorch.modules.unsupported import check_trainable
from kirsch.frameworks.pytorch.training.finite import MEND, check_given, not_finite, not_finite_names
from kirsch.frameworks.pytorch.training.optimizer import (
    Average,
    accelerator_for,
    check_schedule,
    learning_rate,
    optimizer_of,
    own_precision,
)
from kirsch.frameworks.training import Trained, TrainingState, doubts, require_labels, shares_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kirsch.frameworks.training import LossFunction, LossOutput, Training, TrainingHooks


def train(model: nn.Module, batches: Any, loss: LossFunction, training: Training, hooks: TrainingHooks) -> Trained:
    """Train a copy of a model.

    Started by `torchrun`, each process goes through all batches and takes its part of each, and what they end in is
    what one process that takes whole batches ends in, up to rounding, for models that do not relate samples to each
    other. A batch too small for that is taken as a whole by each.

    Args:
        model: left as it is; a `StudentWithAdapters` where more than the model is trained.
        batches: `SeededData` such as `ArrayData`, a DataLoader, or anything that gives what `Batch.of` takes each time
            it is gone through. It must not leave out what other processes take.
        loss: what a step minimizes.
        training: how.
        hooks: what the caller wants to see and decide.

    Raises:
        NumericError: a loss term gives no gradient on the first batch of an epoch, or numbers are not finite.
        DataError: an epoch has no batches, none of the targets of a step counts, or the schedule needs to know how many
            batches there are and the data cannot say.
        CheckpointError: the state to go on from is of another model, or of other settings, the number of epochs
            included, since the schedule follows from it.
        UsageError: no parameter of the model is to be trained, this machine lacks the precision, or each process has
            other batches.
        Stopped: `hooks.stop` asked for it; `hooks.save` has been called.
    """
    home = device_of(model)
    check_trainable(student_of(model))
    own = model if isinstance(model, StudentWithAdapters) else StudentWithAdapters(model)
    module: Any = copy_of(own, name=type(student_of(model)).__name__)
    try:
        with torch.random.fork_rng(), own_precision():
            run = _Run(module, batches, loss, training, hooks)
            run.go()
    finally:
        module.close()
    return Trained(run.result().to(home).eval(), run.history, run.first_batch)


@dataclasses.dataclass(frozen=True)
class _Part:
    """What a process takes of a batch, and whether that is the whole batch, which the others take as well."""

    batch: Batch
    whole: bool


class _Run:
    """One run and where it stands."""

    def __init__(
        self, module: StudentWithAdapters, batches: Any, loss: LossFunction, training: Training, hooks: TrainingHooks
    ) -> None:
        self.training, self.hooks, self.loss = training, hooks, loss
        self.module = module
        self.not_finite = check_given(module.student)
        self.accelerator = accelerator_for(training)
        optimizer = optimizer_of(module, training, type(module.student).__name__)
        self.average = Average(module.student, training.ema) if training.ema is not None else None
        self.model, self.optimizer = self.accelerator.prepare(module, optimizer)
        # Not prepared by Accelerate, whose parts of a short batch are filled up with samples that are trained on twice.
        self.batches = batches
        self.generators = _generators(batches) if isinstance(batches, torch.utils.data.DataLoader) else []
        self._share_generators()
        normalized = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())  # noqa: SLF001 - the common base has no public name
        self.least = self.accelerator.num_processes * (2 if normalized else 1)  # samples that can be shared out
        self.length = _length(batches)
        check_schedule(training, self.length)
        self.history: list[dict[str, Any]] = []
        self.first_batch: dict[str, Any] = {}
        self.epoch, self.batch = 0, 0
        self.sums: dict[str, float] = {}
        self.shares: dict[str, float] = {}
        self.doubted: set[str] = set()
        if hooks.resume is not None:
            self._restore(hooks.resume)
        self.draws = [generator.get_state() for generator in self.generators]  # as the epoch begins

    def result(self) -> nn.Module:
        """The student that is judged and given back."""
        return self.average.model if self.average is not None else self.module.student

    def go(self) -> None:
        while self.epoch < self.training.epochs:
            started = time.perf_counter()
            self.model.train()
            batches = self._rest_of_epoch()
            while window := list(itertools.islice(batches, self.training.accumulate)):
                self._step(window)
                self._obey_stop()
            self._end_epoch(time.perf_counter() - started)

    def _share_generators(self) -> None:
        """Let all processes draw what the first one draws."""
        if self.accelerator.num_processes > 1 and self.generators:
            states = broadcast_object_list([generator.get_state() for generator in self.generators])
            for generator, state in zip(self.generators, states, strict=True):
                generator.set_state(state)

    def _rest_of_epoch(self) -> Iterator[_Part]:
        """The batches of the epoch that are still to come, of each the part of this process.

        Whatever draws while it fetches – the order of a DataLoader, augmentation in its dataset – finds PyTorch's
        generators set from (seed, epoch, batch), so that nothing depends on where a run was cut. Batches that are done
        are fetched once more and passed over, since a loader draws while it fetches; `SeededData` needs no such thing.
        """
        start = self.batch if isinstance(self.batches, SeededData) else 0
        self._set_random(start)
        if isinstance(self.batches, SeededData):
            batches: Iterator[Any] = self.batches.epoch(self.training.seed, self.epoch, start)
        else:
            _set_epoch(self.batches, self.epoch)
            batches = iter(self.batches)
        done = self.batch  # it moves on while a window of batches is gathered
        for number in itertools.count(start):
            self._set_random(number)
            given = list(itertools.islice(batches, 1))
            if not given:
                return
            name = f"Batch {number + 1} of epoch {self.epoch + 1}"
            with naming(name):
                whole = Batch.of(*given)
                if not isinstance(self.batches, SeededData):  # of which all targets were looked at before
                    for text in self.loss.check(whole):
                        self.hooks.doubt(f"{name}: {text}")
            if number == 0 and self.accelerator.num_processes > 1:
                self._require_same(whole)
            if number >= done:
                yield self._own_part(whole)

    def _require_same(self, batch: Batch) -> None:
        """Refuse batches that are of one process alone, as of a sampler that leaves out what others take."""
        told = next(part for part in (batch.ids, batch.targets, batch.inputs) if part is not None)
        every = gather_object([(len(batch), _digest(told))])
        if any(other != every[0] for other in every):
            raise UsageError(
                f"The first batch of epoch {self.epoch + 1} is another one in each process.",
                "Each goes through all batches and takes its part of them, so that samples would be left out.",
                "Give all the same data: without DistributedSampler and the like, and with nothing drawn but from "
                "PyTorch's generators; or the numbers of the samples, if only their augmentation differs.",
            )

    def _own_part(self, batch: Batch) -> _Part:
        """What this process takes of a batch, on its device."""
        device, samples = self.accelerator.device, len(batch)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        whole = processes > 1 and samples < self.least

        def part(value: Any) -> Any:
            if processes == 1 or whole or not hasattr(value, "shape") or value.shape[:1] != (samples,):
                return on(device, value)
            return on(device, value[rank::processes])

        seeds = batch.seeds
        if seeds is not None and processes > 1 and not whole:  # they are read on the host
            seeds = seeds[rank::processes]
        inputs, targets, ids = (tree_map(part, given) for given in (batch.inputs, batch.targets, batch.ids))
        return _Part(Batch(inputs, targets, ids, batch.view, seeds), whole)

    def _set_random(self, batch: int, *, own: bool = False) -> None:
        """Set PyTorch's generators from the place in the run, and, for `own` draws as of dropout, from the process."""
        place = [self.training.seed, self.epoch, batch]
        if own and self.accelerator.num_processes > 1:
            place.append(self.accelerator.process_index)
        (state,) = np.random.SeedSequence(place).generate_state(1, np.uint64).tolist()
        # Where no device is, torch.manual_seed keeps a stack trace for the day that there is one: 0.3 ms a call.
        on_cpu = self.accelerator.device.type == "cpu"
        (torch.default_generator.manual_seed if on_cpu else torch.manual_seed)(state)

    def _step(self, window: Sequence[_Part]) -> None:
        """One step of the optimizer on the gradients of one or more batches, each item of which counts alike."""
        epoch = self.epoch + (self.batch / self.length if self.length else 0.0)
        rate = learning_rate(self.training, epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        once = [part.batch for part in window if not part.whole or self.accelerator.is_main_process]
        counts = self._over_processes(self.loss.counts(once))
        require_labels(counts, f"a step, at epoch {self.epoch + 1}, batch {self.batch + 1},")
        samples = sum(len(part.batch) for part in window)
        self.optimizer.zero_grad(set_to_none=True)
        for part in window:
            last = part is window[-1]
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                self._backward(part, epoch, counts, samples)
            self._count(len(part.batch))
        if self.training.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.training.clip_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.follow(self.module.student)

    def _backward(self, part: _Part, epoch: float, counts: dict[str, int], samples: int) -> None:
        """Gradients of one batch, of a step with these counts, in which this process has so many samples."""
        batch = part.batch
        if self.accelerator.num_processes > 1:
            self._set_random(self.batch, own=True)
        with self.accelerator.autocast(), naming(f"Batch {self.batch + 1} of epoch {self.epoch + 1}"):
            charge = self.loss(self.model, batch, epoch, counts)
        if not self.batch:
            self._look_at(charge)
        if not math.isfinite(float(charge.total.detach())):
            raise not_finite(self.module.student, batch, charge.parts, self.epoch + 1, self.batch + 1)
        # DDP divides the sum of their gradients by how many processes there are.
        times = 1 if part.whole else self.accelerator.num_processes
        self.accelerator.backward(charge.total * times)
        for name, value in {"loss": charge.total, **_prefixed(charge.parts), **_prefixed(charge.aside)}.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.detach()) * times * samples

    def _count(self, samples: int) -> None:
        self.sums["samples"] = self.sums.get("samples", 0.0) + samples
        self.batch += 1

    def _over_processes(self, counts: dict[str, int]) -> dict[str, int]:
        if self.accelerator.num_processes == 1:
            return counts
        total = self.accelerator.reduce(torch.tensor(list(counts.values()), device=self.accelerator.device), "sum")
        return dict(zip(counts, total.tolist(), strict=True))

    def _look_at(self, charge: LossOutput) -> None:
        """Each term must reach the student; its share of the loss and of the gradient is shown, epoch by epoch."""
        norms = self._norms(charge)
        self.shares = shares_of(norms)
        self.loss.balance(norms)
        if not self.epoch:
            value = float(charge.total.detach())
            shares = {n: float(p.detach()) / value if value else 0.0 for n, p in charge.parts.items()}
            self.first_batch = {"loss_shares": shares, "gradient_shares": self.shares}
            self._tell({"event": "first_batch", **self.first_batch})
        for name, sentence in doubts(self.shares, self.first_batch["gradient_shares"]).items():
            if name not in self.doubted:
                self.doubted.add(name)
                self.hooks.doubt(sentence, epoch=self.epoch + 1)

    def _norms(self, charge: LossOutput) -> dict[str, float]:
        """The length of each part's gradient over the batch, of which another process may have a part as well."""
        if self.accelerator.num_processes == 1:
            return gradient_norms(self.module, charge.parts)
        nothing = 0.0 * charge.total.detach()  # of a part that this process has no sample of
        names = dict.fromkeys(gather_object(list(charge.parts)))

        def summed(gradient: torch.Tensor) -> torch.Tensor:
            total: torch.Tensor = self.accelerator.reduce(gradient, "sum")
            return total

        return gradient_norms(self.module, {name: charge.parts.get(name, nothing) for name in names}, summed)

    def _end_epoch(self, seconds: float) -> None:
        samples = self.sums.pop("samples", 0.0)
        if not samples:
            raise DataError("An epoch had no batches.", fix="Give data that can be gone through more than once.")
        self._check_finite()
        means = {name: value / samples for name, value in self.sums.items()}
        record: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "loss": means.pop("loss"),
            "parts": {name.removeprefix("part."): mean for name, mean in means.items()},
            "gradient_shares": self.shares,
            "learning_rate": learning_rate(self.training, self.epoch + 0.5),
            "seconds": seconds,
        }
        if self.hooks.validate is not None:
            with inference(self.result()):
                found = self.hooks.validate(self.result())
            taken = sorted(found.keys() & record.keys())
            if taken:
                raise UsageError(
                    f"`validate` gives {taken[0]!r}, a name that the record of an epoch has already.",
                    fix="Give it another name.",
                )
            record.update(found)
        self.history.append(record)
        self.sums, self.batch, self.epoch = {}, 0, self.epoch + 1
        self.draws = [generator.get_state() for generator in self.generators]
        self._tell({"event": "epoch", "epochs": self.training.epochs, **record})
        if self.hooks.save is not None:
            self.hooks.save(self._state())
        self._obey_stop(saved=True)

    def _obey_stop(self, *, saved: bool = False) -> None:
        error = self.hooks.stop() if self.hooks.stop is not None else None
        if error is None:
            return
        if not saved and self.hooks.save is not None:
            self._check_finite()
            self.hooks.save(self._state())
        raise error

    def _check_finite(self) -> None:
        """What the last step left must be finite before it is judged, saved or given back."""
        name = next((name for name in not_finite_names(self.module.student) if name not in self.not_finite), None)
        if name is not None:
            raise NumericError(f"The {name} is no longer finite in epoch {self.epoch + 1}.", fix=MEND)

    def _tell(self, event: dict[str, Any]) -> None:
        if self.hooks.event is not None:
            self.hooks.event(event)

    def _state(self) -> TrainingState:
        arrays = {f"model.{name}": _array(value) for name, value in self.module.state_dict().items()}
        if self.average is not None:
            arrays |= {f"average.{name}": _array(value) for name, value in self.average.model.state_dict().items()}
        for number, entries in self.optimizer.state_dict()["state"].items():
            for name, value in entries.items():
                if isinstance(value, torch.Tensor):
                    arrays[f"optimizer.{number}.{name}"] = _array(value)
        arrays |= {f"generator.{number}": _array(state) for number, state in enumerate(self.draws)}
        values = {"epoch": self.epoch, "batch": self.batch, "sums": self.sums, "history": self.history}
        values |= {"first_batch": self.first_batch, "shares": self.shares, "loss": self.loss.state()}
        values["settings"] = self._settings()
        return TrainingState(arrays, copy.deepcopy(values))

    def _settings(self) -> dict[str, Any]:
        """What a run must have kept to go on, JSON-able."""
        stated = {n: list(v) if isinstance(v, tuple) else v for n, v in dataclasses.asdict(self.training).items()}
        return {**stated, "batches of an epoch": self.length}

    def _require_settings(self, state: TrainingState) -> None:
        before = state.values.get("settings", {})
        other = [
            f"{name} is {now!r}, and was {before[name]!r}"
            for name, now in self._settings().items()
            if name in before and before[name] != now
        ]
        if other:
            raise CheckpointError(
                f"The run was begun with other settings: {'; '.join(other)}.",
                "The optimizer and the order of the samples follow from them, and the schedule follows the number of "
                "epochs, too.",
                "Go on with those, or start the run anew.",
            )

    def _restore(self, state: TrainingState) -> None:
        _take_up(self.module, state, "model.")
        self._require_settings(state)
        if self.average is not None:
            _take_up(self.average.model, state, "average.")
        entries: dict[int, dict[str, torch.Tensor]] = {}
        for name, array in state.arrays.items():
            if name.startswith("optimizer."):
                _, number, key = name.split(".", 2)
                entries.setdefault(int(number), {})[key] = _tensor(array)
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})
        for place, generator in enumerate(self.generators):
            generator.set_state(_tensor(state.arrays[f"generator.{place}"]))
        self.epoch, self.batch = int(state.values["epoch"]), int(state.values["batch"])
        self.sums, self.history = dict(state.values["sums"]), list(state.values["history"])
        self.first_batch, self.shares = dict(state.values["first_batch"]), dict(state.values["shares"])
        self.loss.restore(state.values["loss"])


def _take_up(model: nn.Module, state: TrainingState, prefix: str) -> None:
    """Fill a model with the arrays of a state whose names begin so."""
    own = model.state_dict()
    stored = {n.removeprefix(prefix): a for n, a in state.arrays.items() if n.startswith(prefix)}
    if set(own) != set(stored) or any(tuple(own[n].shape) != a.shape for n, a in stored.items()):
        raise CheckpointError("The checkpoint is of another model.", fix="Start the run anew.")
    model.load_state_dict({name: _tensor(array, own[name].dtype) for name, array in stored.items()})


def _prefixed(parts: dict[str, Any]) -> dict[str, Any]:
    return {f"part.{name}": part for name, part in parts.items()}


def _length(batches: Any) -> int | None:
    """How many batches an epoch has; None where the data cannot say."""
    try:
        return len(batches)
    except TypeError:  # there is no __len__, or it is that of a DataLoader over an IterableDataset
        return None


def _digest(values: Any) -> str:
    """A text that is the same for the same values."""
    found = hashlib.sha256()
    for leaf in tree_leaves(values):
        array = _array(leaf) if isinstance(leaf, torch.Tensor) else leaf
        found.update(np.ascontiguousarray(array).tobytes() if hasattr(array, "shape") else repr(array).encode())
    return found.hexdigest()


def _set_epoch(batches: Any, epoch: int) -> None:
    """Tell the epoch to what wants to know it: the data, or what its loader draws from."""
    sampler = getattr(batches, "batch_sampler", None)
    owners: tuple[Any, ...] = batches, sampler, getattr(sampler, "sampler", None), getattr(batches, "dataset", None)
    for owner in owners:
        if hasattr(owner, "set_epoch"):
            owner.set_epoch(epoch)


def _generators(loader: torch.utils.data.DataLoader[Any]) -> list[torch.Generator]:
    """The generators of its own that a loader draws its order from, each once."""
    inner = getattr(loader.batch_sampler, "sampler", None)
    found = [getattr(owner, "generator", None) for owner in (loader, loader.sampler, loader.batch_sampler, inner)]
    return list({id(generator): generator for generator in found if generator is not None}.values())


def _array(value: torch.Tensor) -> Any:
    """A tensor as a numpy array with the same bits; bfloat16, which numpy lacks, as int16."""
    plain = value.detach().cpu()
    return (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy().copy()


def _tensor(array: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The tensor that `_array` stored; int16 means bfloat16 unless it is said to be int16."""
    value = torch.from_numpy(np.array(array))
    return value.view(torch.bfloat16) if value.dtype == torch.int16 and dtype != torch.int16 else value
