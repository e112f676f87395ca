"""CIFAR-10: a ResNet teaches a small ResNet and a MobileNetV2, by each of the published objectives."""

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
from kirsch.distillation.schedule import Ramp
from kirsch.distillation.store import Dense, TeacherStore, build
from kirsch.distillation.term import Term
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.training import TrainingHooks

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from kirsch.data.dataset import DataSet

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "examples"))

from resnet_to_mobilenet import mobilenet, resnet  # noqa: E402 - the example's own networks

TEACHERS, IMAGES, EPOCHS, BATCH = 10_000, 5_000, 10, 64
"""Images the teacher learned from; those of them that students see; passes; batch size."""
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
    """What `keras.distillation.LogitsDistillation()` computes if no loss is named: scores taken for probabilities."""
    p, q = (ops.clip(scores / temperature, 1e-7, 1.0) for scores in (teacher, student))
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
"""What other systems compute by default, as measured from their code; their own loops are not run."""


def objectives(task: str) -> dict[str, Objective]:
    """What is compared. Warm-ups of 20 of 240 epochs last as long a part of these few."""
    student = STUDENTS[task]()
    places = stages(framework_of(student).features, student, resnet().eval(), torch.zeros(8, 3, 32, 32))
    mine, theirs = [a for a, _ in places], [b for _, b in places]

    def preset(name: str) -> Objective:
        objective = Objective.preset(name)
        terms = []
        for term in objective.terms:
            changes: dict[str, Any] = {}
            if term.student == "auto":  # the store has what the teacher puts out there
                changes = {"student": mine, "teacher": theirs}
            if isinstance(term.weight, Ramp):
                changes["weight"] = dataclasses.replace(term.weight, epochs=EPOCHS * term.weight.epochs / 240)
            terms.append(dataclasses.replace(term, **changes))
        return dataclasses.replace(objective, terms=tuple(terms))

    names = ("kd", "dkd", "dist", "lskd", "at", "reviewkd", "crd")
    found = {"labels only": Objective.labels(), **{name: preset(name) for name in names}}
    return found if task == "mobilenet" else found | DEFAULTS


@cache
def images() -> DataSet:
    """The images of the teacher; the first of them are those of the students."""
    return cifar10(seed=0, train=TEACHERS, validation=500, test=10_000)


@cache
def teacher() -> nn.Module:
    """Trained once, and kept as safetensors."""
    model, file = resnet(), ROOT / "build" / "distillation" / "teacher.safetensors"
    framework = framework_of(model)
    if file.is_file():
        framework.inference.load_weights(model, file)
        return model.eval()
    torch.manual_seed(0)
    data = ArrayData(images().train.inputs, images().train.labels, BATCH, AUGMENT)
    training = dataclasses.replace(TRAINING, epochs=8)
    model = fit(resnet(), data, training=training, hooks=TrainingHooks(event=print)).model
    file.parent.mkdir(parents=True, exist_ok=True)
    framework.inference.save_weights(model, file)
    return model


def records(batch: Any) -> dict[str, torch.Tensor]:
    """The teacher's scores, its last map of each size, and what its last layer is given."""
    model, found = teacher(), {}
    value = torch.as_tensor(batch)
    with torch.inference_mode():
        for name, module in model.named_children():
            if name == str(len(model) - 1):
                found["penultimate"] = value
            value = module(value)
            found[name] = value
    kept = {place: found[place] for place in ("4", "6", "8", "10")}
    return {"logits": value, "penultimate": found["penultimate"], **kept}


records.version = "1"


def lessons() -> tuple[ArrayData, TeacherStore]:
    """The students' images, and what the teacher says of each of their looks: it is asked once for all runs."""
    train = images().train
    data = ArrayData(train.inputs[:IMAGES], train.labels[:IMAGES], BATCH, AUGMENT, views=EPOCHS, seed=0)
    folder = ROOT / "build" / "distillation" / "store"
    build(folder, teacher(), data, keep=Dense(), outputs=records, views=EPOCHS, event=print)
    return data, TeacherStore.open(folder)


def accuracy(model: nn.Module) -> float:
    """On the 10,000 test images."""
    test = images().test
    return float((framework_of(model).inference.predict(model, test.inputs).argmax(-1) == test.labels).mean())


def prepare() -> None:
    """Train the teacher and ask it."""
    lessons()


def about(task: str) -> str:
    """What was trained on what."""
    image = torch.zeros(1, 3, 32, 32)
    counts = [framework_of(model).analysis.count(model, image) for model in (resnet(), STUDENTS[task]())]
    costs = [f"{figures.count(parameters)} parameters, {figures.count(macs)} MACs" for parameters, macs in counts]
    return (
        f"The teacher ({costs[0]}) was trained on {TEACHERS:,} images and classifies {accuracy(teacher()):.1%} of "
        f"the 10,000 test images correctly. The students ({costs[1]}) are trained on {IMAGES:,} of the teacher's "
        f"training images for {EPOCHS} epochs, batch size {BATCH}, with SGD with momentum and a cosine schedule from "
        f"{TRAINING.learning_rate:g}. The teacher's outputs for each augmented image are read from one store."
    )


def run(task: str, objective: str, seed: int) -> dict[str, Any]:
    """One student, trained and judged."""
    data, store = lessons()
    torch.manual_seed(seed)
    student = STUDENTS[task]().to(memory_format=torch.channels_last)  # half the time for MobileNet on a processor
    training = dataclasses.replace(TRAINING, seed=seed)
    doubted: list[str] = []
    hooks = TrainingHooks(event=lambda event: doubted.append(event["text"]) if "text" in event else None)
    wanted = objectives(task)[objective]
    trained = kirsch.distill(student, store, data, objective=wanted, training=training, hooks=hooks)
    return {
        "accuracy": accuracy(trained.model),
        "shares": trained.history[-1]["gradient_shares"],
        "doubts": doubted,
    }
