"""Distillation in the Trainer of transformers, with small models made from configurations."""

from __future__ import annotations

import dataclasses
import importlib
import os
import socket
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

import kirsch
from hooks import assert_no_hooks
from kirsch.distillation.objective import Objective
from kirsch.distillation.term import Term
from kirsch.errors import CheckpointError, DataError, MissingExtraError, UsageError
from kirsch.frameworks.pytorch.io.vision import import_beside
from reads import RecordReads
from tiny import assert_weights_close

import_beside("torchvision")
transformers = import_beside("transformers")

from kirsch.integrations.huggingface import STATE, DistillationMixin, DistillationTrainer  # noqa: E402 - see above

WORDS, LENGTH = 32, 8
LAYERS = Objective(
    (
        Term("kd", 0.5, temperature=2.0),
        Term("hidden-mse", 0.5, student_layer="hidden[*]"),
        Term("attention-mse", 3e3, student_layer="attention[*]"),
    ),
    label_weight=0.5,
    causal=True,
)
BANK = {"samples": 16, "negatives": 4}
LAST = [f"**.attention.self.{name}[-1]" for name in ("query", "key", "value")]


def causal(width, layers, seed, dropout=0.0):
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=WORDS, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=16, attn_implementation="eager", attention_dropout=dropout,
        )
    )  # fmt: skip


def encoder(width, layers, seed):
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=WORDS, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=16, attn_implementation="eager", num_labels=3,
        )
    )  # fmt: skip


