"""The page: complete, offline, readable, and deaf to what a name holds."""

from __future__ import annotations

import json
import re

import pytest

from kirsch.report import render
from kirsch.report.html import FOLDER, heat, mistakes, without_folders

STYLE = (FOLDER / "style.css").read_text(encoding="utf-8")

SECTIONS = [
    "Trade-off",
    "Steps",
    "What was removed",
    "Quality in detail",
    "Training",
    "How it was measured",
    "Provenance",
]
"""What follows the verdict, in order."""


def sections(tree):
    return [heading.words for heading in tree.all("h2")]


def section(tree, heading):
    """Everything between a heading and the next of its level."""
    (body,) = tree.all("body")
    headings = [(place, part) for place, part in enumerate(body.inside) if getattr(part, "tag", "") == "h2"]
    start = next(place for place, part in headings if part.words == heading)
    end = next((place for place, _ in headings if place > start), len(body.inside))
    return type(body)("section", {}, body.inside[start:end])


def table(tree, *head):
    """The rows below a head that starts with these words."""
    for found in tree.all("table"):
        first, *rows = found.rows()
        if tuple(first[: len(head)]) == head:
            return rows
    raise AssertionError(f"no table starts with {head}: {[t.rows()[0] for t in tree.all('table')]}")


# ------------------------------------------------------------------------------------------- form


def assert_offline_and_still(tree):
    """Nothing is fetched, nothing is run: neither by a tag, nor by an attribute, nor by the style."""
    active = {"script", "iframe", "object", "embed", "link", "base", "form", "img", "image", "use", "a", "audio"}
    assert not active & {element.tag for element in tree.all()}
    for element in tree.all():
        for name in element.attributes:
            assert not name.startswith("on"), (element.tag, name)
            assert name not in {"src", "href", "xlink:href", "action", "data", "srcset", "poster", "style"}, name
    (style,) = tree.all("style")
    assert style.text.strip() == STYLE.strip()
    (policy,) = tree.all("meta", http_equiv="Content-Security-Policy")
    assert policy.attributes["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def assert_well_formed(tree):
    for found in tree.all("table"):
        widths = {len(row) for row in found.rows()}
        assert len(widths) == 1, (found.rows()[0], widths)
        assert [part.tag for part in found.all("thead", "tbody")] == ["thead", "tbody"]
    for drawing in tree.all("svg"):
        first, second = drawing.inside[:2]
        assert (first.tag, second.tag) == ("title", "desc")
        assert first.text
        assert second.text
        assert drawing.attributes["role"] == "img"
        assert drawing.attributes["aria-label"] == first.text
        assert not re.search(
            r"\b(nan|inf|none)\b", json.dumps([element.attributes for element in drawing.all()]).lower()
        )
    assert [len(tree.all(tag)) for tag in ("html", "head", "body", "h1")] == [1, 1, 1, 1]


def test_the_style_reaches_for_nothing_outside():
    assert not re.search(r"url\(|@import|expression|://", STYLE)


def test_the_page_is_offline_still_and_well_formed(page, metrics):
    tree = page(metrics)
    assert_offline_and_still(tree)
    assert_well_formed(tree)
    assert render(metrics).startswith("<!doctype html>\n")
    assert tree.all("html")[0].attributes == {"lang": "en"}
    assert {"charset": "utf-8"} in [meta.attributes for meta in tree.all("meta")]


def test_sections_come_in_the_order_of_interest(page, metrics):
    tree = page(metrics)
    (verdict,) = tree.all("section", aria_label="Verdict")
    assert "What to ship" in verdict.words
    assert sections(tree) == SECTIONS


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        ({"removed": None, "verification": None}, ["What was removed"]),
        ({"quality": None}, ["Quality in detail"]),
        ({"curves": []}, ["Training"]),
        ({"export": None}, []),
        ({"removed": None, "verification": None, "quality": None, "curves": [], "export": None}, SECTIONS[2:5]),
    ],
)
def test_a_block_that_is_none_leaves_its_section_out(page, metrics, missing, gone):
    tree = page(metrics | missing)
    assert_offline_and_still(tree)
    assert_well_formed(tree)
    assert sections(tree) == [heading for heading in SECTIONS if heading not in gone]
    assert ("What to ship" in tree.words) is ("export" not in missing)


