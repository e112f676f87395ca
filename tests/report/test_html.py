"""The report as a page: content and structure."""

from __future__ import annotations

import json
import re

import pytest

from kirsch.report import render
from kirsch.report.html import frequent_errors, shade
from report.structure import STYLE, assert_self_contained, assert_well_formed

SECTIONS = [
    "Trade-off",
    "Steps",
    "Removed units",
    "Quality",
    "Training",
    "Measurement",
    "Provenance",
]
"""Headings of the sections after the summary, in order."""


def headings(tree):
    return [heading.words for heading in tree.all("h2")]


def section(tree, heading):
    """Return the elements between a heading and the next heading of the same level."""
    (body,) = tree.all("body")
    starts = {child.words: i for i, child in enumerate(body.children) if getattr(child, "tag", "") == "h2"}
    end = min((i for i in starts.values() if i > starts[heading]), default=len(body.children))
    return type(body)("section", {}, body.children[starts[heading] : end])


def table(tree, *head):
    """Return the rows of the table whose head starts with these texts."""
    for candidate in tree.all("table"):
        first, *rows = candidate.rows()
        if tuple(first[: len(head)]) == head:
            return rows
    raise AssertionError(f"no table starts with {head}: {[t.rows()[0] for t in tree.all('table')]}")


# ------------------------------------------------------------------------------------------- structure


def test_the_style_sheet_loads_no_resources():
    assert not re.search(r"url\(|@import|expression|://", STYLE)


def test_the_page_is_self_contained_and_well_formed(page, metrics):
    tree = page(metrics)
    assert_self_contained(tree)
    assert_well_formed(tree)
    assert render(metrics).startswith("<!doctype html>\n")
    assert tree.all("html")[0].attributes == {"lang": "en"}
    assert {"charset": "utf-8"} in [meta.attributes for meta in tree.all("meta")]


def test_the_summary_is_followed_by_all_sections_in_order(page, metrics):
    tree = page(metrics)
    (summary,) = tree.all("section", aria_label="Summary")
    assert "Exported model" in summary.words
    assert headings(tree) == SECTIONS


@pytest.mark.parametrize(
    ("missing", "omitted"),
    [
        ({"removals": []}, ["Removed units"]),
        ({"quality": None}, ["Quality"]),
        ({"curves": []}, ["Training"]),
        ({"export": None}, []),
        ({"removals": [], "quality": None, "curves": [], "export": None}, SECTIONS[2:5]),
    ],
)
def test_a_section_whose_metrics_are_missing_is_omitted(page, metrics, missing, omitted):
    tree = page(metrics | missing)
    assert_self_contained(tree)
    assert_well_formed(tree)
    assert headings(tree) == [heading for heading in SECTIONS if heading not in omitted]
    assert ("Exported model" in tree.words) is ("export" not in missing)


def test_each_chart_has_a_table_with_its_values(page, metrics):
    """The table of the trade-off is always visible, the others are in details elements."""
    tree = page(metrics)
    assert len(tree.all("svg")) == 5
    sections = {heading: section(tree, heading) for heading in SECTIONS[:5]}
    assert [row[0] for row in table(sections["Trade-off"], "model")] == [m["name"] for m in metrics["models"]]
    folded = [details for heading in SECTIONS[2:5] for details in sections[heading].all("details")]
    assert [details.all("summary")[0].words for details in folded] == [
        "Table of groups",
        "Table of layers",
        "Table of values",
        "Table of values",
    ]
    assert all(len(details.all("table")) == 1 for details in folded)


# ------------------------------------------------------------------------------------------- numbers


