"""The training loop, on Hugging Face Accelerate. A run that is resumed ends in the same bits on one CPU."""

from __future__ import annotations

import copy
import itertools
import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from kirsch.errors import CheckpointError, DataError, NumericError, UsageError
from kirsch.frameworks.pytorch.predict import inference
from kirsch.frameworks.training import ArrayData, Trained, TrainingState

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kirsch.frameworks.training import LossFunction, Training, TrainingHooks

MEND = "Lower the learning rate, or set clip_norm."


def train(model: nn.Module, batches: Any, loss: LossFunction, training: Training, hooks: TrainingHooks) -> Trained:
    """Train a copy of a model.

    Args:
        model: left as it is.
        batches: `ArrayData`, a DataLoader, or anything that gives (inputs, targets) each time it is gone through.
        loss: what a step minimises.
        training: how.
        hooks: what the caller wants to see and decide.

    Raises:
        NumericError: a loss term gives no gradient on the first batch, or numbers are not finite.
        DataError: an epoch has no batches, or the schedule needs to know how many and the data cannot say.
        CheckpointError: the state to go on from is of another model.
        UsageError: no parameter of the model is to be trained.
        Stopped: `hooks.stop` asked for it; `hooks.save` has been called.
    """
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.random.fork_rng():
        run = _Run(copy.deepcopy(model), batches, loss, training, hooks)
        run.go()
    return Trained(run.bare().to(home).eval(), run.history, run.first_batch)


