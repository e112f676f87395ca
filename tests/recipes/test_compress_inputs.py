"""`kirsch.compress` and recipes for models with several inputs: pairs of vectors, and texts with an attention mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import kirsch
from kirsch.deploy.onnxruntime import OnnxSession
from kirsch.errors import DataError, UsageError
from kirsch.recipes.recipe import read_recipe
from kirsch.recipes.runner import run
from kirsch.steps import Export, Measure, Prune, Recover

TRAINING = kirsch.Training(epochs=4, learning_rate=0.01, optimizer="adamw")

PAIRS = '''
import numpy as np
import torch
from torch import nn

from kirsch.data.dataset import DataSet, Split


class Siamese(nn.Module):
    """Whether the first value of `left` is larger than that of `right`."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 2)

    def forward(self, left, right):
        return self.head(self.encoder(left) - self.encoder(right))


def pairs(*, form, seed=0):
    random = np.random.default_rng(seed)

    def part(n):
        left, right = (random.standard_normal((n, 4)).astype(np.float32) for _ in range(2))
        labels = (left[:, 0] > right[:, 0]).astype(np.int64)
        return Split({"left": left, "right": right} if form == "dict" else (left, right), labels)

    return DataSet("pairs", part(256), part(32), part(64))
'''

RECIPE = """
name: pairs
data: {source: "pairs.py:pairs", batch_size: 32, options: {form: dict}}
teacher: {model: "pairs.py:Siamese"}
steps:
  - train: {epochs: 3, learning_rate: 0.01, optimizer: adamw}
  - prune: {goal: {macs: 0.7}}
  - export
goal: {max_drop: 0.5}
"""


def namespace():
    names = {}
    exec(PAIRS, names)
    return names


@pytest.mark.parametrize("form", ["dict", "tuple"])
def test_model_with_two_inputs_is_compressed(form, tmp_path):
    names = namespace()
    data = names["pairs"](form=form)
    model = kirsch.fit(names["Siamese"](), data.batches(32), training=TRAINING).model
    found = kirsch.compress(
        model,
        data,
        steps=[Prune(goal=kirsch.Goal(macs=0.7)), Recover(epochs=1), Export(), Measure(rounds=6)],
        max_drop=0.5,
        speedup=1e-6,
        folder=tmp_path / "run",
        batch_size=32,
    )
    assert found.met
    assert [item["name"] for item in found.metrics["goal"]["items"]] == ["prune.macs", "max_drop", "speedup"]
    assert [value["name"] for value in found.artifact.details["inputs"]] == ["left", "right"]
    inputs = data.test.inputs.values() if form == "dict" else data.test.inputs
    with torch.no_grad():
        logits = found.model(*map(torch.from_numpy, inputs)).numpy()
    np.testing.assert_allclose(OnnxSession(found.artifact.path).predict(data.test.inputs), logits, atol=1e-4)
    correct = (logits.argmax(1) == data.test.labels).mean()
    assert found.metrics["models"][-1]["accuracy"]["value"] == pytest.approx(correct)
    report = found.report.read_text()
    assert "x1 = np.zeros((1, 4)" in report  # the example code has both inputs


class Standardized(torch.nn.Module):
    """A classifier of the sign of the first value, whose second argument is its usual input."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))

    def forward(self, raw=None, standardized=None):
        return self.body((raw - 0.6) / 2 if standardized is None else standardized)


class OnlyByName(Standardized):
    def forward(self, *, standardized):
        return self.body(standardized)


@pytest.mark.parametrize("kind", [Standardized, OnlyByName])
@pytest.mark.parametrize("from_loader", [False, True])
def test_single_input_is_passed_to_the_argument_of_its_name(kind, from_loader, tmp_path):
    inputs = np.random.default_rng(0).standard_normal((300, 4)).astype(np.float32)
    part = kirsch.Split({"standardized": inputs}, (inputs[:, 0] > 0).astype(np.int64))
    train = [{**part.inputs, "labels": part.labels}] if from_loader else part
    data = kirsch.DataSet("signs", train, part, part)
    model = kirsch.fit(kind(), data.batches(300), training=TRAINING).model
    steps = [Prune(goal=kirsch.Goal(macs=0.9)), Export(), Measure(rounds=6)]
    found = kirsch.compress(model, data, steps=steps, folder=tmp_path / "run")
    assert [value["name"] for value in found.artifact.details["inputs"]] == ["standardized"]
    with torch.no_grad():
        logits = found.model(standardized=torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(OnnxSession(found.artifact.path).predict(data.test.inputs), logits, atol=1e-4)
    correct = (logits.argmax(1) == part.labels).mean()
    assert found.metrics["models"][-1]["accuracy"]["value"] == pytest.approx(correct)


def test_single_input_with_another_name_is_the_first_argument(tmp_path):
    inputs = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    part = kirsch.Split({"image": inputs}, (inputs[:, 0] > 0).astype(np.int64))
    data = kirsch.DataSet("signs", part, part, part)
    model = kirsch.fit(Standardized(), data.batches(64), training=TRAINING).model
    steps = [Prune(goal=kirsch.Goal(macs=0.9)), Recover(epochs=1), Export(), Measure(rounds=6)]
    found = kirsch.compress(model, data, steps=steps, folder=tmp_path / "run")
    assert [value["name"] for value in found.artifact.details["inputs"]] == ["raw"]


def test_inputs_with_names_that_the_model_does_not_have_are_refused_before_any_work(tmp_path):
    names = namespace()
    left, right = np.zeros((8, 4), np.float32), np.ones((8, 4), np.float32)
    part = kirsch.Split({"left": left, "right": right, "middle": left}, np.arange(8) % 2)
    data = kirsch.DataSet("triples", part, part, part)
    with pytest.raises(UsageError, match=r"takes left, right; the batches have left, right, middle by name"):
        kirsch.compress(names["Siamese"](), data, kirsch.Goal(macs=0.7), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_recipe_takes_a_data_source_with_two_inputs(tmp_path):
    (tmp_path / "pairs.py").write_text(PAIRS)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    outcome = run(read_recipe(tmp_path / "recipe.yaml"), tmp_path / "run", base=tmp_path, listen=lambda _: None)
    assert outcome.exit_code == 0
    assert [model["name"] for model in outcome.metrics["models"]] == ["teacher", "pruned", "exported"]


# ------------------------------------------------------------------------------------------------ texts with a mask

LENGTH = 8


def texts(count, seed):
    """Return texts whose label follows from their first token; the padding contains random tokens.

    Without the mask, the padding changes the outputs of a model.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 50, (count, LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (count, 1), generator=generator)
    return [
        {"input_ids": row, "attention_mask": row_mask.long(), "labels": (row[0] >= 26).long()}
        for row, row_mask in zip(ids, mask, strict=True)
    ]


def shortened(samples):
    """Return a batch that is cut to the length of its longest text, as DataCollatorWithPadding pads to it."""
    length = int(max(sample["attention_mask"].sum() for sample in samples))
    return {
        name: torch.stack([sample[name][:length] if sample[name].ndim else sample[name] for sample in samples])
        for name in samples[0]
    }


@pytest.fixture(scope="module")
def bert(transformers):
    """Trained classifier, its training loader, and loaders of the other parts."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        num_labels=2,
    )
    loader = DataLoader(texts(128, seed=0), batch_size=8, shuffle=True, collate_fn=shortened)
    training = kirsch.Training(epochs=5, learning_rate=3e-3, optimizer="adamw")
    model = kirsch.fit(transformers.BertForSequenceClassification(config), loader, training=training).model
    return model, loader, [DataLoader(texts(40, seed), batch_size=32) for seed in (1, 2)]


def test_text_classifier_with_a_mask_is_compressed(bert, tmp_path):
    model, loader, others = bert
    data = kirsch.DataSet("texts", loader, *others)
    found = kirsch.compress(
        model,
        data,
        kirsch.Goal(macs=0.85),
        steps=[
            Prune(kinds=["ffn unit"], uniform=True),
            Recover(epochs=1, learning_rate=1e-3),
            Export(),
            Measure(rounds=6),
        ],
        max_drop=0.5,
        folder=tmp_path / "run",
    )
    assert found.met
    assert found.model.config.intermediate_size < 32
    inputs = data.test.inputs
    session = OnnxSession(found.artifact.path)
    logits = session.predict(inputs)
    with torch.no_grad():
        expected = found.model(**{name: torch.from_numpy(part) for name, part in inputs.items()}).logits
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)
    changed = session.predict(inputs | {"attention_mask": np.ones_like(inputs["attention_mask"])})
    assert not np.allclose(changed, logits, atol=1e-5)  # the mask is an input of the file, not a constant


def test_blocks_are_ranked_on_batches_of_several_lengths(bert, tmp_path):
    model, loader, others = bert
    data = kirsch.DataSet("texts", loader, *others)
    assert len({inputs["input_ids"].shape for inputs in data.first_inputs(128)}) > 1
    steps = [Prune(goal=kirsch.Goal(macs=0.6), kinds="block")]
    found = kirsch.compress(model, data, steps=steps, folder=tmp_path / "run")
    assert len(found.metrics["provenance"]["plans"][0]["blocks"]) == 1


def without(name, samples):
    return [{key: part for key, part in sample.items() if key != name} for sample in samples]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"train": without("attention_mask", texts(16, 0))},
            r"The train part of texts has the inputs input_ids; the test part of texts has the inputs input_ids, atten",
        ),
        (
            {"test": without("attention_mask", texts(16, 0))},
            r"The test part of texts has the inputs input_ids; the validation part of texts has the inputs",
        ),
    ],
)
def test_wrong_inputs_are_refused_before_any_work(bert, tmp_path, changes, sentence):
    parts = {
        part: DataLoader(changes.get(part, texts(16, 1)), batch_size=8) for part in ("train", "validation", "test")
    }
    events = []
    with pytest.raises(DataError, match=sentence):
        kirsch.compress(
            bert[0],
            kirsch.DataSet("texts", **parts),
            kirsch.Goal(macs=0.85),
            folder=tmp_path / "run",
            listen=events.append,
        )
    assert events == []
    assert not (tmp_path / "run").exists()
