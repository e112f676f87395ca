"""Models are built from references, such as `nets.py:net`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from kirsch.errors import LoadError, ModelError, UsageError
from kirsch.recipes.models import build, example_shape
from kirsch.references import resolve, source_hash

LINEAR = "from torch import nn\n\n\ndef net():\n    return nn.Linear(2, {size})\n"


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file into the folder that references are relative to."""

    def put(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return put


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------ forms


def test_file_is_relative_to_the_base_folder(tmp_path, write):
    write("inner/nets.py", LINEAR.format(size=3))
    assert build("inner/nets.py:net", base=tmp_path).out_features == 3
    assert build(f"{tmp_path / 'inner' / 'nets.py'}:net", base=tmp_path / "elsewhere").out_features == 3


def test_file_is_relative_to_the_working_folder_by_default(tmp_path, write, monkeypatch):
    write("nets.py", LINEAR.format(size=3))
    monkeypatch.chdir(tmp_path)
    assert build("nets.py:net").out_features == 3


def test_built_in_model_and_module_are_found():
    for name in ("student", "teacher"):
        assert_equal(build(f"digits:{name}"), build(f"kirsch.frameworks.pytorch.models.digits:{name}"))
    with pytest.raises(LoadError, match=r"module 'digits' cannot be imported"):
        build("digits:nobody")


def test_timm_model_is_built():
    if find_spec("timm") is None:
        pytest.skip("timm is not installed")
    assert_equal(build("timm:test_byobnet", seed=1), build("timm:test_byobnet", seed=1))


def test_class_is_accepted_as_callable(tmp_path, write):
    write(
        "nets.py", "from torch import nn\n\n\nclass Net(nn.Linear):\n    def __init__(self): super().__init__(2, 5)\n"
    )
    assert build("nets.py:Net", base=tmp_path).out_features == 5


# ------------------------------------------------------------------------------------------------ seeds


def test_weights_depend_on_the_seed_and_the_callers_random_state_is_kept(tmp_path, write):
    write("nets.py", LINEAR.format(size=3))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, again, other = (build("nets.py:net", base=tmp_path, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert_equal(first, again)
    assert not torch.equal(first.weight, other.weight)


# ------------------------------------------------------------------------------------------------ files


def test_files_of_the_same_name_are_different_modules(tmp_path, write):
    write("a/nets.py", LINEAR.format(size=3))
    write("b/nets.py", LINEAR.format(size=4))
    assert [build(f"{name}/nets.py:net", base=tmp_path).out_features for name in "aba"] == [3, 4, 3]


def test_files_of_the_same_content_are_different_modules(tmp_path, write):
    """Each of the files must be executed, because it may load weights from its own folder."""
    text = (
        "from pathlib import Path\n\nfrom torch import nn\n\n\n"
        "def net():\n    return nn.Linear(2, int(Path(__file__).with_name('size').read_text()))\n"
    )
    for name, size in (("a", "3"), ("b", "4")):
        write(f"{name}/nets.py", text)
        write(f"{name}/size", size)
    assert [build(f"{name}/nets.py:net", base=tmp_path).out_features for name in "ab"] == [3, 4]


def test_file_is_executed_once(tmp_path, write):
    write("nets.py", LINEAR.format(size=3) + "\n\nprobe = []\n")
    assert resolve("nets.py:net", base=tmp_path) is resolve("nets.py:net", base=tmp_path)


def test_file_can_import_modules_beside_it_and_sys_path_is_restored(tmp_path, write, monkeypatch):
    write("of_this_test_alone.py", LINEAR.format(size=6))
    write("nets.py", "from of_this_test_alone import net\n")
    before = list(sys.path)
    assert build("nets.py:net", base=tmp_path).out_features == 6
    assert sys.path == before
    monkeypatch.delitem(sys.modules, "of_this_test_alone")


def test_changed_file_is_loaded_again_and_has_another_hash(tmp_path, write):
    """Otherwise a finished step of the old model would be kept."""
    write("nets.py", LINEAR.format(size=3))
    first = source_hash("nets.py:net", base=tmp_path)
    assert build("nets.py:net", base=tmp_path).out_features == 3
    assert source_hash("nets.py:net", base=tmp_path) == first
    write("nets.py", LINEAR.format(size=4))
    assert build("nets.py:net", base=tmp_path).out_features == 4
    assert source_hash("nets.py:net", base=tmp_path) != first


def test_hash_of_a_reference_without_a_file_is_the_reference(tmp_path):
    assert source_hash("timm:resnet18", base=tmp_path) == "timm:resnet18"


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("reference", ["resnet18", "", ":net", "nets.py:", "nets.py"])
def test_invalid_reference_is_refused_with_the_valid_forms(reference):
    sentence = rf"'{reference}' is not a reference to a model\. A reference is package\.module:callable, file\.py:"
    with pytest.raises(UsageError, match=sentence):
        build(reference)


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        ("none.py:net", r"The file none\.py does not exist in the folder /.*\. Check the path\."),
        ("wrong.py:net", r"The file .*wrong\.py fails\. SyntaxError: .*line 1\)\. Fix the file\."),
        (
            "fails.py:net",
            r"The file .*fails\.py fails\. ZeroDivisionError: division by zero \(fails\.py:1\)\. Fix the file\.",
        ),
        ("script.py:net", r"The file .*script\.py fails\. SystemExit: 3 \(script\.py:3\)\. Fix the file\."),
        ("nets.py:nte", r"There is no callable of nets\.py named 'nte'\. Known: bad, net, nothing, number\..*'net'\?"),
        ("nets.py:SIZE", r"There is no callable of nets\.py named 'SIZE'\."),
        ("no_such_module:net", r"The module 'no_such_module' cannot be imported\. No module named 'no_such_module'\."),
        (".relative:net", r"The module '\.relative' fails\. TypeError: "),
        (
            "module_that_fails:net",
            r"The module 'module_that_fails' fails\. ZeroDivisionError: division by zero \(module_that_fails\.py:1\)\.",
        ),
        ("timm:resnet18x", r"There is no timm model 'resnet18x'\. Known: .* more\. Did you mean 'resnet18'\?"),
    ],
)
def test_failing_reference_is_named_with_the_cause(tmp_path, write, monkeypatch, reference, sentence):
    if reference.startswith("timm") and find_spec("timm") is None:
        pytest.skip("timm is not installed")
    write("nets.py", "from torch.nn import Linear as net\nbad = nothing = number = net\nSIZE = 3\n")
    write("wrong.py", "def net(\n")
    write("fails.py", "1 / 0\n")
    write("module_that_fails.py", "1 / 0\n")
    write("script.py", "import sys\n\nsys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LoadError, match=sentence):
        build(reference, base=tmp_path)


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (
            "raise ValueError('no such thing')",
            r"nets\.py:net failed\. ValueError: no such thing \(nets\.py:2, in net\)\. Fix the callable\.",
        ),
        ("raise SystemExit(0)", r"nets\.py:net failed\. SystemExit: 0 \(nets\.py:2, in net\)\."),
        ("return None", r"nets\.py:net returns None; expected a model\. Add the missing `return`\. The callable must"),
        ("return net", r"nets\.py:net returns the function net; expected a model\. The callable must return a"),
    ],
)
def test_callable_that_does_not_return_a_model_is_refused(tmp_path, write, body, sentence):
    write("nets.py", f"def net():\n    {body}\n")
    with pytest.raises(ModelError, match=sentence):
        build("nets.py:net", base=tmp_path)


