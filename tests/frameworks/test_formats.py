"""If a file of another format is given as model or weights, the error names the format."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from kirsch.errors import LoadError, ModelError
from kirsch.frameworks.find import framework_of
from kirsch.frameworks.formats import describe
from kirsch.recipes.models import build


def zipped(path: Path, *names: str) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"")


def scripted(path: Path) -> None:
    zipped(path, "net/data.pkl", "net/code/__torch__.py", "net/constants.pkl")


FILES = {
    "net.pt": (lambda path: torch.save({"weight": torch.ones(2)}, path), "a PyTorch checkpoint (torch.save)"),
    "old.pth": (
        lambda path: torch.save({"weight": torch.ones(2)}, path, _use_new_zipfile_serialization=False),
        "a pickle, as torch.save wrote it before PyTorch 1.6",
    ),
    "script.pt": (scripted, "a TorchScript model (torch.jit.save)"),
    "program.pt2": (lambda path: zipped(path, "p/models/model.json", "p/archive_format"), "an exported program"),
    "net.h5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(20)), "an HDF5 file, as Keras writes it"),
    "net.keras": (lambda path: zipped(path, "metadata.json", "config.json", "model.weights.h5"), "a Keras model"),
    "net.tflite": (lambda path: path.write_bytes(b"\x1c\0\0\0TFL3" + bytes(20)), "a TensorFlow Lite model"),
    "net.onnx": (lambda path: path.write_bytes(b"\x08\x09\x12\x07pytorch"), "an ONNX file"),
    "net.gguf": (lambda path: path.write_bytes(b"GGUF\x03\0\0\0"), "a GGUF file of llama.cpp"),
    "lfs.safetensors": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "a pointer of Git LFS",
    ),
    "page.bin": (lambda path: path.write_text("\n<!DOCTYPE html><title>Log in</title>"), "a web page"),
    "empty.pt": (lambda path: path.write_bytes(b""), "an empty file"),
    "cut.pt": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(40)), "a damaged zip archive"),
    "cut.safetensors": (
        lambda path: path.write_bytes((1000).to_bytes(8, "little") + b'{"weight"'),
        "a damaged safetensors file",
    ),
    "junk.pth": (lambda path: path.write_bytes(b"junk"), "a file of an unknown format with the extension .pth"),
    "junk.h5": (lambda path: path.write_bytes(b"junk"), "a file with the extension .h5"),
    "arrays.npz": (lambda path: zipped(path, "weight.npy"), "a zip archive"),
    "notes.txt": (lambda path: path.write_text("hello"), "a file of an unknown format"),
    "saved": (lambda path: (path.mkdir(), (path / "saved_model.pb").touch()), "a TensorFlow SavedModel"),
    "bert": (lambda path: (path.mkdir(), (path / "config.json").touch()), "a folder of a transformers model"),
    "small": (lambda path: (path.mkdir(), (path / "plan.json").touch()), "a folder written by kirsch prune"),
    "other": (lambda path: path.mkdir(), "a folder"),
}


@pytest.mark.parametrize("name", FILES)
def test_format_is_named_in_errors_about_weights_and_models(tmp_path, name):
    write, what = FILES[name]
    write(tmp_path / name)
    with pytest.raises(LoadError) as caught:
        framework_of(nn.Linear(2, 2)).inference.load_weights(nn.Linear(2, 2), tmp_path / name)
    assert f"it is {what}" in caught.value.what
    assert caught.value.why
    assert caught.value.fix
    for reference in (name, f"{name}:net") if (tmp_path / name).is_file() else (name,):
        with pytest.raises(ModelError) as caught:
            build(reference, base=tmp_path)
        assert caught.value.what.startswith(f"{name!r} is not a model: it is {what}")
        assert caught.value.why
        assert caught.value.fix


def test_the_error_for_a_folder_instead_of_a_weights_file_names_the_file_in_the_folder(tmp_path):
    model = nn.Linear(2, 2)
    with pytest.raises(LoadError, match=r"it is a folder\..* Give a safetensors file"):
        framework_of(model).inference.load_weights(model, tmp_path)
    safetensors.torch.save_model(model, str(tmp_path / "w.safetensors"))
    with pytest.raises(LoadError, match=r"it is a folder\..* Give the file in it: .*w\.safetensors"):
        framework_of(model).inference.load_weights(model, tmp_path)


def test_safetensors_file_is_accepted_as_weights_and_refused_as_model(tmp_path):
    safetensors.torch.save_model(nn.Linear(2, 2), str(tmp_path / "w.safetensors"))
    framework_of(nn.Linear(2, 2)).inference.load_weights(nn.Linear(2, 2), tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="Give it as --weights"):
        build("w.safetensors", base=tmp_path)


def test_suggested_conversion_of_a_checkpoint_works(tmp_path, monkeypatch):
    """The two code lines of the error message are executed."""
    monkeypatch.chdir(tmp_path)
    trained = nn.Linear(2, 2)
    torch.save(trained.state_dict(), "net.pt")
    advice = describe(Path("net.pt")).as_weights
    load = advice[advice.index("model.load_state_dict") : advice.index(", then ")]
    save = advice[advice.index("safetensors.torch.save_model") : advice.index(", and give")]
    model = nn.Linear(2, 2)
    exec(f"{load}\n{save}", {"torch": torch, "safetensors": safetensors, "model": model})
    found = nn.Linear(2, 2)
    framework_of(found).inference.load_weights(found, Path("weights.safetensors"))
    assert torch.equal(found.weight, trained.weight)


def test_python_file_is_refused_as_weights(tmp_path):
    (tmp_path / "nets.py").write_text("x = 1")
    with pytest.raises(LoadError, match="it is Python code"):
        framework_of(nn.Linear(2, 2)).inference.load_weights(nn.Linear(2, 2), tmp_path / "nets.py")


def test_missing_file_has_no_format(tmp_path):
    for name in ("absent.onnx", "a" * 300, "a\0b"):
        assert describe(tmp_path / name) is None


def test_package_in_the_working_folder_is_imported_and_not_refused_as_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "package_of_this_test").mkdir()
    (tmp_path / "package_of_this_test" / "__init__.py").write_text(
        "from torch import nn\ndef net(): return nn.Linear(2, 2)\n"
    )
    assert build("package_of_this_test:net").in_features == 2


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580, 0x4B50, 0x5547])
def test_header_length_is_not_mistaken_for_magic_bytes(tmp_path, length):
    """For some lengths, a safetensors file starts with the bytes of a pickle, an archive or GGUF."""
    path = tmp_path / "weights.safetensors"
    header = b"{}".ljust(length)
    path.write_bytes(length.to_bytes(8, "little") + header)
    assert describe(path).why == ""
