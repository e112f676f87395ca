"""Distillation in the Trainer of Lightning with a callback."""

from __future__ import annotations

import importlib
import logging
import os
import sys

import numpy as np
import pytest
import torch
from torch import nn

import kirsch
from hooks import assert_no_hooks
from kirsch.distillation.objective import Objective
from kirsch.distillation.term import Term
from kirsch.errors import CheckpointError, DataError, MissingExtraError, UnknownNameError, UsageError
from kirsch.frameworks.pytorch.io.vision import import_beside
from reads import RecordReads
from tiny import assert_weights_close
from training_networks import normalized_network

import_beside("torchvision")  # imported by torchmetrics, which Lightning imports
import lightning  # noqa: E402 - see above

from kirsch.integrations.lightning import Distillation  # noqa: E402 - see above

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches .* is smaller than the logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.. is deprecated.*"),
    pytest.mark.filterwarnings("ignore:The term:UserWarning"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
WORDS, LENGTH = 12, 6
OBJECTIVE = Objective((Term("kd", 0.5, temperature=2.0), Term("fitnet", 0.5, student_layer="1")))


def token_model(width, seed):
    """Return a model of tokens in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(WORDS, width), nn.Linear(width, WORDS)).double()


class Module(lightning.LightningModule):
    """LightningModule of a user."""

    def __init__(self, model=None, data=None, batch_size=4):
        super().__init__()
        self.model = normalized_network(4, 1) if model is None else model
        self.data, self.batch_size = data or samples(), batch_size

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        raise RuntimeError("the callback must replace this method")

    def validation_step(self, batch, batch_idx):
        self.log("validation_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)]

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.data, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(self.data, batch_size=16)


def samples():
    random = np.random.default_rng(0)
    labels = torch.arange(16) % 3
    return torch.utils.data.TensorDataset(torch.as_tensor(random.standard_normal((16, 5))).float(), labels)


def texts(count=8):
    """Return sequences of tokens as inputs, and as labels that are masked after the first 2 to 6 positions."""
    tokens = torch.as_tensor(np.random.default_rng(0).integers(0, WORDS, (count, LENGTH)))
    valid = torch.arange(LENGTH) < 2 + torch.arange(count)[:, None] % 5
    return torch.utils.data.TensorDataset(tokens, tokens.masked_fill(~valid, -100))


def fit(module, callback, *, seed=3, ckpt_path=None, **options):
    options = {"max_epochs": 1, "devices": 1, "logger": False, "enable_checkpointing": False, **options}
    run = lightning.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        callbacks=[callback, *options.pop("callbacks", ())], **options,
    )  # fmt: skip
    torch.manual_seed(seed)
    run.fit(module, ckpt_path=ckpt_path)
    return run


def test_batches_and_outputs_are_checked_before_training():
    rows = [{"x": x, "label": y} for x, y in samples()]
    module = Module(data=rows)
    found = Distillation(normalized_network(6, 2), Objective.kd(temperature=2.0), student="model")
    fit(module, found, limit_val_batches=0)
    assert set(found.distiller.shares) == {"label", "kd"}
    soft = Module(nn.Sequential(normalized_network(4, 1), nn.Softmax(-1)))
    with pytest.raises(UsageError, match="The student, a Sequential, returns probabilities"):
        fit(
            soft,
            Distillation(normalized_network(6, 2), Objective.kd(temperature=2.0), student="model"),
            limit_val_batches=0,
        )
    with pytest.raises(DataError, match=r"A batch has one sample, and Sequential normalizes .* drop_last=True"):
        fit(
            Module(batch_size=15),
            Distillation(normalized_network(6, 2), Objective.kd(temperature=2.0), student="model"),
            limit_val_batches=0,
        )


class Scaled(Module):
    """Module with a hook that could change the labels on the device."""

    def on_after_batch_transfer(self, batch, _index):
        return batch


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_step_reads_no_values_of_tensors(monkeypatch, accumulate):
    """Labels are counted and checked before the batch is moved. The first batch of an epoch reads gradient norms."""
    lines, step = [], Distillation._step

    def recorded(*args):
        with RecordReads() as reads:
            loss = step(*args)
        lines.append(reads.lines)
        return loss

    monkeypatch.setattr(Distillation, "_step", recorded)
    options = {"accumulate_grad_batches": accumulate, "limit_val_batches": 1, "val_check_interval": 2}
    for module, batch_of in ((Module(), None), (Scaled(), None), (Module(), lambda batch: batch)):
        fit(module, Distillation(normalized_network(6, 2), OBJECTIVE, student="model", batch_of=batch_of), **options)
    assert lines[0]
    assert lines[1:4] == [[]] * 3
    assert all(lines[4:])  # the labels may change on the device, so they are counted there


class Masking(lightning.Callback):
    """A callback that removes labels after the batch was moved to the device."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch[1][:2] = -100


def test_labels_that_a_callback_removes_do_not_count():
    module, callback = Module(), Distillation(normalized_network(6, 2), OBJECTIVE, student="model")
    run = fit(module, callback, callbacks=[Masking()], max_steps=1, limit_val_batches=0)
    assert float(run.callback_metrics["loss/label"]) > 0


def test_the_example_of_the_model_summary_is_no_training_batch():
    module, callback = Module(), Distillation(normalized_network(6, 2), OBJECTIVE, student="model")
    module.example_input_array = (torch.rand(4, 5), torch.rand(4, 5))
    module._on_before_batch_transfer(module.example_input_array)  # as the summary does
    seen = []

    class Summary(lightning.Callback):
        def on_fit_start(self, trainer, pl_module):
            seen.append(pl_module._on_before_batch_transfer(pl_module.example_input_array))

    fit(module, callback, callbacks=[Summary()], max_steps=1, limit_val_batches=0)
    assert len(seen) == 1


def assert_plain(module, before):
    """Check that the module has no hooks, adapters or replaced methods."""
    assert module.state_dict().keys() == before.state_dict().keys()
    assert [name for name, _ in module.named_modules()] == [name for name, _ in before.named_modules()]
    assert not {"training_step", "_on_before_batch_transfer"} & set(vars(module))
    assert_no_hooks(module)


def test_student_and_adapters_are_trained_and_the_module_is_restored(tmp_path):
    module, callback = Module(), Distillation(normalized_network(6, 2), OBJECTIVE, student="model")
    run = fit(module, callback, max_epochs=2)
    trained = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in callback.distiller.parameters()}
    fresh = kirsch.Distiller(normalized_network(4, 1), normalized_network(6, 2), OBJECTIVE, samples()[:4])
    for before, after in zip(fresh.parameters(), callback.distiller.parameters(), strict=True):
        assert not torch.equal(before, after)
    assert_plain(module, Module())
    logged = {name: float(value) for name, value in run.callback_metrics.items()}
    assert logged.keys() == {
        "loss", "loss/label", "loss/kd", "loss/fitnet", "validation_loss",
        "gradient_share/label", "gradient_share/kd", "gradient_share/fitnet",
    }  # fmt: skip
    assert logged["loss"] == pytest.approx(sum(logged[f"loss/{name}"] for name in ("label", "kd", "fitnet")), rel=1e-5)
    assert sum(value for name, value in logged.items() if name.startswith("gradient")) == pytest.approx(1)