def test_each_drawing_has_its_numbers_in_a_table_below_it(page, metrics):
    """The trade-off's table is open; the others unfold."""
    tree = page(metrics)
    assert len(tree.all("svg")) == 5
    head = {heading: section(tree, heading) for heading in SECTIONS[:5]}
    assert [row[0] for row in table(head["Trade-off"], "model")] == [m["name"] for m in metrics["models"]]
    folded = [details for heading in SECTIONS[2:5] for details in head[heading].all("details")]
    assert [details.all("summary")[0].words for details in folded] == [
        "Groups in numbers",
        "Layers in numbers",
        "In numbers",
        "In numbers",
    ]
    assert all(len(details.all("table")) == 1 for details in folded)


# ------------------------------------------------------------------------------------------- numbers


def test_the_verdict_is_size_latency_and_quality_before_and_after(page, metrics):
    """3541463 / 479666 = 7.383; a ratio with its interval; both accuracies."""
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
        "✗ missed accuracy drop 1.5 points (7 samples lost, 1 gained)",
    ]


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        ({"met": True, "text": "wanted", "items": [{"text": "t", "met": True, "doubt": ""}]}, "Goal met"),
        ({"met": False, "text": "wanted", "items": [{"text": "t", "met": False, "doubt": ""}]}, "Goal missed"),
        ({"met": True, "text": "no goal was set", "items": []}, "No goal to meet"),
    ],
)
def test_the_page_says_whether_the_goal_is_met_and_not_when_there_is_none(page, metrics, goal, said):
    words = page(metrics | {"goal": goal}).all("header")[0].words
    assert [text for text in ("Goal met", "Goal missed", "No goal to meet") if text in words] == [said]
    assert goal["text"] in words


@pytest.mark.parametrize(
    ("size", "said"), [(3_541_463, "same size"), (7_082_926, "2.00× larger"), (1_770_731, "2.00× smaller")]
)
def test_a_file_that_grew_is_not_called_smaller(page, metrics, size, said):
    metrics["models"][-1]["bytes"] = size
    assert page(metrics).all("h1")[0].words.startswith(f"digits: {said}, ")


def test_what_to_ship_is_named_with_its_hash_and_a_program(page, metrics):
    (verdict,) = page(metrics).all("section", aria_label="Verdict")
    assert "artifacts/model.onnx, ONNX opset 20, 480 kB (479,666 bytes)" in verdict.words
    assert metrics["export"]["sha256"] in verdict.words
    assert "399 of 400 test samples get the same label" in verdict.words
    assert "3.8e-06" in verdict.words
    assert [part.text for part in verdict.all("pre")] == [metrics["export"]["usage"]]


def test_the_models_are_told_with_all_their_costs(page, metrics):
    assert table(page(metrics), "model", "parameters") == [
        ["teacher", "885 k", "10.7 M", "3.54 MB", "223 µs", "268 µs", "reference", "98.5 % ± 1.2"],
        ["student", "223 k", "2.69 M", "892 kB", "67.8 µs", "81.4 µs", "3.29× [2.96 – 3.62]", "97.3 % ± 1.6"],
        ["pruned", "119 k", "1.34 M", "485 kB", "not measured", "", "", "54.3 % ± 4.8"],
        ["exported", "119 k", "1.34 M", "480 kB", "41.2 µs", "49.4 µs", "5.42× [4.88 – 5.96]", "97.0 % ± 1.7"],
    ]
    assert "Models that were not timed stand in the table alone." in page(metrics).words