def test_the_summary_has_size_latency_and_accuracy_before_and_after(page, metrics):
    """The size ratio is 3541463 / 479666 = 7.383."""
    tree = page(metrics)
    (heading,) = tree.all("h1")
    assert heading.words == "digits: 7.38× smaller, 5.42× [4.88 – 5.96] as fast, 98.5 % → 97.0 % accuracy"
    assert [part.words for part in tree.all("dd", class_="big")] == [
        "3.54 MB → 480 kB",
        "223 µs → 41.2 µs",
        "98.5 % → 97.0 %",
    ]
    assert "95 % interval 94.8 % – 98.2 %, n = 400" in tree.words
    assert [item.words for item in tree.all("li")][:2] == [
        "✓ met MACs 49.6 % of it",
        "✗ missed accuracy drop 1.5 points (significance: 7 samples lost, 1 gained)",
    ]


def test_the_summary_compares_with_the_model_that_the_quality_section_compares_with(page, metrics):
    metrics["models"][0]["key"] = metrics["models"][0]["name"] = "untrained"
    metrics["models"][1]["key"] = metrics["models"][1]["name"] = "teacher"
    tree = page(metrics)
    assert tree.all("h1")[0].words.endswith("97.3 % → 97.0 % accuracy")
    assert "File size, teacher → exported" in tree.words


def test_the_summary_lists_the_warnings_of_steps(page, metrics):
    metrics["warnings"] = [{"step": "recover", "text": "Unused <output>."}]
    assert "warning recover: Unused <output>." in [item.words for item in page(metrics).all("li")]


@pytest.mark.parametrize(
    ("goal", "text"),
    [
        ({"met": True, "text": "wanted", "items": [{"text": "t", "met": True, "significance": ""}]}, "Goal met"),
        ({"met": False, "text": "wanted", "items": [{"text": "t", "met": False, "significance": ""}]}, "Goal missed"),
        ({"met": True, "text": "", "items": []}, "No goal was set"),
    ],
)
def test_the_header_says_if_the_goal_is_met_missed_or_not_set(page, metrics, goal, text):
    words = page(metrics | {"goal": goal}).all("header")[0].words
    assert [state for state in ("Goal met", "Goal missed", "No goal was set") if state in words] == [text]
    assert goal["text"] in words


@pytest.mark.parametrize(
    ("size", "text"), [(3_541_463, "same size"), (7_082_926, "2.00× larger"), (1_770_731, "2.00× smaller")]
)
def test_the_size_ratio_is_smaller_larger_or_same(page, metrics, size, text):
    metrics["models"][-1]["bytes"] = size
    assert page(metrics).all("h1")[0].words.startswith(f"digits: {text}, ")


def test_the_exported_file_is_shown_with_its_hash_agreement_and_usage(page, metrics):
    (summary,) = page(metrics).all("section", aria_label="Summary")
    assert "artifacts/model.onnx, ONNX opset 20, 480 kB (479,666 bytes)" in summary.words
    assert metrics["export"]["sha256"] in summary.words
    assert "399 of 400 test samples get the same label" in summary.words
    assert "3.8e-06" in summary.words
    assert [part.text for part in summary.all("pre")] == [metrics["export"]["usage"]]


def test_the_table_of_models_has_all_costs(page, metrics):
    assert table(page(metrics), "model", "parameters") == [
        ["teacher", "885 k", "10.7 M", "3.54 MB", "223 µs", "268 µs", "reference", "98.5 % ± 1.2"],
        ["student", "223 k", "2.69 M", "892 kB", "67.8 µs", "81.4 µs", "3.29× [2.96 – 3.62]", "97.3 % ± 1.6"],
        ["pruned", "119 k", "1.34 M", "485 kB", "not measured", "", "", "54.3 % ± 4.8"],
        ["exported", "119 k", "1.34 M", "480 kB", "41.2 µs", "49.4 µs", "5.42× [4.88 – 5.96]", "97.0 % ± 1.7"],
    ]
    assert "Models without a measured latency are listed in the table only." in page(metrics).words


