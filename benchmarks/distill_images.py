"""CIFAR-10: distill a ResNet into a small ResNet and into a MobileNetV2 with published objectives."""

from __future__ import annotations

import dataclasses
import sys
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import kirsch
from kirsch import figures, ops
from kirsch.data.batches import ArrayData
from kirsch.data.sources.cifar10 import AUGMENT, cifar10
from kirsch.distillation.distill import fit
from kirsch.distillation.losses.loss import loss
from kirsch.distillation.matching import stages
from kirsch.distillation.objective import Objective
from kirsch.distillation.store import Dense, TeacherStore, build_store
from kirsch.distillation.term import Ramp, Term
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.training import TrainingHooks

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from kirsch.data.dataset import DataSet

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

from resnet_to_mobilenet import mobilenet, resnet  # noqa: E402 - the example's own networks

TEACHER_IMAGES, IMAGES, EPOCHS, BATCH = 10_000, 5_000, 10, 64
"""Training images of the teacher, how many of these the students are trained on, epochs and batch size."""
TRAINING = kirsch.Training(epochs=EPOCHS, learning_rate=0.05)
STUDENTS: dict[str, Callable[[], nn.Module]] = {
    "resnet": partial(resnet, (16, 32, 64, 128), repeats=1),
    "mobilenet": mobilenet,
}
TITLES = {
    "resnet": "CIFAR-10, ResNet into a small ResNet",
    "mobilenet": "CIFAR-10, ResNet into MobileNetV2",
}


@loss("keras-default", least_at_teacher=False)
def keras_default(student: Any, teacher: Any, *, temperature: float = 3.0) -> Any:
    """Return the default loss of `keras.distillation.LogitsDistillation()`, which treats logits as probabilities."""
    p, q = (ops.clip(logits / temperature, 1e-7, 1.0) for logits in (teacher, student))
    return temperature**2 * ops.mean(ops.sum(p * ops.log(p / q), axis=-1))


DEFAULTS = {
    "torchdistill, KDLoss(alpha=0)": Objective(
        (Term("kd", 1.0, temperature=4.0, options={"convention": "torchdistill"}),), label_weight=0.0
    ),
    "Keras 3, LogitsDistillation()": Objective((Term("keras-default", 0.5, temperature=3.0),), label_weight=0.5),
    "Keras 3, LogitsDistillation(KLDivergence())": Objective(
        (Term("kd", 0.5, temperature=3.0, options={"convention": "keras"}),), label_weight=0.5
    ),
}
"""Losses of other libraries, read from their code, with the arguments shown. Their training loops are not used."""


def objectives(task: str) -> dict[str, Objective]:
    """Return the objectives to compare. Ramps that were published for runs of 240 epochs are scaled to `EPOCHS`."""
    student = STUDENTS[task]()
    layers = stages(framework_of(student).features, student, resnet().eval(), torch.zeros(8, 3, 32, 32))
    student_layers, teacher_layers = [a for a, _ in layers], [b for _, b in layers]

    def preset(name: str) -> Objective:
        objective = Objective.preset(name)
        terms = []
        for term in objective.terms:
            changes: dict[str, Any] = {}
            if term.student_layer == "auto":  # the stages of the teacher are in the store by these names
                changes = {"student_layer": student_layers, "teacher_layer": teacher_layers}
            if isinstance(term.weight, Ramp):
                changes["weight"] = dataclasses.replace(term.weight, epochs=EPOCHS * term.weight.epochs / 240)
            terms.append(dataclasses.replace(term, **changes))
        return dataclasses.replace(objective, terms=tuple(terms))

    names = ("kd", "dkd", "dist", "lskd", "at", "reviewkd", "crd")
    published = {"labels only": Objective.labels(), **{name: preset(name) for name in names}}
    return published if task == "mobilenet" else published | DEFAULTS


@cache
def images() -> DataSet:
    """Return CIFAR-10 with the training images of the teacher. The students are trained on the first `IMAGES` ones."""
    return cifar10(seed=0, train=TEACHER_IMAGES, validation=500, test=10_000)