def test_without_a_stopwatch_latency_is_said_not_to_be_measured(page, metrics):
    for model in metrics["models"]:
        model["latency"] = None
    metrics["measured"] |= dict.fromkeys(("runtime", "threads", "batch", "rounds", "aa", "load_before", "load_after"))
    tree = page(metrics)
    assert_well_formed(tree)
    assert tree.all("h1")[0].words == "digits: 7.38× smaller, 98.5 % → 97.0 % accuracy"
    assert [part.words for part in tree.all("dd", class_="big")][1] == "not measured"
    assert "Models that were not timed" not in tree.words
    assert "Noise floor" not in tree.words
    assert "Accuracy against file size" in tree.all("svg")[0].text


def test_the_stages_are_told_with_their_cells_in_order(page, metrics):
    assert table(page(metrics), "#", "stage") == [
        ["1", "teacher", "trained", "98.5 % ± 1.2", "10.7 M MACs", "", "", "18 s"],
        ["2", "prune", "−50.4 % MACs", "a", "b", "c", "2 groups", "0.4 s"],
        ["3", "measure", "onnxruntime", "", "", "", "", "2 min 05 s"],
    ]


def test_what_was_removed_is_told_group_by_group_and_layer_by_layer(page, metrics):
    part = section(page(metrics), "What was removed")
    reason = "smallest weights of the group (L2)"
    assert table(part, "group", "unit") == [
        ["stem", "channel", "32", "0", "0", "0", "kept", "stem, stem_bn", "none"],
        ["block.conv1", "channel", "64", "5", "485", "5.07 k", reason, "block.conv1, block.bn1", "0–2, 7, 63"],
    ]
    assert table(part, "layer", "group") == [
        ["block.conv1", "block.conv1", "64", "59", "1.09 k", "1.00 k"],
        ["stem", "stem", "32", "32", "544", "544"],
    ]
    assert table(part, "of the parameters") == [["27.3 %", "reshape (view)", "head net.py:41"]]
    assert "The pruned model is equal to the masked original (rounding)." in part.words
    assert "0.707 of their size" in part.words


@pytest.mark.parametrize(("count", "said"), [(12, None), (13, "1 more hold"), (40, "28 more hold")])
def test_many_blockers_are_cut_short_and_counted(page, metrics, count, said):
    metrics["removed"]["blockers"] *= count
    part = section(page(metrics), "What was removed")
    assert len(table(part, "of the parameters")) == 12
    assert ("more hold smaller shares" in part.words) is (said is not None)
    assert said is None or said in part.words


def test_the_quality_is_told_class_by_class_the_greatest_loss_first(page, metrics):
    part = section(page(metrics), "Quality in detail")
    assert "teacher → exported: 7 samples lost, 1 gained of 400; not significant (p = 0.07)." in part.words
    assert table(part, "class", "before") == [
        ["eel", "97.7 %", "94.6 %", "−3.1 points", "130"],
        ["cat", "99.3 %", "97.1 %", "−2.1 points", "140"],
    ]
    assert "2 of 3 classes lost accuracy." in part.words
    assert "teacher 2.5 %" in part.words
    assert "exported 1.8 %" in part.words
    assert table(part, "model", "sure") == [
        ["teacher", "55.3 %", "60.0 %", "5"],
        ["teacher", "97.4 %", "98.9 %", "395"],
        ["exported", "94.1 %", "96.8 %", "400"],
    ]


def test_where_no_class_lost_no_class_is_listed(page, metrics):
    metrics["quality"]["lost"] = [{"name": "cat", "before": 0.5, "after": 0.5, "n": 4}]
    part = section(page(metrics), "Quality in detail")
    assert "None of 1 classes lost accuracy." in part.words
    assert [found for found in part.all("table") if found.rows()[0][:2] == ["class", "before"]] == []


def test_confusions_are_tables_of_counts_shaded_by_their_share(page, metrics):
    before, after = section(page(metrics), "Quality in detail").all("table", class_="heat")
    assert before.rows() == [
        ["", "cat", "dog", "eel"],
        ["cat", "139", "", "1"],
        ["dog", "2", "128", ""],
        ["eel", "", "3", "127"],
    ]
    shades = [[cell.attributes["class"] for cell in row.all("td")] for row in after.all("tr")[1:]]
    assert shades == [["right", "h2", "h0"], ["h0", "right", "h1"], ["h0", "h2", "right"]]


