"""Public models are pruned correctly: a sample of them in every test run, all of them with `-m sweep`."""

from __future__ import annotations

import coverage
import kernels
import pytest
import torch
import zoo

import kirsch

pytestmark = pytest.mark.filterwarnings("ignore")

MODELS = {f"{recipe.library}/{recipe.name}": recipe for recipe in zoo.MODELS}
SAMPLE = {
    "torchvision": "squeezenet1_1 mobilenet_v3_small shufflenet_v2_x0_5",
    "timm": "vit_tiny_patch16_224 tinynet_e resnest14d starnet_s1",
    "transformers": "distilbert t5 llama-gqa swin wav2vec2 deberta-v2",
}
QUICK = [f"{library}/{name}" for library, names in SAMPLE.items() for name in names.split()]


@pytest.mark.parametrize("name", QUICK)
def test_a_model_is_pruned_correctly(name):
    row = {}
    model, inputs = MODELS[name].build()
    graph = kirsch.trace(model, inputs)
    assert (graph.cost.parameters, graph.cost.macs) == coverage.count(model, inputs)
    assert coverage.prune_half_of_every_group(model, graph, row) == "correct"
    pruned = kirsch.prune(model, coverage.half_macs_plan(graph, row))
    assert coverage.training_error(pruned, inputs) is None
    assert "goal" not in row, "half of the MACs was out of reach"


@pytest.mark.sweep
@pytest.mark.timeout(coverage.LIMIT)
@pytest.mark.parametrize("name", MODELS)
def test_each_model_has_the_result_correct(name):
    row = coverage.in_process(MODELS[name], "tuned", "row", coverage.LIMIT)
    assert row["result"] == "correct", row.get("why")


def test_nms_removes_boxes_that_overlap_a_better_one():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30], [0, 0, 4, 4]])
    assert kernels.nms(boxes, torch.tensor([0.5, 0.9, 0.1, 0.7]), 0.5).tolist() == [1, 3, 2]
    assert kernels.nms(boxes[:0], torch.zeros(0), 0.5).tolist() == []


@pytest.mark.parametrize("aligned", [False, True])
def test_roi_align_of_a_linear_ramp_returns_its_values_at_cell_centers(aligned):
    """If the values are the x coordinates of the pixels, the mean over a cell is the x coordinate of its center."""
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)
    box = torch.tensor([[0.0, 4, 2, 8, 6]])
    out = kernels.roi_align(ramp, box, 1.0, 2, 2, 2, aligned)
    shift = 0.5 if aligned else 0.0
    torch.testing.assert_close(out[0, 0], torch.tensor([5.0, 7.0]).expand(2, 2) - shift)