def test_latency_is_shown_as_not_measured_if_no_model_has_a_latency(page, metrics):
    for model in metrics["models"]:
        model["latency"] = None
    metrics["measured"] |= dict.fromkeys(("runtime", "threads", "batch", "rounds", "aa", "load_before", "load_after"))
    tree = page(metrics)
    assert_well_formed(tree)
    assert tree.all("h1")[0].words == "digits: 7.38× smaller, 98.5 % → 97.0 % accuracy"
    assert [part.words for part in tree.all("dd", class_="big")][1] == "not measured"
    assert "Models without a measured latency" not in tree.words
    assert "Noise floor" not in tree.words
    assert "Accuracy over file size" in tree.all("svg")[0].text


def test_the_table_of_steps_has_their_results_in_order(page, metrics):
    assert table(page(metrics), "#", "step") == [
        ["1", "train", "teacher trained", "98.5 % ± 1.2", "10.7 M MACs", "", "", "18 s"],
        ["2", "prune", "−50.4 % MACs", "a", "b", "c", "2 groups", "0.4 s"],
        ["3", "measure", "onnxruntime", "", "", "", "", "2 min 05 s"],
    ]


def test_removed_units_are_listed_by_group_and_by_layer(page, metrics):
    part = section(page(metrics), "Removed units")
    reason = "smallest weights of the group (L2)"
    assert table(part, "group", "kind") == [
        ["stem", "channel", "32", "0", "0", "0", "kept", "stem, stem_bn", "none"],
        ["block.conv1", "channel", "64", "5", "485", "5.07 k", reason, "block.conv1, block.bn1", "0–2, 7, 63"],
    ]
    assert table(part, "layer", "group") == [
        ["block.conv1", "block.conv1", "64", "59", "1.09 k", "1.00 k"],
        ["stem", "stem", "32", "32", "544", "544"],
    ]
    assert table(part, "share of parameters") == [["27.3 %", "reshape (view)", "head net.py:41"]]
    assert "The pruned model is equal to the masked original (rounding)." in part.words
    assert "its outputs change by 70.7 %." in part.words
    assert [item.words for item in part.all("li")] == ["MACs are far below the goal of <50 %>."]


def test_each_prune_step_has_its_own_section_and_plan(page, metrics):
    first = metrics["removals"][0]
    metrics["removals"].append(
        {
            "step": "prune-2",
            "groups": [first["groups"][1] | {"size": 59, "removed": [4]}],
            "layers": [first["layers"][0] | {"before": 59, "after": 58}],
            "blockers": [],
            "notes": [],
            "verification": first["verification"] | {"text": "close to the masked original"},
        }
    )
    metrics["provenance"]["plans"].append({"kirsch_plan": 1, "goal": {"macs": 0.3}})
    tree = page(metrics)
    assert_well_formed(tree)
    assert [text for text in headings(tree) if "Removed" in text] == ["Removed units: prune", "Removed units: prune-2"]
    parts = [section(tree, f"Removed units: {removed['step']}") for removed in metrics["removals"]]
    assert [row[8] for part in parts for row in table(part, "group", "kind")] == ["none", "0–2, 7, 63", "4"]
    assert "equal to the masked original" in parts[0].words
    assert "close to the masked original" in parts[1].words
    plans = section(tree, "Provenance").all("pre")[1:-1]
    assert [json.loads(plan.text)["goal"] for plan in plans] == [{"macs": 0.5}, {"macs": 0.3}]


@pytest.mark.parametrize(("count", "note"), [(12, None), (13, "1 more with"), (40, "28 more with")])
def test_at_most_twelve_blockers_are_listed_and_the_others_are_counted(page, metrics, count, note):
    metrics["removals"][0]["blockers"] *= count
    part = section(page(metrics), "Removed units")
    assert len(table(part, "share of parameters")) == 12
    assert ("more with smaller shares" in part.words) is (note is not None)
    assert note is None or note in part.words