@pytest.mark.parametrize(
    ("count", "total", "shade"),
    [(0, 10, 0), (0, 0, 0), (1, 50, 1), (1, 49, 2), (1, 10, 2), (2, 10, 3), (4, 10, 3), (5, 10, 4), (10, 10, 4)],
)
def test_a_wrong_cell_is_the_darker_the_greater_its_share(count, total, shade):
    assert heat(count, total) == shade
    assert f".h{shade} {{" in STYLE or not shade


def test_with_many_classes_the_most_frequent_mistakes_are_listed(page, metrics):
    """A thousand classes would be two million cells."""
    count = 1000
    tables = [[[0] * count for _ in range(count)] for _ in range(2)]
    for place in range(count):
        tables[0][place][place] = tables[1][place][place] = 50
    tables[0][3][7], tables[1][3][7], tables[1][999][0], tables[1][5][6] = 2, 9, 30, 1
    quality = metrics["quality"]
    quality["classes"] = [f"class {place}" for place in range(count)]
    quality["before"]["confusion"], quality["after"]["confusion"] = tables
    tree = page(metrics)
    assert_well_formed(tree)
    assert tree.all("table", class_="heat") == []
    assert table(tree, "class", "taken for") == [
        ["class 999", "class 0", "0", "30"],
        ["class 3", "class 7", "2", "9"],
        ["class 5", "class 6", "0", "1"],
    ]
    tables[1][0] = list(range(count))
    assert [found["after"] for found in mistakes(quality)] == list(range(999, 979, -1))


def test_the_training_is_told_epoch_by_epoch(page, metrics):
    assert table(section(page(metrics), "Training"), "epoch", "loss") == [
        ["1", "0.583", "0.146", "", "92.8 %", "0.0500"],
        ["2", "0.0410", "0.0103", "", "99.4 %", "0.0250"],
        ["3", "0.0112", "0.00280", "", "98.9 %", "0.0167"],
    ]


def test_how_it_was_measured_is_told_with_what_was_not(page, metrics):
    part = section(page(metrics), "How it was measured")
    keys, values = ([found.words for found in part.all(tag)] for tag in ("dt", "dd"))
    facts = dict(zip(keys, values, strict=True))
    assert facts["Runtime"] == "onnxruntime 1.32.0, 2 threads, batch of 1"
    assert facts["Rounds"].startswith("31, ")
    assert facts["Noise floor"].endswith("1.01× [0.974 – 1.03]")
    assert facts["Load of the machine"] == "0.3 before, 0.8 after"
    assert facts["Machine"] == "Cherry 9000"
    assert facts["Data"] == "digits: 1,078 training, 360 validation, 400 test samples; sha256 6e072b976e072b97"
    assert facts["Seed"] == "11"
    assert [found.words for found in part.all("li")] == ["Energy.", "Other seeds."]


def test_one_thread_is_told_in_the_singular(page, metrics):
    metrics["measured"]["threads"] = 1
    assert "onnxruntime 1.32.0, 1 thread, batch" in page(metrics).words


def test_the_provenance_holds_recipe_plan_and_environment_in_full(page, metrics):
    part = section(page(metrics), "Provenance")
    recipe, plan, environment = (found.text for found in part.all("pre"))
    assert recipe == metrics["provenance"]["recipe"]
    assert json.loads(plan) == metrics["provenance"]["plan"]
    assert json.loads(environment) == metrics["provenance"]["environment"]
    assert "005859b571d823de" in part.words
    bare = metrics["provenance"] | {"plan": None, "fingerprint": ""}
    part = section(page(metrics | {"provenance": bare}), "Provenance")
    assert [found.words for found in part.all("summary")] == ["Recipe", "Environment"]
    assert "Fingerprint" not in part.words


# ------------------------------------------------------------------------------------------- extremes