def test_step_equals_the_step_of_a_distiller():
    """The module itself is the student, so that layer names start with `model.`."""
    objective = Objective(
        (Term("kd", 0.5, temperature=2.0), Term("fitnet", 0.5, student_layer="model.1")), balance="gradient"
    )
    module, callback = Module(batch_size=16), Distillation(Module(normalized_network(6, 2)), objective)
    module.model[3] = nn.Identity()
    fit(module, callback, max_epochs=3)
    expected = Module()
    expected.model[3] = nn.Identity()
    distiller = kirsch.Distiller(expected, Module(normalized_network(6, 2)), objective, samples()[:16]).train()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(3):
        optimizer.zero_grad()
        distiller(samples()[:16], epoch).total.backward()
        optimizer.step()
    assert_weights_close(module, expected, rtol=1e-4, atol=1e-6)  # the order of the samples differs, in float32
    assert callback.distiller.shares == pytest.approx(distiller.shares, rel=1e-3)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resumed_run_is_bitwise_equal(tmp_path):
    """The checkpoint contains the weights of the student without adapters."""
    objective = Objective(OBJECTIVE.terms, balance="gradient")
    runs = []
    for path in (None, str(tmp_path / "epoch=1-step=8.ckpt")):
        keep = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1)
        module, callback = (
            Module(data=list(samples())),
            Distillation(normalized_network(6, 2), objective, student="model"),
        )
        module.model[3] = nn.Identity()  # Lightning does not restore the random state
        module.train_dataloader = lambda own=module: torch.utils.data.DataLoader(own.data, batch_size=4)
        fit(module, callback, max_epochs=3, ckpt_path=path, callbacks=[keep],
            enable_checkpointing=True)  # fmt: skip
        runs.append((module, callback))
    assert_weights_close(runs[0][0], runs[1][0], rtol=0, atol=0)
    assert_weights_close(runs[0][1].distiller.adapters, runs[1][1].distiller.adapters, rtol=0, atol=0)
    assert runs[0][1].state_dict()["balance"] == runs[1][1].state_dict()["balance"]
    kept = torch.load(tmp_path / "epoch=1-step=8.ckpt", weights_only=True)
    assert kept["state_dict"].keys() == Module().state_dict().keys()
    plain = Module()
    plain.model[3] = nn.Identity()
    plain.load_state_dict(kept["state_dict"])