def test_classes_are_listed_by_loss_of_accuracy_and_bins_by_model(page, metrics):
    part = section(page(metrics), "Quality")
    assert "teacher → exported: 7 samples lost, 1 gained of 400; not significant (p = 0.07)." in part.words
    assert table(part, "class", "before") == [
        ["eel", "97.7 %", "94.6 %", "−3.1 points", "130"],
        ["cat", "99.3 %", "97.1 %", "−2.1 points", "140"],
    ]
    assert "2 of 3 classes lost accuracy." in part.words
    assert "teacher 2.5 %" in part.words
    assert "exported 1.8 %" in part.words
    assert table(part, "model", "confidence") == [
        ["teacher", "55.3 %", "60.0 %", "5"],
        ["teacher", "97.4 %", "98.9 %", "395"],
        ["exported", "94.1 %", "96.8 %", "400"],
    ]


def test_no_class_is_listed_if_no_class_lost_accuracy(page, metrics):
    metrics["quality"]["lost"] = [{"name": "cat", "before": 0.5, "after": 0.5, "n": 4}]
    part = section(page(metrics), "Quality")
    assert "None of 1 classes lost accuracy." in part.words
    assert [element for element in part.all("table") if element.rows()[0][:2] == ["class", "before"]] == []


def test_confusion_matrices_are_shaded_by_the_fraction_of_the_row(page, metrics):
    before, after = section(page(metrics), "Quality").all("table", class_="heat")
    assert before.rows() == [
        ["", "cat", "dog", "eel"],
        ["cat", "139", "", "1"],
        ["dog", "2", "128", ""],
        ["eel", "", "3", "127"],
    ]
    shades = [[cell.attributes["class"] for cell in row.all("td")] for row in after.all("tr")[1:]]
    assert shades == [["right", "h2", "h0"], ["h0", "right", "h1"], ["h0", "h2", "right"]]


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [(0, 10, 0), (0, 0, 0), (1, 50, 1), (1, 49, 2), (1, 10, 2), (2, 10, 3), (4, 10, 3), (5, 10, 4), (10, 10, 4)],
)
def test_the_shade_of_an_error_grows_with_its_fraction_and_has_a_style(count, total, expected):
    assert shade(count, total) == expected
    assert f".h{expected} {{" in STYLE or not expected


def test_the_most_frequent_errors_are_listed_if_there_are_many_classes(page, metrics):
    """Two confusion matrices of a thousand classes would have two million cells."""
    count = 1000
    tables = [[[0] * count for _ in range(count)] for _ in range(2)]
    for k in range(count):
        tables[0][k][k] = tables[1][k][k] = 50
    tables[0][3][7], tables[1][3][7], tables[1][999][0], tables[1][5][6] = 2, 9, 30, 1
    quality = metrics["quality"]
    quality["classes"] = [f"class {k}" for k in range(count)]
    quality["before"]["confusion"], quality["after"]["confusion"] = tables
    tree = page(metrics)
    assert_well_formed(tree)
    assert tree.all("table", class_="heat") == []
    assert table(tree, "true class", "predicted class") == [
        ["class 999", "class 0", "0", "30"],
        ["class 3", "class 7", "2", "9"],
        ["class 5", "class 6", "0", "1"],
    ]
    tables[1][0] = list(range(count))
    assert [error["after"] for error in frequent_errors(quality)] == list(range(999, 979, -1))


def test_the_training_table_has_a_row_per_epoch(page, metrics):
    assert table(section(page(metrics), "Training"), "epoch", "loss") == [
        ["1", "0.583", "0.146", "", "92.8 %", "0.0500"],
        ["2", "0.0410", "0.0103", "", "99.4 %", "0.0250"],
        ["3", "0.0112", "0.00280", "", "98.9 %", "0.0167"],
    ]