def test_a_thousand_layers_are_drawn_each(page, metrics):
    removed = metrics["removed"]
    for place in range(1000):
        removed["groups"].append(removed["groups"][1] | {"name": f"g{place}"})
        removed["layers"].append(removed["layers"][0] | {"name": f"layer{place}", "group": f"g{place}"})
    tree = page(metrics)
    assert_well_formed(tree)
    assert len(section(tree, "What was removed").all("g", class_="bar")) == 1002
    assert len(table(tree, "layer", "group")) == 1002


def test_a_single_model_and_a_single_epoch_render(page, metrics):
    metrics["models"] = metrics["models"][-1:]
    metrics["models"][0]["latency"]["speedup"]["of"] = "exported"
    for key in ("epochs", "loss", "accuracy", "learning_rate"):
        metrics["curves"][0][key] = metrics["curves"][0][key][:1]
    tree = page(metrics)
    assert_well_formed(tree)
    assert tree.all("h1")[0].words.startswith("digits: same size, 5.42× ")
    assert len(tree.all("circle", class_="dot")) == 2
    assert table(tree, "model", "parameters")[0][6] == "reference"


def test_values_that_are_missing_leave_empty_cells(page, metrics):
    metrics["curves"][0] |= {"loss": [None, 0.5, float("nan")], "accuracy": [None] * 3, "learning_rate": [None] * 3}
    tree = page(metrics)
    assert_well_formed(tree)
    assert [row[:2] + row[-2:] for row in table(tree, "epoch")] == [
        ["1", "", "", ""],
        ["2", "0.500", "", ""],
        ["3", "nan", "", ""],
    ]


def test_nothing_removed_and_no_layers_render(page, metrics):
    metrics["removed"] = {"groups": [], "layers": [], "blockers": []}
    part = section(page(metrics), "What was removed")
    assert part.all("svg") == []
    assert "Nothing but inputs and outputs held any layer." in part.words


# ------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model: /home/alice/work/nets.py:teacher", "model: nets.py:teacher"),
        ("model: nets.py:teacher", "model: nets.py:teacher"),
        ("source: ../data/nets.py:stripes", "source: ../data/nets.py:stripes"),
        ("options: {path: '/Users/alice'}", "options: {path: '~'}"),
        ('weights: "~/secret/w.safetensors"', 'weights: "w.safetensors"'),
        (r"weights: C:\Users\alice\w.safetensors", "weights: w.safetensors"),
        ("folder: /srv/alice/data", "folder: data"),
        ("model: /home/alice/nets.py:teacher", "model: nets.py:teacher"),
        ("model: timm:resnet18", "model: timm:resnet18"),
    ],
)
def test_the_recipe_is_shown_without_the_folders_of_whoever_ran_it(page, metrics, text, shown):
    assert without_folders(text) == shown
    metrics["provenance"]["recipe"] = f"name: digits\n{text}\n"
    assert f"name: digits\n{shown}\n" in [found.text for found in page(metrics).all("pre")]


# ------------------------------------------------------------------------------------------- hostile names

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style><script>alert(1)</script>",
    "</title></pre></svg></table><h1>mine</h1>",
    "<!-- <![CDATA[ ",
    "[red]", "[/0]", "{{ 7*7 }}{% raw %}", "${7*7} &lt; &amp;", "javascript:alert(1)", "two\nlines\tand a tab",
    "\x1b[31mred\x1b[0m", "\N{RIGHT-TO-LEFT OVERRIDE}right to left", "…", "x" * 3000,
]  # fmt: skip


NAMES = {
    "digits", "2026-03-14-digits-7f3a",
    "MACs ≤ 50 %, accuracy drop ≤ 1.0 point", "MACs 49.6 % of it", "7 samples lost, 1 gained",
    "teacher", "student", "pruned", "exported",
    "stem", "stem_bn", "block.conv1", "block.bn1", "channel", "smallest weights of the group (L2)",
    "reshape", "head", "net.py:41", "view",
    "cat", "dog", "eel",
    "artifacts/model.onnx", "ONNX opset 20", "Cherry 9000", "onnxruntime 1.32.0",
    "Energy.", "Other seeds.", "rounding", "equal to the masked original",
    "trained", "−50.4 % MACs", "98.5 % ± 1.2", "2 groups",
}  # fmt: skip
"""Texts of the metrics that come from a model, a recipe, a machine, or whoever wrote them."""