@cache
def teacher() -> nn.Module:
    """Return the teacher, which is trained once and stored as safetensors."""
    model, file = resnet(), ROOT / "build" / "distillation" / "teacher.safetensors"
    framework = framework_of(model)
    if file.is_file():
        framework.inference.load_weights(model, file)
        return model.eval()
    torch.manual_seed(0)
    data = ArrayData(images().train.inputs, images().train.labels, batch_size=BATCH, augment=AUGMENT)
    training = TRAINING.changed(epochs=8)
    model = fit(resnet(), data, training=training, hooks=TrainingHooks(event=print)).model
    file.parent.mkdir(parents=True, exist_ok=True)
    framework.inference.save_weights(model, file)
    return model


def teacher_outputs(batch: Any) -> dict[str, torch.Tensor]:
    """Return the teacher's logits, its last feature map of each size, and the input of its last layer."""
    model, outputs = teacher(), {}
    value = torch.as_tensor(batch)
    with torch.inference_mode():
        for name, module in model.named_children():
            if name == str(len(model) - 1):
                outputs["penultimate"] = value
            value = module(value)
            outputs[name] = value
    maps = {layer: outputs[layer] for layer in ("4", "6", "8", "10")}
    return {"logits": value, "penultimate": outputs["penultimate"], **maps}


teacher_outputs.version = "1"


def data_and_store() -> tuple[ArrayData, TeacherStore]:
    """Return the students' images, and the teacher's outputs for each view, which are computed once for all runs."""
    train = images().train
    data = ArrayData(
        train.inputs[:IMAGES], train.labels[:IMAGES], batch_size=BATCH, augment=AUGMENT, views=EPOCHS, seed=0
    )
    folder = ROOT / "build" / "distillation" / "store"
    build_store(folder, teacher(), data, keep=Dense(), outputs=teacher_outputs, views=EPOCHS, event=print)
    return data, TeacherStore.open(folder)


def accuracy(model: nn.Module) -> float:
    """Return the accuracy on the 10,000 test images."""
    test = images().test
    return float((framework_of(model).inference.predict(model, test.inputs).argmax(-1) == test.labels).mean())


def prepare() -> None:
    """Train the teacher and build the store."""
    data_and_store()


def about(task: str) -> str:
    """Return a description of teacher, students, data and training."""
    image = torch.zeros(1, 3, 32, 32)
    counts = [framework_of(model).analysis.count(model, image) for model in (resnet(), STUDENTS[task]())]
    costs = [f"{figures.count(parameters)} parameters, {figures.count(macs)} MACs" for parameters, macs in counts]
    return (
        f"The teacher ({costs[0]}) was trained on {TEACHER_IMAGES:,} images and classifies {accuracy(teacher()):.1%} "
        f"of the 10,000 test images correctly. The students ({costs[1]}) are trained on {IMAGES:,} of the teacher's "
        f"training images for {EPOCHS} epochs, batch size {BATCH}, with SGD with momentum and a cosine schedule from "
        f"{TRAINING.learning_rate:g}. The teacher's outputs for each augmented image are read from one store."
    )


def run(task: str, objective: str, seed: int) -> dict[str, Any]:
    """Train a student; return its test accuracy, gradient shares and warnings."""
    data, store = data_and_store()
    torch.manual_seed(seed)
    student = STUDENTS[task]().to(memory_format=torch.channels_last)  # halves the time of MobileNet on a CPU
    training = TRAINING.changed(seed=seed)
    warnings: list[str] = []
    hooks = TrainingHooks(event=lambda event: warnings.append(event["text"]) if "text" in event else None)
    selected = objectives(task)[objective]
    trained = kirsch.distill(student, store, data, objective=selected, training=training, hooks=hooks)
    return {
        "accuracy": accuracy(trained.model),
        "shares": trained.history[-1]["gradient_shares"],
        "warnings": warnings,
    }