def test_accumulated_batches_equal_one_large_batch():
    """8 sequences with 2 to 6 valid positions, as one batch, and as several with different numbers of positions."""
    objective = Objective.preset("causal")
    found = []
    for size, accumulate in ((8, 1), (4, 2), (3, 4)):
        module = Module(token_model(4, 1), texts(), size)
        fit(module, Distillation(token_model(6, 2), objective, student="model"), accumulate_grad_batches=accumulate,
            limit_val_batches=0)  # fmt: skip
        found.append(module)
    for other in found[1:]:
        assert_weights_close(found[0], other, rtol=1e-10, atol=1e-12)
    assert not torch.equal(found[0].model[1].weight, token_model(4, 1)[1].weight)


def test_bf16_loss_is_close_to_fp32():
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        module = Module(batch_size=16)
        module.model[3] = nn.Identity()
        run = fit(module, Distillation(normalized_network(6, 2), OBJECTIVE, student="model"), precision=precision)
        losses.append(float(run.callback_metrics["loss"]))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_the_function_given_as_batch_of_converts_batches():
    data = [{"pixels": x, "class": y, "name": "a"} for x, y in samples()]
    module = Module(data=data)
    callback = Distillation(
        normalized_network(6, 2), OBJECTIVE, student="model", batch_of=lambda each: (each["pixels"], each["class"])
    )
    fit(module, callback, limit_val_batches=0)
    assert set(callback.distiller.shares) == {"label", "kd", "fitnet"}


def test_module_is_restored_after_an_exception_and_can_be_trained_again():
    class Broken(Module):
        def on_train_batch_end(self, *_):
            raise RuntimeError("enough")

    module, callback = Broken(), Distillation(normalized_network(6, 2), OBJECTIVE, student="model")
    with pytest.raises(RuntimeError, match="enough"):
        fit(module, callback)
    assert_plain(module, Module())
    before = callback.distiller
    module.on_train_batch_end = lambda *_: None
    fit(module, callback)
    assert callback.distiller is before
    assert_plain(module, Module())


def test_checkpoint_without_distillation_is_refused(tmp_path):
    class Plain(Module):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    run = fit(Plain(), lightning.Callback())
    run.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(CheckpointError, match=r"has no state of Distillation.*without ckpt_path"):
        fit(
            Module(),
            Distillation(normalized_network(6, 2), OBJECTIVE, student="model"),
            ckpt_path=str(tmp_path / "plain.ckpt"),
        )