def prefixed(value, name):
    """The same metrics with a name before each text of `NAMES`."""
    if isinstance(value, dict):
        return {key: prefixed(part, name) for key, part in value.items()}
    if isinstance(value, list):
        return [prefixed(part, name) for part in value]
    return name + value if isinstance(value, str) and value in NAMES else value


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_name_is_text_wherever_it_stands(page, metrics, name):
    plain = page(metrics)
    worse = prefixed(metrics, name)
    worse["export"]["usage"] = worse["provenance"]["recipe"] = f"a\n{name}\n"
    worse["provenance"]["environment"] = {name: [name]}
    worse["curves"][0]["parts"] = {name: [1.0, 2.0, 3.0], "kd": [4.0, 5.0, 6.0]}
    tree = page(worse)
    assert_offline_and_still(tree)
    assert_well_formed(tree)
    assert [element.tag for element in tree.all()] == [element.tag for element in plain.all()]
    assert [text for text in NAMES if name + text not in tree.text] == []
    usage, recipe, _, environment = (found.text for found in tree.all("pre"))
    assert usage == recipe == f"a\n{name}\n"
    assert json.loads(environment) == {name: [name]}


# ------------------------------------------------------------------------------------------- contrast


def color(code):
    """(red, green, blue), each 0 to 1, of "fff" or "ffffff"."""
    wide = code if len(code) == 6 else "".join(2 * digit for digit in code)
    return tuple(int(wide[at : at + 2], 16) / 255 for at in (0, 2, 4))


def palettes():
    """Theme → variable → color."""
    found = {}
    for theme, block in zip(("light", "dark"), re.findall(r":root \{([^}]*)\}", STYLE), strict=True):
        pairs = re.findall(r"--([\w-]+): #([0-9a-f]{3}|[0-9a-f]{6});", block)
        wide = {name: code if len(code) == 6 else "".join(2 * digit for digit in code) for name, code in pairs}
        found[theme] = {
            name: tuple(int(code[at : at + 2], 16) / 255 for at in (0, 2, 4)) for name, code in wide.items()
        }
    return found


def contrast(first, second):
    """WCAG 2.2, relative luminance and contrast ratio."""

    def luminance(color):
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_standard():
    black, white, gray = (0, 0, 0), (1, 1, 1), (0x77 / 255,) * 3
    assert contrast(black, white) == pytest.approx(21)
    assert contrast(gray, white) == pytest.approx(4.48, abs=0.005)  # the well-known gray that just fails


TEXT = [
    *(("paper", color) for color in ("ink", "soft", "ours", "met", "missed")),
    *(("wash", color) for color in ("ink", "soft")),
    ("met-wash", "met"),
    ("missed-wash", "missed"),
]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("ground", "color"), TEXT)
def test_text_has_enough_contrast(theme, ground, color):
    palette = palettes()[theme]
    assert contrast(palette[color], palette[ground]) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_counts_on_the_shades_of_a_confusion_have_enough_contrast(theme):
    palette = palettes()[theme]
    shades = re.findall(r"background: color-mix\(in srgb, var\(--(\w+)\) (\d+)%, transparent\)", STYLE)
    assert len(shades) == 5
    for name, percent in shades:
        share = int(percent) / 100
        ground = [share * c + (1 - share) * p for c, p in zip(palette[name], palette["paper"], strict=True)]
        assert contrast(palette["ink"], ground) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_what_is_kept_stands_out_from_what_is_gone(theme):
    """Graphics need 3 : 1 to what they lie on or beside."""
    palette = palettes()[theme]
    assert contrast(palette["ours"], palette["paper"]) >= 3
    assert contrast(palette["ours"], palette["gone"]) >= 3
