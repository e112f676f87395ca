"""What a file of weights or of a model is, by its content, and how it comes to where Kirsch can use it."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

HEAD = 512
"""Bytes at the start of a file that are looked at."""

KERAS_WHY = "Kirsch works on PyTorch models; Keras models are not supported yet."
NO_CODE_WHY = "Kirsch prunes and trains the code of a PyTorch model, which such a file does not hold."

AS_CALLABLE = "Give the code that builds the model: package.module:callable, file.py:callable or timm:NAME."
CONVERT = (
    'Load it into the model and save that again: model.load_state_dict(torch.load("{path}", weights_only=True)), then '
    'safetensors.torch.save_model(model, "weights.safetensors"), and give --weights weights.safetensors.'
)
IN_CALLABLE = "Build the model in PyTorch, and load the numbers in the callable that MODEL names."


@dataclass(frozen=True)
class Format:
    """What a file is.

    Args:
        what: in words, such as "a PyTorch checkpoint (pickle)".
        why: the reason that Kirsch does not take it; empty for safetensors.
        as_model, as_weights: what to do where it is given as a model, or as weights.
    """

    what: str
    why: str
    as_model: str
    as_weights: str


def describe(path: Path) -> Format | None:
    """The format of a file or folder; None where there is none, or it cannot be read.

    The content decides; the end of the name only where the content says nothing.
    """
    try:
        if path.is_dir():
            return _folder(path)
        with path.open("rb") as file:
            head = file.read(HEAD)
            size = path.stat().st_size
    except (OSError, ValueError):
        return None
    return _by_content(path, head, size) or _by_name(path)


def _by_content(path: Path, head: bytes, size: int) -> Format | None:
    if not size:
        return _other("an empty file", "There is nothing in it.", "Write or download it again.")
    if head.startswith(b"PK\x03\x04"):
        return _archive(path)
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return _other("an HDF5 file, as Keras writes it (.h5)", KERAS_WHY, IN_CALLABLE)
    if head[4:8] == b"TFL3":
        return _other("a TensorFlow Lite model", NO_CODE_WHY, IN_CALLABLE)
    if head.startswith(b"GGUF"):
        return _other("a GGUF file of llama.cpp", NO_CODE_WHY, IN_CALLABLE)
    if head.startswith(b"version https://git-lfs"):
        return _other("a pointer of Git LFS", "The file that it stands for was not fetched.", "Run: git lfs pull")
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        return _other("a web page", "The download gave a page in place of the file.", "Download the file itself.")
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return _checkpoint(path, "a pickle, as torch.save wrote it before PyTorch 1.6")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:
        whole = int.from_bytes(head[:8], "little") + 8 <= size
        why = "" if whole else f"It ends after {size} bytes, within its header: it was cut off."
        fix = "Give it as --weights, and the code that builds the model as MODEL." if whole else "Copy it again."
        return Format("a safetensors file", why, fix, "Give the model that it was saved from." if whole else fix)
    return None


def _by_name(path: Path) -> Format | None:
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        return Format(
            "an ONNX file",
            NO_CODE_WHY,
            f"kirsch measure {path} times it; for anything else: {AS_CALLABLE}",
            IN_CALLABLE,
        )
    if suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors"):
        why = "Neither a zip archive nor a pickle nor a safetensors header begins it: it is damaged, or something else."
        return _other(f"a file named {suffix} of an unknown format", why, "Save or download it again.")
    if suffix in (".h5", ".hdf5", ".keras", ".tflite", ".pb"):
        why = f"{KERAS_WHY} It does not begin as such a file does, either: it is damaged."
        return _other(f"a file named {suffix}", why, IN_CALLABLE)
    if suffix == ".py":
        return None
    return _other("a file of an unknown format", "Weights are read from safetensors files alone.", IN_CALLABLE)


def _archive(path: Path) -> Format:
    """What is in a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile):
        return _other(
            "a damaged zip archive, as torch.save and Keras write it",
            "It was cut off, or not copied whole.",
            "Save or download it again.",
        )
    if "model.weights.h5" in names or "config.json" in names and "metadata.json" in names:
        return _other("a Keras model (.keras)", KERAS_WHY, IN_CALLABLE)
    ends = {name.partition("/")[2] for name in names} | set(names)
    if any(name.startswith("code/") for name in ends):
        return _checkpoint(path, "a TorchScript model (torch.jit.save)", "torch.jit.load")
    if any(name.startswith("models/") for name in ends) or "archive_format" in ends:
        return _other("an exported program (torch.export.save)", NO_CODE_WHY, IN_CALLABLE)
    if "data.pkl" in ends:
        return _checkpoint(path, "a PyTorch checkpoint (torch.save)")
    if any(name.endswith(".npy") for name in names):
        return _other("a numpy archive (.npz)", "Weights are read from safetensors files alone.", IN_CALLABLE)
    return _other("a zip archive", "Weights are read from safetensors files alone.", "Unpack it.")


def _folder(path: Path) -> Format:
    if (path / "plan.json").is_file():
        fix = "Give the original as MODEL and the folder as --pruned."
        return Format("a folder of kirsch prune", "It holds weights and a plan, and no code.", fix, fix)
    if (path / "saved_model.pb").is_file():
        return _other("a TensorFlow SavedModel", NO_CODE_WHY, IN_CALLABLE)
    if (path / "config.json").is_file():
        fix = f'Give a callable that loads it: AutoModel.from_pretrained("{path}") in file.py:callable.'
        return Format("a folder of a transformers model", "Its code is in that library.", fix, fix)
    return _other("a folder", "A model is named by its code, and weights by a file.", AS_CALLABLE)


def _checkpoint(path: Path, what: str, load: str = "torch.load") -> Format:
    why = "It is a pickle or code, which runs what is in it when it is loaded; weights are read from safetensors alone."
    convert = CONVERT.format(path=path)
    if load != "torch.load":
        script = f'{load}("{path}").state_dict()'
        convert = convert.replace(f'torch.load("{path}", weights_only=True)', script)
    return Format(what, why, f"{AS_CALLABLE} For its weights: {convert}", convert)


def _other(what: str, why: str, fix: str) -> Format:
    return Format(what, why, AS_CALLABLE if fix == IN_CALLABLE else fix, fix)
