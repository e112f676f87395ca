"""Invalid arguments of `distill` are refused with the reason, and the models that are passed do not change."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from distillation.examples import image_data
from kirsch.data.augment import Flip
from kirsch.data.batches import ArrayData
from kirsch.distillation.checks import first_batch
from kirsch.distillation.distill import distill, fit
from kirsch.distillation.distiller import Distiller
from kirsch.distillation.objective import Objective
from kirsch.distillation.store import Dense, build_store
from kirsch.distillation.term import Ramp, Term
from kirsch.errors import DataError, ShapeError, StoreError, UnknownNameError, UsageError
from kirsch.frameworks.adapters import choose_adapter
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.pytorch.features.layers import expand
from kirsch.frameworks.training import Training, TrainingHooks

K, TOKENS = 3, 7
QUIET = {"check_teacher": False, "hooks": TrainingHooks(event=lambda event: None)}


class Net(nn.Module):
    """A convolution, a norm, a ReLU in place, and a head."""

    def __init__(self, width=4, classes=K):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.relu(self.norm(self.conv(x))).mean((2, 3)))


def distilled(term, student=None, teacher=None):
    training = Training(epochs=1, learning_rate=0.01)
    return distill(
        student or Net(), teacher or Net(6), image_data(), objective=Objective((term,)), training=training, **QUIET
    )


# ------------------------------------------------------------------------------------------------ layers


@pytest.mark.parametrize(
    ("layer", "error", "sentence"),
    [
        ("nrom", UnknownNameError, r"no layer in Net named 'nrom'\. .* Did you mean 'norm'\?"),
        ("penultimat", UnknownNameError, r"no layer in Net named 'penultimat'.* Did you mean 'penultimate'\?"),
        ("nor?m*", UnknownNameError, r"no layer in Net named 'nor\?m\*'"),
        ("**.nrom*", UnknownNameError, r"no layer in Net named '\*\*\.nrom\*'\. Known: conv, head, norm, relu"),
        ("output.logit", UnknownNameError, r"no output 'logit'\. Known: 0"),
        ("/maen", UnknownNameError, r"no function that the model calls 'maen'.* Did you mean 'mean'\?"),
        ("/mean#1", UsageError, r"the model calls mean 1 times in one forward pass; calls are numbered from 0, so #1"),
        (
            "hidden[0]",
            UsageError,
            r"Net does not take the keyword output_hidden_states, so .hidden.0.. has no value.* Choose the module",
        ),
        (
            "auto[7]",
            UsageError,
            r"stage 7 \(auto\[7\]\), and the number of stages shared by student and teacher is 1",
        ),
    ],
)
def test_an_unknown_layer_raises_an_error_that_names_the_known_layers(layer, error, sentence):
    with pytest.raises(error, match=sentence):
        distilled(Term("fitnet", 1.0, student_layer=layer))


def test_the_error_of_an_unknown_layer_of_the_teacher_names_the_teacher():
    class Large(Net):
        pass

    with pytest.raises(UnknownNameError, match=r"no layer in Large named 'nrom'\. .* Did you mean 'norm'\?"):
        distilled(Term("fitnet", 1.0, student_layer="norm", teacher_layer="nrom"), teacher=Large(6))


def test_logits_of_pixels_are_refused_by_a_loss_of_one_output_per_sample():
    nets = [nn.Sequential(nn.Conv2d(1, K, 1)) for _ in range(2)]
    sentence = r"'kd' cannot compare .*logits of pixels.*[Uu]se 'pixel-kd' or 'cwd-pixels'"
    with pytest.raises(ShapeError, match=sentence):
        distill(*nets, ArrayData(image_data().inputs, None), objective=Objective.kd(), **QUIET)


def test_different_numbers_of_classes_of_pixels_are_refused():
    nets = [nn.Sequential(nn.Conv2d(1, classes, 1)) for classes in (3, 4)]
    with pytest.raises(ShapeError, match=r"'cwd' cannot compare .*\(8, 3, 6, 6\), the teacher's \(8, 4, 6, 6\)"):
        distill(*nets, ArrayData(image_data().inputs, None), objective=Objective.preset("cwd"), **QUIET)


def test_sequences_of_different_lengths_are_refused():
    """Patches of 2 and of 3 pixels give 9 and 4 tokens."""

    class Patches(nn.Module):
        def __init__(self, patch):
            super().__init__()
            self.embed, self.head = nn.Conv2d(1, 5, patch, stride=patch), nn.Linear(5, K)
            self.norm = nn.LayerNorm(5)

        def forward(self, x):
            return self.head(self.norm(self.embed(x).flatten(2).transpose(1, 2)).mean(1))

    sentence = r"No adapter fits the student's .* The student has 9 tokens, the teacher 4\. Choose other layers"
    with pytest.raises(ShapeError, match=sentence):
        distilled(Term("hidden-mse", 1.0, student_layer="norm"), Patches(2), Patches(3))


# ------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize("temperature", [0, -1.0, Ramp(4.0, 0.0, epochs=10), Ramp(-1.0, 4.0, epochs=10)])
def test_a_temperature_that_is_not_always_above_0_is_refused(temperature):
    with pytest.raises(UsageError, match=r"the temperature of 'kd' is \S+; a number above 0 is needed"):
        Objective((Term("kd", 1.0, temperature=temperature),))


def test_labels_that_are_all_masked_are_refused_if_all_terms_need_labels():
    masked = ArrayData(image_data().inputs, np.full(24, -100), batch_size=12)
    sentence = (
        r"All targets are masked: the label of all (12|24) samples is -100\. Each term of the objective needs labels"
    )
    with pytest.raises(DataError, match=sentence):
        fit(Net(), masked)
    for name in ("dkd", "wsld"):
        with pytest.raises(DataError, match=sentence):
            distill(Net(), Net(6), masked, objective=Objective.preset(name), **QUIET)
    found = distill(Net(), Net(6), masked, training=Training(epochs=1), **QUIET)
    assert set(found.history[0]["terms"]) == {"kd"}


def test_a_term_that_needs_labels_is_0_on_a_batch_without_labels():
    """6 of 24 samples have a label.

    One batch of all samples, and four batches of which only the first has labels, have the same mean.
    """
    labels = np.full(24, -100)
    objective = Objective((Term("dkd", 1.0, temperature=4.0),), label_weight=0.0)
    net, teacher = Net().double(), Net(6).double()
    net.norm = nn.Identity()
    unlabeled = ArrayData(image_data().inputs.astype(np.float64), labels, batch_size=24)
    labels[next(ArrayData(unlabeled.inputs, None, batch_size=6).epoch(0, 0)).ids] = 1
    found = [
        distill(
            net,
            teacher,
            ArrayData(unlabeled.inputs, labels, batch_size=size),
            objective=objective,
            training=Training(epochs=1, gradient_accumulation_steps=24 // size, schedule="constant"),
            **QUIET,
        )
        for size in (24, 6)
    ]
    assert found[0].history[0]["terms"]["dkd"] == pytest.approx(found[1].history[0]["terms"]["dkd"], rel=1e-12)
    for first, second in zip(*(trained.model.parameters() for trained in found), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda labels: np.full_like(labels, -100),
            r"No sample of the validation has a label\. All its targets are -100",
        ),
        (
            lambda labels: np.eye(K)[labels],
            r"validation \(its first 8 samples\) does not fit\. The targets have shape \(8, 3\) .* callable: model",
        ),
        (lambda labels: labels + 0.5, r"The targets have shape \(8,\) and type float64"),
    ],
)
def test_a_validation_without_class_numbers_is_refused(change, sentence):
    with pytest.raises(DataError, match=sentence):
        fit(
            Net(),
            image_data(),
            training=Training(epochs=1),
            validation=(image_data().inputs, change(image_data().targets)),
        )


# ------------------------------------------------------------------------------------------------ teachers


def test_a_student_among_its_teachers_is_refused():
    net = Net()
    with pytest.raises(UsageError, match=r"Student and teacher are the same object\. Give the student as a copy"):
        distill(net, [Net(6), net], image_data())


def test_a_teacher_with_another_vocabulary_is_refused():
    tokens = np.random.default_rng(0).integers(0, TOKENS, (4, 5))
    student, teacher = (nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, k)) for k in (TOKENS, 9))
    with pytest.raises(ShapeError, match=r"vocabulary of 7, the teacher one of 9\. Soft targets need the same tokens"):
        distill(student, teacher, ArrayData(tokens, tokens), objective=Objective.preset("causal"))


@pytest.fixture
def timm_transformer(timm):
    """Return a function that builds a vision transformer of timm with dropout and stochastic depth."""

    def build(seed=0):
        torch.manual_seed(seed)
        return timm.models.VisionTransformer(
            img_size=6, patch_size=3, in_chans=1, num_classes=K, embed_dim=8, depth=2, num_heads=2, mlp_ratio=2,
            drop_path_rate=0.9, proj_drop_rate=0.5, pos_drop_rate=0.5, attn_drop_rate=0.5,
        )  # fmt: skip

    return build


def test_the_copy_of_a_teacher_is_frozen_and_in_inference_mode(timm_transformer):
    """The teacher is in training mode and has gradients; with a drop rate of 0.9, two runs in training mode differ."""
    teacher = timm_transformer().train()
    teacher(torch.randn(2, 1, 6, 6)).sum().backward()
    before = state(teacher)
    first = first_batch(framework_of(teacher).training, image_data())
    bound = Distiller(Net(), teacher, Objective.kd(), first)
    bound(first)
    (capture,) = bound._teacher_source._captures
    assert capture.model is not teacher
    assert not any(module.training for module in capture.model.modules())
    assert not any(parameter.requires_grad for parameter in capture.model.parameters())
    inputs = torch.from_numpy(image_data().inputs)
    first, second = (capture(inputs)["logits"] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first, copy.deepcopy(teacher).eval()(inputs))
    assert not first.requires_grad
    bound.close()
    assert state(teacher) == before


def test_student_and_teacher_keep_their_modes_weights_and_gradients(timm_transformer):
    teacher = timm_transformer().train()
    teacher.blocks[1].eval()
    teacher.head.bias.requires_grad_(requires_grad=False)
    teacher(torch.randn(2, 1, 6, 6)).sum().backward()
    before = state(teacher)
    terms = (Term("kd", 1.0, temperature=2.0), Term("cc", 1.0, student_layer="penultimate"))
    student = timm_transformer(1)
    student_before = state(student)
    training = Training(epochs=2, learning_rate=0.01, weight_decay=0.1)
    found = distill(student, teacher, image_data(), objective=Objective(terms), training=training, **QUIET)
    assert state(teacher) == before
    assert state(student) == student_before
    assert not torch.equal(found.model.head.weight, student.head.weight)


def test_modules_that_a_student_shares_with_its_teacher_are_not_trained():
    teacher = Net(6)
    student = copy.copy(teacher)
    student._modules = {**teacher._modules, "head": nn.Linear(6, K)}
    before = state(teacher)
    found = distill(student, teacher, image_data(), training=Training(epochs=1), **QUIET)
    assert state(teacher) == before
    assert not torch.equal(found.model.conv.weight, teacher.conv.weight)


def state(model):
    """Return modes, hooks, weights, buffers and gradients in a form that can be compared."""
    tensors = {name: value.clone().tolist() for name, value in model.state_dict().items()}
    gradients = {
        n: (p.requires_grad, p.grad if p.grad is None else p.grad.tolist()) for n, p in model.named_parameters()
    }
    modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    return tensors, gradients, modules


# ------------------------------------------------------------------------------------------------ stores and samples


def test_a_store_of_another_transform_is_refused_by_distill(tmp_path):
    store = build_store(tmp_path / "store", Net(6), image_data(augment=Flip()), keep=Dense(), views=2)
    with pytest.raises(StoreError, match=r"is stale\. It was built with another value of the transform \("):
        distill(Net(), store, image_data(), objective=Objective.kd())


def test_a_store_of_other_ids_is_refused_by_distill(tmp_path):
    store = build_store(tmp_path / "store", Net(6), image_data(), keep=Dense())
    with pytest.raises(StoreError, match=r"another value of the data \(inputs and ids\)"):
        distill(Net(), store, image_data(ids=np.arange(24) + 1), objective=Objective.kd())


def test_a_store_of_another_teacher_is_refused_by_the_hash_of_the_weights(tmp_path):
    store = build_store(tmp_path / "store", Net(6), image_data(), keep=Dense())
    with pytest.raises(StoreError, match=r"another value of the teacher's weights \(teacher_sha256"):
        store.require(teacher=Net(6))


def test_sample_ids_that_are_not_unique_are_refused():
    ids = np.arange(24)
    ids[3] = 9
    with pytest.raises(
        DataError, match=r"sample ids are not unique\. The id 9 belongs to more than one sample\. Give each"
    ):
        image_data(ids=ids)


# ------------------------------------------------------------------------------------------------ terms


@pytest.mark.parametrize(
    ("make_term", "sentence"),
    [
        (
            lambda: Term(student_layer=[]),
            "`student_layer` of kirsch.Term is a list without elements; expected a layer name",
        ),
        (lambda: Term(student_layer=None), "`student_layer` of kirsch.Term is None"),
        (
            lambda: Term("fitnet", student_layer=["conv", 3]),
            "`student_layer` of kirsch.Term is a list with 2 elements; expected a layer name",
        ),
        (lambda: Term(weight="0.9"), "`weight` of kirsch.Term is '0.9'; expected a number"),
        (
            lambda: Term("attention-kl", student_layer="attention[-1]", options={"attention": "scores"}),
            "attention weights, after the softmax",
        ),
    ],
)
def test_an_invalid_term_is_refused_at_construction(make_term, sentence):
    with pytest.raises(UsageError, match=sentence):
        Objective((make_term(),))


def test_terms_without_a_teacher_are_refused():
    with pytest.raises(UsageError, match="The objective has terms, and there is no teacher"):
        distill(Net(), [], image_data(), **QUIET)


def test_lists_of_layers_need_equal_lengths_unless_they_have_a_pattern():
    with pytest.raises(UsageError, match="names 3 layers of the teacher and 2 of the student"):
        distilled(Term("at", 1.0, student_layer=["conv", "norm"], teacher_layer=["conv", "norm", "relu"]))
    found = distilled(Term("at", 1.0, student_layer=["conv", "norm"], teacher_layer=["conv*", "norm", "relu"]))
    assert "at" in found.history[0]["terms"]


class Ending(nn.Module):
    """A network that ends with layers without parameters, such as pooling or a softmax."""

    def __init__(self, *last, width=4):
        super().__init__()
        self.conv, self.classify = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, K, 1)
        self.last = nn.Sequential(*last)

    def forward(self, x):
        return self.last(self.classify(self.conv(x).relu()))


POOLED = nn.AdaptiveAvgPool2d(1), nn.Flatten()


@pytest.mark.parametrize("last", [POOLED, (nn.ReLU(inplace=True), *POOLED), (*POOLED, nn.LogSoftmax(-1))])
def test_the_penultimate_layer_is_the_input_of_the_last_layer_with_parameters(last):
    model = Ending(*last).eval()
    assert expand(model, "penultimate", torch.randn(2, 1, 6, 6)) == ["classify:in"]


def test_logits_that_the_last_layer_with_parameters_does_not_compute_have_no_penultimate_layer():
    model = Ending(*POOLED, nn.Flatten(), Doubled()).eval()
    with pytest.raises(UsageError, match="The last module of Ending with parameters does not compute the logits"):
        expand(model, "penultimate", torch.randn(2, 1, 5, 5))


class Doubled(nn.Module):
    def forward(self, x):
        return torch.cat([x, -x], -1)


class NamedOutputs(nn.Module):
    """A model with several named outputs, like question answering."""

    def __init__(self, *names, width=4):
        super().__init__()
        self.names, self.body = names, nn.Linear(6, width)
        self.heads = nn.ModuleList(nn.Linear(width, 5) for _ in names)

    def forward(self, x):
        return {name: head(self.body(x)) for name, head in zip(self.names, self.heads, strict=True)}


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("start_logits", "end_logits"), 'returns start_logits, end_logits, and none.*"output.start_logits"'),
        (("last_hidden_state",), "returns last_hidden_state and no logits: it has no head"),
    ],
)
def test_outputs_without_logits_must_be_compared_by_name(names, sentence):
    student, teacher, x = NamedOutputs(*names), NamedOutputs(*names, width=7), torch.randn(8, 6)
    with pytest.raises(UsageError, match=sentence):
        distill(student, teacher, [x], objective=Objective((Term("kd", 1.0),), label_weight=0.0), **QUIET)
    terms = tuple(Term("logit-l2", 1.0, student_layer=f"output.{name}", name=name) for name in names)
    found = distill(
        student, teacher, [x], objective=Objective(terms, label_weight=0.0)
    )  # without logits, the teacher is not evaluated
    assert found.history[0]["terms"].keys() == set(names)
    moved = [(a.weight != b.weight).any() for a, b in zip(found.model.heads, student.heads, strict=True)]
    assert all(moved)


def test_attention_with_different_numbers_of_heads_is_refused():
    assert choose_adapter((2, 4, 5, 5), (2, 4, 5, 5), takes="attention") is None
    with pytest.raises(ShapeError, match=r"The student's attention has 2 heads, the teacher's attention has 4.*minilm"):
        choose_adapter((2, 2, 5, 5), (2, 4, 5, 5), takes="attention")