class _Run:
    """One run and where it stands."""

    def __init__(
        self, model: nn.Module, batches: Any, loss: LossFunction, training: Training, hooks: TrainingHooks
    ) -> None:
        self.training, self.hooks, self.loss = training, hooks, loss
        self.not_finite = _check_given(model)
        self.accelerator = Accelerator()
        optimizer = _optimizer(model, training)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        loader = isinstance(batches, torch.utils.data.DataLoader)
        self.batches = self.accelerator.prepare(batches) if loader else batches
        self.generators = _generators(batches) if loader else []
        self.length = _length(self.batches)
        _check_schedule(training, self.length)
        self.history: list[dict[str, Any]] = []
        self.first_batch: dict[str, Any] = {}
        self.epoch, self.batch = 0, 0
        self.sums: dict[str, float] = {}
        if hooks.resume is not None:
            self._restore(hooks.resume)
        self.draws = [generator.get_state() for generator in self.generators]  # as the epoch begins

    def bare(self) -> nn.Module:
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    def go(self) -> None:
        while self.epoch < self.training.epochs:
            started = time.perf_counter()
            self.model.train()
            for inputs, targets in self._rest_of_epoch():
                self._step(inputs, targets)
                self.batch += 1
                self._obey_stop()
            self._end_epoch(time.perf_counter() - started)

    def _rest_of_epoch(self) -> Iterator[tuple[Any, Any]]:
        """The batches of the epoch that are still to come.

        Whatever draws – the order of a DataLoader, augmentation in its dataset, dropout – finds PyTorch's generators
        set from (seed, epoch, batch), so that nothing depends on where a run was cut. Batches that are done are
        fetched once more and passed over, since a loader draws while it fetches; `ArrayData` needs no such thing.
        """
        device, start = self.accelerator.device, 0
        self._set_random(start)
        if isinstance(self.batches, ArrayData):
            start = self.batch
            batches = ((b.inputs, b.targets) for b in self.batches.epoch(self.training.seed, self.epoch, start))
        else:
            if hasattr(self.batches, "set_epoch"):  # of Accelerate's own loader
                self.batches.set_epoch(self.epoch)
            batches = iter(self.batches)
        for number in itertools.count(start):
            self._set_random(number)
            pair = next(batches, None)
            if pair is None:
                return
            if number >= self.batch:
                yield _on(device, pair[0]), _on(device, pair[1])

    def _set_random(self, batch: int) -> None:
        state = np.random.SeedSequence([self.training.seed, self.epoch, batch]).generate_state(1, np.uint64)
        # Where no device is, torch.manual_seed keeps a stack trace for the day that there is one: 0.3 ms a call.
        on_cpu = self.accelerator.device.type == "cpu"
        (torch.default_generator.manual_seed if on_cpu else torch.manual_seed)(int(state[0]))

    def _step(self, inputs: Any, targets: Any) -> None:
        rate = learning_rate(self.training, self.epoch + (self.batch / self.length if self.length else 0.0))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total, parts = self.loss(self.model, inputs, targets)
        if not self.epoch and not self.batch:
            self._check_first(total, parts)
        value = float(total.detach())
        if not math.isfinite(value):
            raise _not_finite(self.bare(), inputs, parts, self.epoch + 1, self.batch + 1)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(total)
        if self.training.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.training.clip_norm)
        self.optimizer.step()
        size = len(targets)
        for name, part in {"loss": total, **{f"part.{name}": part for name, part in parts.items()}}.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(part.detach()) * size
        self.sums["samples"] = self.sums.get("samples", 0.0) + size

    def _check_first(self, total: Any, parts: dict[str, Any]) -> None:
        """Each term must reach the model; its share of the loss and of the gradient is shown."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        norms: dict[str, float] = {}
        for name, part in parts.items():
            found = (
                torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
                if part.requires_grad
                else [None] * len(parameters)
            )
            norm = math.sqrt(sum(float((g.detach().float() ** 2).sum()) for g in found if g is not None))
            if all(g is None for g in found) or (norm == 0.0 and abs(float(part.detach())) > 1e-9):  # noqa: PLR2004 - zero up to rounding
                raise NumericError(
                    f"The loss term {name!r} gives the model no gradient.",
                    f"Its value on the first batch is {float(part.detach()):.3g}.",
                    "It must be computed from the outputs of the model that is trained.",
                )
            norms[name] = norm
        value, whole = float(total.detach()), sum(norms.values())
        self.first_batch = {
            "loss_shares": {n: float(p.detach()) / value if value else 0.0 for n, p in parts.items()},
            "gradient_shares": {n: norm / whole if whole else 0.0 for n, norm in norms.items()},
        }
        self._tell({"event": "first_batch", **self.first_batch})

    def _end_epoch(self, seconds: float) -> None:
        samples = self.sums.pop("samples", 0.0)
        if not samples:
            raise DataError("An epoch had no batches.", mend="Give data that can be gone through more than once.")
        self._check_finite()
        means = {name: value / samples for name, value in self.sums.items()}
        record: dict[str, Any] = {
            "epoch": self.epoch + 1,
            "loss": means.pop("loss"),
            "parts": {name.removeprefix("part."): mean for name, mean in means.items()},
            "learning_rate": learning_rate(self.training, self.epoch + 0.5),
            "seconds": seconds,
        }
        if self.hooks.validate is not None:
            with inference(self.bare()):
                found = self.hooks.validate(self.bare())
            taken = sorted(found.keys() & record.keys())
            if taken:
                raise UsageError(
                    f"`validate` gives {taken[0]!r}, a name that the record of an epoch has already.",
                    mend="Give it another name.",
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
        name = next((name for name in _not_finite_names(self.bare()) if name not in self.not_finite), None)
        if name is not None:
            raise NumericError(f"The {name} is no longer finite in epoch {self.epoch + 1}.", mend=MEND)

    def _tell(self, event: dict[str, Any]) -> None:
        if self.hooks.event is not None:
            self.hooks.event(event)

    def _state(self) -> TrainingState:
        arrays = {f"model.{name}": _array(value) for name, value in self.bare().state_dict().items()}
        for number, entries in self.optimizer.state_dict()["state"].items():
            for name, value in entries.items():
                if isinstance(value, torch.Tensor):
                    arrays[f"optimizer.{number}.{name}"] = _array(value)
        arrays |= {f"generator.{number}": _array(state) for number, state in enumerate(self.draws)}
        values = {"epoch": self.epoch, "batch": self.batch, "sums": self.sums, "history": self.history}
        return TrainingState(arrays, copy.deepcopy(values | {"first_batch": self.first_batch}))

    def _restore(self, state: TrainingState) -> None:
        own = self.bare().state_dict()
        stored = {n.removeprefix("model."): a for n, a in state.arrays.items() if n.startswith("model.")}
        if set(own) != set(stored) or any(tuple(own[n].shape) != a.shape for n, a in stored.items()):
            raise CheckpointError("The checkpoint is of another model.", mend="Start the run anew.")
        self.bare().load_state_dict({name: _tensor(array, own[name].dtype) for name, array in stored.items()})
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
        self.first_batch = dict(state.values["first_batch"])


def _length(batches: Any) -> int | None:
    """How many batches an epoch has; None where the data cannot say."""
    try:
        return len(batches)
    except TypeError:  # there is no __len__, or it is that of a DataLoader over an IterableDataset
        return None


def _check_schedule(training: Training, length: int | None) -> None:
    """Raise a DataError if the learning rate depends on how many batches there are, and the data cannot say."""
    if length is None and (training.schedule != "constant" or training.warmup_epochs):
        warmup = f" with {training.warmup_epochs:g} warmup_epochs" if training.warmup_epochs else ""
        raise DataError(
            "The data does not say how many batches an epoch has: it has no length.",
            f"The schedule {training.schedule!r}{warmup} follows the part of the run that is done.",
            'Give the data a __len__, or train with schedule="constant" and warmup_epochs=0.',
        )


def _generators(loader: torch.utils.data.DataLoader[Any]) -> list[torch.Generator]:
    """The generators of its own that a loader draws its order from, each once."""
    inner = getattr(loader.batch_sampler, "sampler", None)
    found = [getattr(owner, "generator", None) for owner in (loader, loader.sampler, loader.batch_sampler, inner)]
    return list({id(generator): generator for generator in found if generator is not None}.values())


def learning_rate(training: Training, epoch: float) -> float:
    """The learning rate at a point of the run, counted in epochs from 0."""
    peak = training.learning_rate
    if epoch < training.warmup_epochs:
        return peak * min((epoch + 1e-3) / training.warmup_epochs, 1.0)  # the first step must not be nothing
    if training.schedule == "constant":
        return peak
    done = (epoch - training.warmup_epochs) / max(training.epochs - training.warmup_epochs, 1e-9)
    if training.schedule == "multistep":
        return float(peak * 0.1 ** sum(done >= milestone for milestone in training.milestones))
    return peak * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    """Weight decay on weights of two or more axes only: on biases and scales it does harm."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise UsageError(
            f"Nothing of {type(model).__name__} can be trained.",
            "All its parameters have requires_grad=False.",
            "Set requires_grad on those that shall learn.",
        )
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=training.learning_rate)
    return torch.optim.SGD(groups, lr=training.learning_rate, momentum=0.9, nesterov=True)


