"""`kirsch.sparsify`: which weights become zero, for each importance, pattern and ranking."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kirsch
from kirsch.errors import NumericError, UnknownNameError, UsageError
from kirsch.frameworks.find import pytorch
from kirsch.pruning.sparsity.matrix import from_matrix, matrix_shape, to_matrix
from sparse_networks import Layers, digits_like, tokens

MASKING = pytorch().masking


def weights_of(result):
    return {name: value.detach().numpy() for name, value in kirsch.fold_masks(result.model).named_parameters()}


def test_a_weight_survives_the_conversion_to_a_matrix_whose_columns_are_its_inputs():
    for layer, inputs in (
        (nn.Conv2d(4, 6, 3, groups=2), 2),
        (nn.ConvTranspose2d(4, 6, 3, groups=2), 2),
        (nn.Linear(5, 3), 5),
    ):
        weight = MASKING.weight_matrices(layer)[0]
        values = MASKING.values(layer, "weight")
        matrix = to_matrix(values, weight)
        assert matrix.shape == matrix_shape(weight)
        assert matrix.shape[3] == inputs
        assert np.array_equal(from_matrix(matrix, weight), values)


def test_global_magnitude_removes_the_smallest_weights_of_the_whole_model():
    model, *_ = digits_like()
    result = kirsch.sparsify(model, sparsity=0.7)
    before = [layer.weight.detach().numpy() for layer in (model[0], model[3], model[7])]
    after = [weights_of(result)[f"{i}.weight"] for i in (0, 3, 7)]
    sizes = np.abs(np.concatenate([value.ravel() for value in before]))
    removed = np.concatenate([value.ravel() for value in after]) == 0
    assert removed.sum() == round(0.7 * len(sizes)) == result.zeros
    assert sizes[removed].max() < sizes[~removed].min()


def test_local_magnitude_gives_each_layer_the_same_sparsity():
    model, *_ = digits_like()
    result = kirsch.sparsify(model, sparsity=0.5, ranking="local")
    assert [layer.zeros / layer.size for layer in result.layers] == [0.5] * 3
    for layer in result.layers:
        size = np.abs(MASKING.values(model, layer.name))
        zero = weights_of(result)[layer.name] == 0
        assert size[zero].max() < size[~zero].min()


def test_wanda_compares_weight_times_norm_of_the_input_within_each_output():
    model, images, _ = digits_like()
    result = kirsch.sparsify(model, sparsity=0.5, importance="wanda", data=[images[:20], images[20:]])
    after = weights_of(result)
    inputs = {0: images, 3: model[:3](images)}
    for index, x in inputs.items():
        columns = nn.functional.unfold(x, 3, padding=1)  # (N, C * 9, positions)
        norms = columns.pow(2).sum((0, 2)).sqrt().detach().numpy()
        scores = np.abs(model[index].weight.detach().numpy().reshape(len(model[index].weight), -1)) * norms
        zero = (after[f"{index}.weight"] == 0).reshape(scores.shape)
        assert (zero.sum(1) == round(0.5 * scores.shape[1])).all()
        for row, removed in zip(scores, zero, strict=True):
            assert row[removed].max() <= row[~removed].min() * (1 + 1e-5)


def test_padding_does_not_count_for_wanda():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layer = nn.Embedding(10, 8), nn.Linear(8, 8)

        def forward(self, input_ids, attention_mask=None):
            return self.layer(self.embed(input_ids))

    torch.manual_seed(0)
    model = Net()
    ids, mask = torch.randint(1, 10, (4, 6)), torch.ones(4, 6, dtype=torch.long)
    mask[:, 3:] = 0
    cut = [{"input_ids": ids[:, :3], "attention_mask": mask[:, :3]}]
    padded = [{"input_ids": torch.where(mask > 0, ids, 7), "attention_mask": mask}]
    results = [kirsch.sparsify(model, sparsity=0.5, importance="wanda", data=data) for data in (cut, padded)]
    assert np.array_equal(*(weights_of(result)["layer.weight"] for result in results))


def relative_error(model, result, x):
    with torch.no_grad():
        expected, found = model(x), result.model(x)
    return float((found - expected).pow(2).sum() / (expected - expected.mean(0)).pow(2).sum())


@pytest.mark.parametrize(
    "options", [{"sparsity": 0.5}, {"pattern": "2:4", "exclude": "conv"}, {"pattern": "1x4", "sparsity": 0.5}]
)
def test_sparsegpt_keeps_the_outputs_better_than_magnitude_in_every_layer_type(options):
    torch.manual_seed(0)
    model, x = Layers().eval(), tokens(64)
    errors = {
        importance: relative_error(model, kirsch.sparsify(model, importance=importance, data=data, **options), x)
        for importance, data in (("magnitude", None), ("sparsegpt", [x[:30], x[30:]]))
    }
    assert errors["sparsegpt"] < 0.5 * errors["magnitude"]


def deep(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(24, 24) for _ in range(5)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())), nn.Linear(24, 6))
    return model.eval(), torch.randn(256, 24) @ torch.randn(24, 24) / 5


def test_sparsegpt_sees_the_inputs_from_earlier_layers_with_zeros():
    """Layers that are made sparse on the inputs in the dense model give a larger mean error of the output."""
    errors = []
    for seed in range(4):
        model, x = deep(seed)
        sparse = kirsch.sparsify(model, sparsity=0.6, importance="sparsegpt", data=x)
        layers = [str(index) for index in range(0, 11, 2)]
        each = {}
        for layer in layers:
            others = [other for other in layers if other != layer]
            alone = kirsch.sparsify(model, sparsity=0.6, importance="sparsegpt", data=x, exclude=others)
            each[f"{layer}.weight"] = torch.from_numpy(MASKING.values(alone.model, f"{layer}.weight"))
        assert torch.equal(sparse.model[0].weight, each["0.weight"])
        assert not torch.equal(sparse.model[2].weight, each["2.weight"])
        separate = deep(seed)[0]
        separate.load_state_dict({**model.state_dict(), **each})
        power = model(x).var(0).mean()
        errors.append([((part(x) - model(x)).pow(2).mean() / power).item() for part in (sparse.model, separate)])
    sequential, independent = np.mean(errors, axis=0)
    assert sequential < independent


def test_sparsegpt_is_the_exact_optimal_brain_surgeon_in_the_first_layer():
    """One of two consecutive weights at a time, each with the inverse of the matrix of the remaining inputs."""
    model, x = deep()
    sparse = kirsch.sparsify(model, pattern="1:2", importance="sparsegpt", data=x)
    inputs, expected = x.double().numpy(), model[0].weight.detach().double().numpy().copy()
    hessian = inputs.T @ inputs
    hessian += 0.01 * np.diag(hessian).mean() * np.eye(24)
    for row in expected:
        for start in range(0, 24, 2):
            inverses = [np.linalg.inv(hessian[j:, j:]) for j in (start, start + 1)]
            scores = [row[start + i] ** 2 / inverse[0, 0] for i, inverse in enumerate(inverses)]
            j = start + int(scores[1] < scores[0])
            inverse = inverses[j - start]
            row[j:] -= row[j] / inverse[0, 0] * inverse[0]
    np.testing.assert_allclose(MASKING.values(sparse.model, "0.weight"), expected, atol=1e-5)


def test_the_blocks_of_sparsegpt_follow_the_run_and_not_the_definition():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = nn.Linear(8, 4), nn.Linear(8, 8)

        def forward(self, x):
            return self.last(self.first(x).relu())

    torch.manual_seed(0)
    model, x = Backwards().eval(), torch.randn(64, 8)
    sparse = kirsch.sparsify(model, sparsity=0.5, importance="sparsegpt", data=x)
    alone = {
        name: kirsch.sparsify(model, sparsity=0.5, importance="sparsegpt", data=x, exclude=other).model
        for name, other in (("first", "last"), ("last", "first"))
    }
    assert torch.equal(sparse.model.first.weight, alone["first"].first.weight)
    assert not torch.equal(sparse.model.last.weight, alone["last"].last.weight)


def test_sparsegpt_with_a_small_memory_gives_the_same_weights(monkeypatch):
    model, x = Layers().eval(), tokens(32)
    first = kirsch.sparsify(model, sparsity=0.5, importance="sparsegpt", data=x)
    monkeypatch.setattr("kirsch.pruning.sparsity.choice.GRAM_BYTES", 1)
    second = kirsch.sparsify(model, sparsity=0.5, importance="sparsegpt", data=x)
    found, expected = weights_of(second), weights_of(first)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("importance", ["magnitude", "wanda", "sparsegpt", "random"])
@pytest.mark.parametrize(
    ("pattern", "exclude"), [("2:4", ()), ("1:2", ()), ("3:8", ("conv", "up")), ("1x4", ()), ("4x1", ()), ("2x2", ())]
)
def test_each_pattern_holds_in_every_layer(importance, pattern, exclude):
    model, x = Layers(), tokens()
    sparsity = None if ":" in pattern else 0.5
    data = x if importance in ("wanda", "sparsegpt") else None
    result = kirsch.sparsify(
        model, sparsity=sparsity, pattern=pattern, importance=importance, data=data, exclude=exclude
    )
    matrices = {w.name: w for w in MASKING.weight_matrices(model)}
    for layer in result.layers:
        mask = to_matrix(MASKING.masks(result.model)[layer.name], matrices[layer.name])
        groups, rows, kernel, columns = mask.shape
        if ":" in pattern:
            n, m = map(int, pattern.split(":"))
            assert (mask.reshape(groups, rows, kernel, columns // m, m).sum(-1) == n).all()
        else:
            r, c = map(int, pattern.split("x"))
            blocks = mask.reshape(groups, rows // r, r, kernel, columns // c, c)
            assert (blocks.all((2, 5)) | ~blocks.any((2, 5))).all()
    assert result.sparsity == pytest.approx(0.5 if sparsity else 1 - n / m, abs=0.01)


def test_a_block_is_ranked_by_its_mean_magnitude():
    layer = nn.Linear(4, 2, bias=False)
    layer.weight.data = torch.tensor([[1.0, 1.0, 3.0, 0.1], [0.2, 0.2, 5.0, 5.0]])  # means 1, 1.55; 0.2, 5
    result = kirsch.sparsify(layer, sparsity=0.5, pattern="1x2")
    assert weights_of(result)["weight"].tolist() == pytest.approx(np.array([[0, 0, 3, 0.1], [0, 0, 5, 5]]))


def test_the_model_and_the_random_state_are_not_changed():
    model, x = Layers(), tokens()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    for importance, data in (("magnitude", None), ("random", None), ("wanda", x), ("sparsegpt", x)):
        kirsch.sparsify(model, sparsity=0.5, importance=importance, data=data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_shuffling_loader_does_not_change_the_random_state():
    model, images, labels = digits_like()
    loader = DataLoader(TensorDataset(images, labels), batch_size=8, shuffle=True)
    state = torch.get_rng_state()
    kirsch.sparsify(model, sparsity=0.5, importance="wanda", data=loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_record_states_the_pattern_of_each_mask():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    first = kirsch.sparsify(model, sparsity=0.4)
    second = kirsch.sparsify(first.model, pattern="2:4")
    assert {layer.name: layer.pattern for layer in second.layers} == {
        "0.weight": "unstructured",
        "1.weight": "2:4",
        "2.weight": "2:4",
    }
    assert "fewer than the 4 of the pattern" in second.kept["0.weight"]
    assert "Kept with the earlier mask: `0.weight`" in str(second)
    third = kirsch.sparsify(copy.deepcopy(second.model), sparsity=0.9, exclude="1")
    assert [layer.pattern for layer in third.layers] == ["unstructured", "2:4", "unstructured"]
    assert third.kept["1.weight"] == "excluded by `exclude`"
    raised = third.raise_to(0.95)
    assert [layer.pattern for layer in raised.layers] == ["unstructured", "2:4", "unstructured"]


@pytest.mark.parametrize("importance", ["magnitude", "wanda", "sparsegpt", "random"])
def test_masks_only_grow_and_count_towards_the_sparsity(importance):
    model, images, _ = digits_like()
    data = images if importance in ("wanda", "sparsegpt") else None
    options = {"importance": importance, "data": data, "ranking": "local"}
    first = kirsch.sparsify(model, sparsity=0.4, **options)
    second = kirsch.sparsify(first.model, sparsity=0.8, **options)
    before, after = MASKING.masks(first.model), MASKING.masks(second.model)
    assert all(not (after[name] & ~before[name]).any() for name in before)
    assert second.sparsity == pytest.approx(0.8, abs=0.01)
    assert first.sparsity == pytest.approx(0.4, abs=0.01)  # the first model is not changed
    again = kirsch.sparsify(second.model, sparsity=second.options.sparsity, **options)
    assert again.zeros == second.zeros


def test_raise_to_changes_the_model_in_place_and_returns_a_new_record():
    model, images, _ = digits_like()
    for importance, data in (("magnitude", None), ("wanda", images), ("sparsegpt", images)):
        first = kirsch.sparsify(model, sparsity=0.2, importance=importance, data=data)
        parameters = {id(value) for value in first.model.parameters()}
        second = first.raise_to(0.6)
        assert second.model is first.model
        assert {id(value) for value in second.model.parameters()} == parameters
        assert second.sparsity == pytest.approx(0.6, abs=0.01)
        assert (weights_of(second)["3.weight"] == 0).mean() > 0.3


def test_a_sparsity_of_zero_masks_nothing():
    model, *_ = digits_like()
    assert kirsch.sparsify(model, sparsity=0.0).zeros == 0


def test_a_tied_weight_is_masked_once_in_all_its_layers():
    result = kirsch.sparsify(Layers(), sparsity=0.5)
    assert [layer.name for layer in result.layers if layer.name in ("head.weight", "tied.weight")] == ["head.weight"]
    assert torch.equal(result.model.head.weight, result.model.tied.weight)


@pytest.mark.parametrize("excluded", ["head", "tied", "head.weight"])
def test_an_excluded_layer_is_kept_also_by_the_name_of_a_tied_layer(excluded):
    result = kirsch.sparsify(Layers(), sparsity=0.5, exclude=excluded)
    assert result.kept["head.weight"] == "excluded by `exclude`"
    assert "head.weight" not in {layer.name for layer in result.layers}


def test_layers_smaller_than_the_pattern_are_kept_and_listed():
    model, *_ = digits_like()
    result = kirsch.sparsify(model, pattern="2:4")
    assert result.kept["0.weight"] == "its layer has 1 inputs, fewer than the 4 of the pattern 2:4"
    assert {layer.name for layer in result.layers} == {"3.weight", "7.weight"}
    blocks = kirsch.sparsify(model, pattern="16x1", sparsity=0.5)
    assert blocks.kept["7.weight"] == "its layer has 3 outputs, fewer than the 16 of the pattern 16x1"


def test_stacked_weights_of_experts_are_kept_with_their_own_reason():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.experts = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x):
            return torch.einsum("ne,eij,nj->ni", self.router(x).softmax(-1), self.experts, x)

    result = kirsch.sparsify(Mixture(), sparsity=0.5)
    assert "experts of a mixture" in result.kept["experts"]
    assert [layer.name for layer in result.layers] == ["router.weight"]


def test_a_layer_that_does_not_run_on_the_data_is_kept_and_listed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    for importance in ("wanda", "sparsegpt"):
        result = kirsch.sparsify(Net(), sparsity=0.5, importance=importance, data=torch.randn(8, 4))
        assert result.kept["unused.weight"] == "its layer does not run on the calibration data"
        assert [layer.name for layer in result.layers] == ["used.weight"]


def test_a_layer_without_any_weight_left_is_noted():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.data *= 1e-3
    result = kirsch.sparsify(model, sparsity=0.5)
    assert any(note.startswith("No weight is left in `0.weight`") for note in result.notes)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "`sparsity` is missing"),
        ({"sparsity": 1.0}, "`sparsity` of kirsch.sparsify is 1.0"),
        ({"sparsity": -0.1}, "`sparsity` of kirsch.sparsify is -0.1"),
        ({"sparsity": 0.7, "pattern": "2:4"}, '`sparsity` is 0.7, and `pattern` "2:4" has 0.5'),
        ({"pattern": "1x4"}, "`sparsity` is missing"),
        ({"pattern": "2:4", "ranking": "global"}, '`ranking` is "global", and `pattern` is "2:4"'),
        ({"sparsity": 0.5, "importance": "sparsegpt", "ranking": "global"}, '`importance` is "sparsegpt"'),
        ({"sparsity": 0.5, "importance": "wanda"}, "`data` of kirsch.sparsify is missing"),
        ({"sparsity": 0.5, "importance": "sparsegpt"}, "`data` of kirsch.sparsify is missing"),
        ({"sparsity": 0.5, "data": [torch.ones(1, 1, 6, 6)]}, "`data` of kirsch.sparsify has no effect"),
        ({"sparsity": 0.5, "importance": "wanda", "data": iter([torch.ones(1)])}, "only once"),
        ({"sparsity": 0.5, "pattern": "3:5"}, '"3:5" has 0.4'),
        ({"pattern": "1:3"}, r'"1:3" does not divide 2 weights: `3.weight` \(8 inputs, which 3 does not divide\)'),
        ({"sparsity": 0.5, "pattern": "3x1"}, r"8 outputs, which 3 does not divide"),
        ({"sparsity": 0.5, "exclude": "*"}, "no weights to mask"),
        ({"sparsity": 0.5, "exclude": "layer*"}, r"'layer\*' in `exclude` matches no layer"),
    ],
)
def test_a_wrong_call_is_refused_before_the_model_is_copied(options, sentence, monkeypatch):
    model, *_ = digits_like()
    monkeypatch.setattr("kirsch.frameworks.pytorch.masking.interface.fold", None)
    with pytest.raises(UsageError, match=sentence):
        kirsch.sparsify(model, **options)


def test_the_error_of_a_pattern_shows_the_exclusion_that_fixes_it():
    model, *_ = digits_like()
    with pytest.raises(UsageError) as error:
        kirsch.sparsify(model, pattern="1:3")
    assert "exclude=['3', '7']" in error.value.fix
    with pytest.raises(UsageError, match="no weights to mask"):
        kirsch.sparsify(model, pattern="1:3", exclude=["3", "7"])  # the first layer has one input


def test_an_unknown_layer_to_exclude_is_refused():
    model, *_ = digits_like()
    with pytest.raises(UnknownNameError, match="`exclude` names the layer 'hed'"):
        kirsch.sparsify(model, sparsity=0.5, exclude="hed")


def test_a_lower_sparsity_than_that_of_the_masks_is_refused():
    model, *_ = digits_like()
    result = kirsch.sparsify(model, sparsity=0.9)
    with pytest.raises(UsageError, match=r"`sparsity` is 0.5, and 0.9\d* of the weights are masked already"):
        kirsch.sparsify(result.model, sparsity=0.5)
    with pytest.raises(UsageError, match="masked already"):
        result.raise_to(0.5)
    with pytest.raises(UsageError, match=r'sparsity of the pattern "2:4" cannot be raised'):
        kirsch.sparsify(model, pattern="2:4").raise_to(0.6)


def test_nan_names_the_weight_or_the_layer():
    model, images, _ = digits_like()
    broken = copy.deepcopy(model)
    broken[1].running_mean[:] = torch.nan
    with pytest.raises(NumericError, match="inputs of `3` contain NaN"):
        kirsch.sparsify(broken, sparsity=0.5, importance="wanda", data=images)
    model[3].weight.data[0, 0] = torch.nan
    with pytest.raises(NumericError, match=r"`3.weight` contains NaN"):
        kirsch.sparsify(model, sparsity=0.5)


# ------------------------------------------------------------------------------------------------ record


def test_the_record_states_the_zeros_of_each_layer_and_the_runtimes():
    model, *_ = digits_like()
    result = kirsch.sparsify(model, sparsity=0.9)
    text = str(result)
    assert "90.0 % zeros in 3 weights" in text
    assert "3.weight" in text
    assert "16×8×3×3" in text
    assert "A dense runtime, such as ONNX Runtime" in text
    assert "XNNPACK" in text
    assert "Kept dense: `0.bias`" in text
    for layer in result.layers:
        assert layer.zeros == (weights_of(result)[layer.name] == 0).sum()
    record = result.to_dict()
    assert record["zeros"] == result.zeros == sum(layer["zeros"] for layer in record["layers"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pattern": "2:4"}, ("TensorRT", "compute capability 8.0")),
        ({"pattern": "1:4"}, ("no runtime with kernels for 1:4",)),
        ({"pattern": "1x4", "sparsity": 0.5}, ("TensorFlow Lite", "1x4")),
    ],
)
def test_the_notes_name_the_runtimes_of_the_pattern(options, words):
    model, *_ = digits_like()
    notes = " ".join(kirsch.sparsify(model, **options).notes)
    assert all(word in notes for word in words)


def test_zeros_make_the_compressed_parameters_smaller_and_the_plain_ones_not():
    model, *_ = digits_like()
    results = [kirsch.sparsify(model, sparsity=sparsity) for sparsity in (0.0, 0.5, 0.9)]
    sizes = [result.after.compressed_bytes for result in results]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < 0.4 * results[2].before.compressed_bytes
    parameters = sum(value.numel() for value in model.parameters())
    assert {result.after.bytes for result in results} == {4 * parameters}
    assert results[0].parameters == parameters