def test_unsupported_modules_and_loaders_are_refused():
    class Narrow(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), lr=0.1)

    class Manual(Module):
        automatic_optimization = False

    class Late(Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Identity()

    class Several(Module):
        def train_dataloader(self):
            return {"a": super().train_dataloader(), "b": super().train_dataloader()}

    other = Objective((Term("fitnet", 1.0, student_layer="model.1"),))
    teacher = Module(normalized_network(6, 2))
    for module, options, error, sentence in (
        (Narrow(), {"teacher": teacher, "objective": other}, UsageError, r"lacks the adapters.*self\.param"),
        (Manual(), {}, UsageError, "has manual optimization.*kirsch.Distiller"),
        (Late(), {}, UsageError, "Late has no parameters yet.*in __init__"),
        (Several(), {}, UsageError, "not a single loader.*example_batch"),
        (Module(), {"student": "model2"}, UnknownNameError, "no part of Module named 'model2'.*Did you mean 'model"),
    ):  # fmt: skip
        callback = Distillation(
            **{"teacher": normalized_network(6, 2), "objective": OBJECTIVE, "student": "", **options}
        )
        with pytest.raises(error, match=sentence):
            fit(module, callback, limit_val_batches=0)
        assert "training_step" not in vars(module)


def test_step_with_all_targets_masked_is_refused():
    data = torch.utils.data.TensorDataset(*[torch.full((8, LENGTH), value) for value in (1, -100)])
    callback = Distillation(token_model(6, 2), Objective.preset("causal"), student="model")
    with pytest.raises(DataError, match="All targets of step 1 are masked"):
        fit(Module(token_model(4, 1), data), callback, accumulate_grad_batches=2, limit_val_batches=0)


def test_model_parallel_strategy_is_refused():
    run = lightning.Trainer(accelerator="cpu", devices=1, logger=False, callbacks=[])
    callback = Distillation(normalized_network(6, 2), OBJECTIVE)
    run._accelerator_connector.strategy = lightning.pytorch.strategies.ModelParallelStrategy()
    with pytest.raises(UsageError, match="would distribute the student with ModelParallelStrategy"):
        callback.setup(run, Module(), "fit")


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "kirsch.integrations.lightning")
    with pytest.raises(MissingExtraError, match=r"is not installed.*kirsch\[lightning\]"):
        importlib.import_module("kirsch.integrations.lightning")


class Split(Module):
    """Each process loads its part of every batch; the sampler of Lightning would shuffle."""

    def train_dataloader(self):
        part = range(self.trainer.global_rank, len(self.data), self.trainer.world_size)
        return torch.utils.data.DataLoader(torch.utils.data.Subset(self.data, part), batch_size=self.batch_size)


class SaveParameters(lightning.Callback):
    """Write the final parameters to a file, since the training may run in other processes than the test."""

    def __init__(self, path, callback):
        self.path, self.callback = path, callback

    def on_fit_end(self, trainer, pl_module):
        if trainer.global_rank == 0:
            np.savez(self.path, *[p.detach().numpy() for p in self.callback.distiller.parameters()])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks its process")
@pytest.mark.parametrize("with_adapter", [False, True], ids=["soft targets", "adapter"])
def test_two_processes_give_the_parameters_of_one(tmp_path, with_adapter):
    """The data are sequences with different numbers of valid positions, or, for an adapter, samples with one label.

    The callback weights batches by their numbers of labels. The loss on the adapter is a mean over samples, so the
    weights are exact only if each sample has one label.
    """

    def deterministic_net(width, seed):
        model = normalized_network(width, seed).double()
        model[1], model[3] = nn.Tanh(), nn.Identity()
        return model

    inputs, labels = samples().tensors
    data = torch.utils.data.TensorDataset(inputs.double(), labels) if with_adapter else texts(32)
    build, objective = (deterministic_net, OBJECTIVE) if with_adapter else (token_model, Objective.preset("causal"))
    parameters, students = [], []
    for processes in (1, 2):
        module, callback = (
            Split(build(4, 1), data, 8 // processes),
            Distillation(build(6, 2), objective, student="model"),
        )
        options = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False} if processes > 1 else {}
        saved = SaveParameters(tmp_path / f"{processes}.npz", callback)
        fit(
            module, callback, callbacks=[saved], accumulate_grad_batches=2, max_epochs=2, limit_val_batches=0, **options
        )
        with np.load(saved.path) as arrays:
            parameters.append([arrays[name] for name in arrays.files])
        students.append(module)
    assert len(parameters[0]) == len(list(students[0].parameters())) + 2 * with_adapter
    for one, two in zip(*parameters, strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-8, atol=1e-11)  # the order of summation differs, in float64
    assert_weights_close(*students, rtol=1e-8, atol=1e-11)