def _not_finite_names(model: nn.Module) -> Iterator[str]:
    """Kind and path of each parameter and buffer that holds NaN or infinity: "parameter `0.weight`"."""
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for path, tensor in tensors:
            if not torch.isfinite(tensor).all():
                yield f"{kind} `{path}`"


def _check_given(model: nn.Module) -> set[str]:
    """The buffers of a model that are not finite from the start, as those of attention masks; an error for parameters.

    Raises:
        NumericError: a parameter is not finite.
    """
    names = list(_not_finite_names(model))
    if names and names[0].startswith("parameter"):
        raise NumericError(
            f"The {names[0]} of the model given is not finite.",
            "Training cannot mend NaN or infinity.",
            "Load or initialise its weights anew.",
        )
    return set(names)


def _not_finite(model: nn.Module, inputs: Any, parts: dict[str, Any], epoch: int, batch: int) -> NumericError:
    """The error for a loss that is not finite, with the first layer whose numbers are not."""
    when = f"at epoch {epoch}, batch {batch}"
    for name in _not_finite_names(model):
        if name.startswith("parameter"):
            return NumericError(f"The {name} is no longer finite {when}.", mend=MEND)
    if isinstance(inputs, torch.Tensor) and inputs.is_floating_point() and not torch.isfinite(inputs).all():
        return NumericError(f"The inputs hold NaN or infinity {when}.", mend="Repair the data.")
    seen: list[str] = []

    def look(path: str) -> Any:
        def hook(_module: nn.Module, _given: Any, out: Any) -> None:
            if isinstance(out, torch.Tensor) and not torch.isfinite(out).all() and not seen:
                seen.append(path)

        return hook

    handles = [m.register_forward_hook(look(path)) for path, m in model.named_modules() if path]
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    terms = [name for name, part in parts.items() if not math.isfinite(float(part.detach()))]
    where = f"The output of `{seen[0]}` is" if seen else f"The loss term {', '.join(terms) or 'total'} is"
    return NumericError(f"{where} not finite {when}.", mend=MEND)


def _array(value: torch.Tensor) -> Any:
    """A tensor as a numpy array with the same bits; bfloat16, which numpy lacks, as int16."""
    plain = value.detach().cpu()
    return (plain.view(torch.int16) if plain.dtype == torch.bfloat16 else plain).numpy().copy()


def _tensor(array: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The tensor that `_array` stored; int16 means bfloat16 unless it is said to be int16."""
    value = torch.from_numpy(np.array(array))
    return value.view(torch.bfloat16) if value.dtype == torch.int16 and dtype != torch.int16 else value


def _on(device: torch.device, array: Any) -> torch.Tensor:
    """A batch, of numpy or of PyTorch, on a device."""
    return torch.as_tensor(np.ascontiguousarray(array) if isinstance(array, np.ndarray) else array, device=device)