@pytest.mark.parametrize(
    ("reference", "sentence"),
    [
        (
            "nets.py:net",
            r"^nets\.py:net is a model; expected .* `def build\(\): return net` .* give nets\.py:build\.",
        ),
        ("nets.py:Net", r"^nets\.py:Net cannot be .*'classes'\. Add `def build\(\): return Net\(\.\.\.\)`"),
        ("nets.py:make", r"^nets\.py:make cannot be .*'classes'\."),
    ],
)
def test_model_or_callable_with_arguments_in_place_of_a_builder_is_refused(tmp_path, write, reference, sentence):
    write(
        "nets.py",
        "from torch import nn\n\nnet = nn.Linear(2, 3)\n\n\nclass Net(nn.Linear):\n    def __init__(self, classes):\n"
        "        super().__init__(2, classes)\n\n\ndef make(classes):\n    return Net(classes)\n",
    )
    with pytest.raises(ModelError, match=sentence):
        build(reference, base=tmp_path)


def test_kirsch_errors_of_the_callable_are_not_wrapped(tmp_path, write):
    write(
        "nets.py",
        "from kirsch.errors import LoadError\n\n\ndef net():\n    raise LoadError('The weights are gone.')\n",
    )
    with pytest.raises(LoadError, match=r"^The weights are gone\.$"):
        build("nets.py:net", base=tmp_path)


# ------------------------------------------------------------------------------------------------ shapes


def test_example_shape_is_read_from_the_model_then_the_callable_then_timm(tmp_path, write):
    write("nets.py", LINEAR.format(size=3) + "\n\nnet.example_shape = [1, 2]\n")
    model = build("nets.py:net", base=tmp_path)
    assert example_shape("nets.py:net", model, base=tmp_path) == (1, 2)
    model.example_shape = (4, 2)
    assert example_shape("nets.py:net", model, base=tmp_path) == (4, 2)
    foreign = nn.Linear(2, 2)
    foreign.default_cfg = {"input_size": (3, 8, 8)}
    assert example_shape("timm:foreign", foreign) == (1, 3, 8, 8)
    foreign.default_cfg = {}
    assert example_shape("timm:foreign", foreign) is None