def test_the_conditions_of_the_measurement_and_its_omissions_are_listed(page, metrics):
    part = section(page(metrics), "Measurement")
    keys, values = ([element.words for element in part.all(tag)] for tag in ("dt", "dd"))
    facts = dict(zip(keys, values, strict=True))
    assert facts["Runtime"] == "onnxruntime 1.32.0, 2 threads, batch of 1"
    assert facts["Rounds"].startswith("31, ")
    assert facts["Noise floor"].endswith("1.01× [0.974 – 1.03]")
    assert facts["Load average"] == "0.3 before, 0.8 after"
    assert facts["Machine"] == "Cherry 9000"
    assert facts["Data"] == "digits: 1,078 training, 360 validation, 400 test samples; SHA-256 6e072b976e072b97"
    assert facts["Seed"] == "11"
    assert [element.words for element in part.all("li")] == ["Energy.", "Other seeds."]


def test_a_note_on_the_measurement_is_shown_once_in_its_section(page, metrics):
    metrics["measured"]["notes"] = ["The clock was <slow>."]
    tree = page(metrics)
    assert tree.words.count("The clock was <slow>.") == 1
    assert "The clock was <slow>." in section(tree, "Measurement").words


def test_one_thread_is_written_in_the_singular(page, metrics):
    metrics["measured"]["threads"] = 1
    assert "onnxruntime 1.32.0, 1 thread, batch" in page(metrics).words


def test_the_provenance_has_the_complete_recipe_plan_and_environment(page, metrics):
    part = section(page(metrics), "Provenance")
    recipe, plan, environment = (element.text for element in part.all("pre"))
    assert recipe == metrics["provenance"]["recipe"]
    assert json.loads(plan) == metrics["provenance"]["plans"][0]
    assert json.loads(environment) == metrics["provenance"]["environment"]
    assert "005859b571d823de" in part.words
    unpruned = metrics["provenance"] | {"plans": [], "fingerprint": ""}
    part = section(page(metrics | {"provenance": unpruned}), "Provenance")
    assert [element.words for element in part.all("summary")] == ["Recipe", "Environment"]
    assert "Fingerprint" not in part.words


# ------------------------------------------------------------------------------------------- edge cases


def test_each_of_a_thousand_layers_is_drawn(page, metrics):
    (removed,) = metrics["removals"]
    for i in range(1000):
        removed["groups"].append(removed["groups"][1] | {"name": f"g{i}"})
        removed["layers"].append(removed["layers"][0] | {"name": f"layer{i}", "group": f"g{i}"})
    tree = page(metrics)
    assert_well_formed(tree)
    assert len(section(tree, "Removed units").all("g", class_="bar")) == 1002
    assert len(table(tree, "layer", "group")) == 1002


def test_a_single_model_and_a_single_epoch_are_rendered(page, metrics):
    metrics["models"] = metrics["models"][-1:]
    metrics["models"][0]["latency"]["speedup"]["of"] = "exported"
    for key in ("epochs", "loss", "accuracy", "learning_rate"):
        metrics["curves"][0][key] = metrics["curves"][0][key][:1]
    tree = page(metrics)
    assert_well_formed(tree)
    assert tree.all("h1")[0].words.startswith("digits: same size, 5.42× ")
    assert len(tree.all("circle", class_="dot")) == 2
    assert table(tree, "model", "parameters")[0][6] == "reference"


def test_missing_values_are_empty_cells(page, metrics):
    metrics["curves"][0] |= {"loss": [None, 0.5, float("nan")], "accuracy": [None] * 3, "learning_rate": [None] * 3}
    tree = page(metrics)
    assert_well_formed(tree)
    assert [row[:2] + row[-2:] for row in table(tree, "epoch")] == [
        ["1", "", "", ""],
        ["2", "0.500", "", ""],
        ["3", "nan", "", ""],
    ]


def test_a_plan_without_groups_and_layers_is_rendered(page, metrics):
    metrics["removals"][0] |= {"groups": [], "layers": [], "blockers": []}
    part = section(page(metrics), "Removed units")
    assert part.all("svg") == []
    assert "No blockers: only inputs and outputs of the model are frozen." in part.words