def texts(count=16):
    """Return padded sequences of unequal lengths, so that batches differ in their numbers of valid tokens."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(count):
        tokens = torch.as_tensor(random.integers(1, WORDS, LENGTH))
        valid = torch.arange(LENGTH) < 3 + number % 6
        rows.append({"input_ids": tokens, "attention_mask": valid.long(), "labels": tokens.masked_fill(~valid, -100)})
    return rows


def sentences(count=16):
    """Return sequences with class numbers and ids."""
    return [{**row, "labels": torch.tensor(number % 3), "ids": number} for number, row in enumerate(texts(count))]


def trainer(folder, student=None, teacher=None, objective=LAYERS, data=None, kind=DistillationTrainer, **changes):
    arguments = {name: changes.pop(name) for name in list(changes) if name in TRAINER_ARGUMENTS}
    settings = {
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False,
        "per_device_train_batch_size": 4, "max_steps": 1, "logging_steps": 1, "save_strategy": "no", "optim": "sgd",
        "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, **changes,
    }  # fmt: skip
    data = texts() if data is None else data
    return kind(
        None if "model_init" in arguments else causal(8, 2, 0) if student is None else student,
        transformers.TrainingArguments(str(folder), **settings),
        teacher=causal(16, 4, 1) if teacher is None else teacher,
        objective=objective,
        train_dataset=data,
        eval_dataset=data,
        **arguments,
    )


TRAINER_ARGUMENTS = ("optimizers", "compute_loss_func", "model_init", "regularizers", "data_collator")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_training_step_reads_no_values_of_tensors(tmp_path, accumulate):
    """Labels are counted and checked before the batch is moved. The first batch of an epoch reads gradient norms."""
    lines = []

    class Recorded(DistillationTrainer):
        def training_step(self, *args, **options):
            with RecordReads() as reads:
                loss = super().training_step(*args, **options)
            lines.append(reads.lines)
            return loss

    run = trainer(tmp_path, kind=Recorded, max_steps=4 // accumulate, gradient_accumulation_steps=accumulate)
    run.train()
    assert lines[0]
    assert lines[1:] == [[]] * 3
    assert run.get_train_dataloader().device is None  # the batches are moved in `training_step`


@pytest.mark.parametrize("in_place", [True, False])
def test_labels_that_a_subclass_removes_do_not_count(tmp_path, in_place):
    """The labels were counted before; those that `compute_loss` replaces by -100 are left out of the loss."""
    losses = []

    class Masked(DistillationTrainer):
        def compute_loss(self, model, inputs, *args, **options):
            labels = inputs["labels"] if in_place else inputs["labels"].clone()
            labels[1:] = -100
            inputs["labels"] = labels
            loss, output = super().compute_loss(model, inputs, True, *args[1:], **options)
            losses.append(output.terms["label"].detach())
            return loss

    rows = [{**row, "labels": row["input_ids"]} for row in texts() if int(row["attention_mask"].sum()) == LENGTH] * 8
    trainer(tmp_path, kind=Masked, data=rows, max_steps=2).train()
    assert all(float(loss) > 0 for loss in losses)


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    """One batch of 8, two batches of 4, and a step of `kirsch.Distiller` agree; sequences have 3 to 8 valid tokens."""
    objective = dataclasses.replace(Objective.preset("causal"), label_weight=0.5)
    students = [causal(8, 2, 0).double() for _ in range(3)]
    teacher = causal(16, 4, 1).double()
    for student, (size, accumulate) in zip(students, ((8, 1), (4, 2)), strict=False):
        run = trainer(
            tmp_path, student, teacher, objective, texts(8),
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulate,
        )  # fmt: skip
        run.train()
    batch = {name: torch.stack([row[name] for row in texts(8)]) for name in texts(1)[0]}
    distiller = kirsch.Distiller(students[2], teacher, objective, batch)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    distiller.train()(batch).total.backward()
    optimizer.step()
    for other in students[1:]:
        assert_weights_close(students[0], other, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The term:UserWarning")
def test_resumed_run_is_bitwise_equal(tmp_path):
    """The run has adapters, balance and dropout, and is resumed from a checkpoint within an epoch."""
    terms = (*LAYERS.terms[:2], Term("attention-mse", 0.5, student_layer="attention[*]"))
    objective = dataclasses.replace(LAYERS, terms=terms, balance="gradient")
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
    runs = []
    for folder, resume in (("complete", None), ("resumed", str(tmp_path / "complete" / "checkpoint-3"))):
        run = trainer(tmp_path / folder, causal(8, 2, 0, dropout=0.2), objective=objective, **settings)
        run.train(resume_from_checkpoint=resume)
        runs.append(run)
    assert_weights_close(runs[0].model, runs[1].model, rtol=0, atol=0)
    assert_weights_close(runs[0].distiller.adapters, runs[1].distiller.adapters, rtol=0, atol=0)
    assert runs[0].distiller.state_dict()["balance"] == runs[1].distiller.state_dict()["balance"]
    assert runs[0].state.log_history[-2]["loss/kd"] == runs[1].state.log_history[-2]["loss/kd"]


def test_adapters_are_trained_and_only_the_student_is_saved(tmp_path):
    run = trainer(tmp_path, max_steps=2)
    run.train()
    trained = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in run.distiller.parameters()}
    fresh = kirsch.Distiller(causal(8, 2, 0), causal(16, 4, 1), LAYERS, run.data_collator(texts(2)), seed=42)
    assert [row["adapter"] for row in run.distiller.rows] == [None, "Linear", "Linear", "Linear", None, None]
    for before, after in zip(fresh.adapters.parameters(), run.distiller.adapters.parameters(), strict=True):
        assert not torch.equal(before, after)
    run.save_model(str(tmp_path / "student"))
    assert_weights_close(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "student"), run.model, rtol=0, atol=0
    )
    assert_no_hooks(run.model)
    assert run.model_wrapped is run.model


def test_evaluation_uses_the_students_loss_and_terms_are_logged(tmp_path):
    run = trainer(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=16)
    run.train()
    first, evaluation = run.state.log_history[0], run.state.log_history[2]
    parts = {name: value for name, value in first.items() if name.startswith("loss/")}
    assert parts.keys() == {"loss/label", "loss/kd", "loss/hidden-mse", "loss/attention-mse"}
    assert sum(parts.values()) == pytest.approx(first["loss"], rel=1e-5)
    shares = [value for name, value in first.items() if name.startswith("gradient_share/")]
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(1)
    batch = run.data_collator(texts())
    assert evaluation["eval_loss"] == pytest.approx(run.model.eval()(**batch).loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    "objective",
    [
        Objective((Term("minilm", 1.0, student_layer=LAST, options={"heads": 2}),), label_weight=0.0),
        Objective((Term("crd", 1.0, student_layer="penultimate", adapter="crd-bank", adapter_options=BANK),)),
        Objective(
            (
                Term("dkd"),
                Term("rkd-distance", student_layer="penultimate"),
                Term("cls-pkd", student_layer="hidden[-1]"),
            )
        ),
    ],
    ids=["minilm", "memory bank", "logits, relations, states"],
)  # fmt: skip
def test_encoder_is_trained_on_every_kind_of_layer(tmp_path, objective):
    run = trainer(
        tmp_path, encoder(8, 2, 0), encoder(16, 4, 1), objective, sentences(), max_steps=5, num_train_epochs=2
    )
    run.train()
    losses = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert np.isfinite(losses).all()
    assert len(run.predict(sentences()).predictions) == 16


def test_bf16_loss_is_close_to_fp32(tmp_path):
    losses = []
    for bf16 in (False, True):
        run = trainer(tmp_path, bf16=bf16)
        run.train()
        losses.append(run.state.log_history[0]["loss/label"])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_second_training_keeps_adapters_of_the_same_model(tmp_path):
    run = trainer(tmp_path)
    run.train()
    before = run.distiller
    run.train()
    assert run.distiller is before
    run = trainer(tmp_path, model_init=lambda: causal(8, 2, 0))
    run.train()
    before = run.distiller
    run.train()
    assert run.distiller is not before
    assert run.distiller.student is run.model


def test_hooks_are_removed_after_an_exception(tmp_path):
    run = trainer(tmp_path)

    def fail(*_args, **_options):
        raise RuntimeError("enough")

    run.lr_scheduler = None
    run.accelerator.backward = fail
    with pytest.raises(RuntimeError, match="enough"):
        run.train()
    assert_no_hooks(run.model)


def test_adapters_are_added_to_a_given_optimizer(tmp_path):
    student = causal(8, 2, 0)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    run = trainer(tmp_path, student, optimizers=(optimizer, None))
    run.train()
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} >= {
        id(p) for p in run.distiller.adapters.parameters()
    }
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with pytest.raises(UsageError, match=r"lacks the adapters of the objective.*optimizer_cls_and_kwargs="):
        trainer(tmp_path, student, optimizers=(optimizer, schedule)).train()


def test_mixin_works_with_a_custom_trainer(tmp_path):
    class CountingTrainer(transformers.Trainer):
        steps = 0

        def training_step(self, *args, **options):
            self.steps += 1
            return super().training_step(*args, **options)

    class CustomTrainer(DistillationMixin, CountingTrainer):
        pass

    run = trainer(tmp_path, kind=CustomTrainer)
    run.train()
    assert run.steps == 1


def test_checkpoint_without_adapters_is_refused(tmp_path):
    run = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    run.train()
    (tmp_path / "checkpoint-1" / STATE).unlink()
    with pytest.raises(CheckpointError, match=rf"checkpoint-1 has no {STATE}.*from_pretrained"):
        trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.filterwarnings("ignore:No configuration describes:UserWarning")
def test_pruned_student_without_configuration_is_resumed_and_not_saved(tmp_path):
    """The checkpoints of such a student contain weights without a configuration."""
    original = encoder(16, 1, 0)
    plan = kirsch.plan(
        kirsch.trace(original, {"input_ids": texts(1)[0]["input_ids"][None]}),
        kirsch.Goal(parameters=0.7),
        loadable=False,
    )
    kind = {"teacher": encoder(16, 1, 1), "objective": Objective.kd(), "data": sentences(), "save_strategy": "steps"}
    runs = []
    for folder, resume in (("complete", None), ("resumed", str(tmp_path / "complete" / "checkpoint-2"))):
        run = trainer(tmp_path / folder, kirsch.prune(original, plan), save_steps=2, max_steps=4, **kind)
        run.train(resume_from_checkpoint=resume)
        runs.append(run)
    assert_weights_close(runs[0].model, runs[1].model, rtol=0, atol=0)
    assert not (tmp_path / "complete" / "checkpoint-2" / "config.json").exists()
    for save in (lambda: runs[0].save_model(tmp_path / "small"), runs[0].push_to_hub):
        with pytest.raises(UsageError, match=r"from_pretrained cannot load.*kirsch\.save"):
            save()
    assert not list((tmp_path / "small").glob("*"))
    with pytest.raises(UsageError, match="from_pretrained cannot load"):
        trainer(tmp_path / "hub", runs[0].model, push_to_hub=True, **kind)


def test_checkpoint_of_another_objective_is_refused(tmp_path):
    """The other objective has no adapters, so that its optimizer has fewer parameters."""
    trainer(tmp_path, objective=Objective.preset("causal"), save_strategy="steps", save_steps=1).train()
    with pytest.raises(
        CheckpointError, match="The adapters of the state differ from those of this distiller: adapter1"
    ):
        trainer(tmp_path, max_steps=2).train(resume_from_checkpoint=True)


def stacked(rows):
    """A collator that, unlike the default one, does not rename "label"."""
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("target_name", ["label", "target", "y"])
@pytest.mark.parametrize("collator", [None, stacked], ids=["default", "own"])
def test_targets_of_other_names_are_used(tmp_path, target_name, collator):
    rows = [{target_name if name == "labels" else name: value for name, value in row.items()} for row in sentences()]
    options = {"student": encoder(8, 2, 0), "teacher": encoder(16, 4, 1), "objective": Objective.kd(temperature=2.0)}
    found = trainer(tmp_path, **options, data=rows, data_collator=collator)
    found.train()
    assert {"loss/label", "loss/kd"} <= set(found.state.log_history[0])
    assert found.evaluate()["eval_loss"] > 0


def test_student_with_softmax_is_refused_unless_its_outputs_are_declared(tmp_path):
    student = encoder(8, 2, 0)
    student.classifier = torch.nn.Sequential(student.classifier, torch.nn.Softmax(-1))
    options = {"teacher": encoder(16, 4, 1), "data": sentences()}
    with pytest.raises(UsageError, match="The student, a BertForSequenceClassification, returns probabilities"):
        trainer(tmp_path, student, objective=Objective.kd(temperature=2.0), **options).train()
    objective = dataclasses.replace(Objective.kd(temperature=2.0), student_outputs="probabilities")
    assert trainer(tmp_path, student, objective=objective, **options).train().global_step == 1


def test_step_with_all_targets_masked_is_refused(tmp_path):
    rows = [{**row, "labels": torch.full((LENGTH,), -100)} for row in texts()]
    with pytest.raises(DataError, match="All targets of step 1 are masked"):
        trainer(tmp_path, data=rows).train()


def test_conflicting_settings_are_refused(tmp_path):
    bare, labels = Objective.kd(), Objective.preset("causal")
    with pytest.raises(UsageError, match=r"A LlamaForCausalLM predicts the next token.*causal=True"):
        trainer(tmp_path, objective=bare)
    with pytest.raises(UsageError, match="a BertForSequenceClassification does not predict the next token"):
        trainer(tmp_path, encoder(8, 2, 0), encoder(8, 2, 0), labels)
    with pytest.raises(UsageError, match="has both `compute_loss_func` and an objective"):
        trainer(tmp_path, compute_loss_func=lambda *_: 0)
    with pytest.raises(UsageError, match="has both `label_smoothing_factor` and an objective"):
        trainer(tmp_path, label_smoothing_factor=0.1)


@pytest.mark.parametrize(
    ("name", "description"),
    [("is_fsdp_enabled", "FSDP"), ("is_deepspeed_enabled", "DeepSpeed"), ("is_model_parallel", "a device map")],
)
def test_distributed_student_is_refused(tmp_path, name, description):
    run = trainer(tmp_path)
    setattr(run, name, True)
    with pytest.raises(UsageError, match=f"would distribute the student with {description}.*torchrun"):
        run._check(LAYERS)


def weights(folder, objective, rows, processes):
    """Return the final parameters of a run, and its logged losses and gradient norms."""
    student, teacher = causal(8, 1, 1).double(), causal(16, 1, 2).double()
    settings = {"per_device_train_batch_size": 8 // processes, "max_steps": 4, "max_grad_norm": 0.1}
    run = trainer(folder, student, teacher, objective, rows, **settings)
    run.train()
    logged = [
        row[name] for row in run.state.log_history[:-1] for name in ("loss", "loss/kd", "loss/label", "grad_norm")
    ]
    return [*[p.detach().numpy() for p in run.distiller.parameters()], np.array(logged)]


def run_process(rank, folder, port, *arguments):
    """Train in one of two processes."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    found = weights(folder, *arguments, 2)
    if rank == 0:
        np.savez(folder / "found.npz", *found)
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks its process")
@pytest.mark.parametrize("with_adapter", [False, True], ids=["soft targets", "adapter"])
def test_two_processes_give_the_parameters_of_one(tmp_path, with_adapter):
    """The data are padded sequences for soft targets, or full sequences for an adapter."""
    terms = (
        Term("kd", 0.5, temperature=2.0),
        *([Term("hidden-mse", 0.5, student_layer="hidden[-1]")] if with_adapter else []),
    )
    rows = [{"input_ids": r["input_ids"], "labels": r["input_ids" if with_adapter else "labels"]} for r in texts()]
    arguments = Objective(terms, causal=True), rows
    one = weights(tmp_path, *arguments, 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torch.multiprocessing.start_processes(run_process, (tmp_path, port, *arguments), nprocs=2, start_method="fork")
    with np.load(tmp_path / "found.npz") as arrays:
        two = [arrays[name] for name in arrays.files]
    assert len(one) == len(two)
    for first, second in zip(one, two, strict=True):
        # The order of summation differs, in float64; logged numbers are float32.
        exact = {"rtol": 1e-8, "atol": 1e-11} if first.shape != one[-1].shape else {"rtol": 1e-5}
        np.testing.assert_allclose(second, first, **exact)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "kirsch.integrations.huggingface")
    with pytest.raises(MissingExtraError, match=r"'transformers' is not installed.*kirsch\[hf\]"):
        importlib.import_module("kirsch.integrations.huggingface")
