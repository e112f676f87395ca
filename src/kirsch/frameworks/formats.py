"""Find the format of a model or weight file by its content, and explain how to convert the file for Kirsch."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

HEAD = 512
"""Number of bytes at the start of a file that are read to find the format."""

KERAS_WHY = "Kirsch works on PyTorch models; Keras models are not supported yet."
NO_CODE_WHY = "Kirsch needs the Python code of a PyTorch model, which such a file does not contain."

AS_CALLABLE = "Give the code that builds the model: package.module:callable, file.py:callable or timm:NAME."
CONVERT = (
    'Load it into the model and save the weights: model.load_state_dict(torch.load("{path}", weights_only=True)), then '
    'safetensors.torch.save_model(model, "weights.safetensors"), and give --weights weights.safetensors.'
)
IN_CALLABLE = "Build the model in PyTorch, and load its weights in the callable given as MODEL."


MAGIC = (
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes it (.h5)", KERAS_WHY, IN_CALLABLE),
    (4, b"TFL3", "a TensorFlow Lite model", NO_CODE_WHY, IN_CALLABLE),
    (0, b"GGUF", "a GGUF file of llama.cpp", NO_CODE_WHY, IN_CALLABLE),
    (
        0,
        b"version https://git-lfs",
        "a pointer of Git LFS",
        "The file itself was not fetched.",
        "Run: git lfs pull",
    ),
    *(
        (0, start, "a web page", "The download returned a page in place of the file.", "Download the file itself.")
        for start in (b"<!doctype html", b"<html")
    ),
)
"""Offset, bytes at the offset, name of the format, reason why Kirsch does not read it, and fix."""

OTHER_WHY = "Weights are read from safetensors files only."
ARCHIVES = (
    ("model.weights.h5", "a Keras model (.keras)", KERAS_WHY),
    ("metadata.json", "a Keras model (.keras)", KERAS_WHY),
    ("models/", "an exported program (torch.export.save)", NO_CODE_WHY),
    ("archive_format", "an exported program (torch.export.save)", NO_CODE_WHY),
)
"""Prefix of a member's name in a zip archive, name of the format, and reason why Kirsch does not read it."""

PICKLES = tuple(bytes([0x80, protocol]) for protocol in (2, 3, 4, 5))
LONGEST_HEADER = 100_000_000
"""Longest header of a safetensors file, in bytes."""


@dataclass(frozen=True)
class Format:
    """Format of a file.

    Args:
        what: description of the format, such as "a PyTorch checkpoint (torch.save)".
        why: reason why Kirsch does not read it; empty for safetensors.
        as_model, as_weights: fix if the file is given as a model, or as weights.
    """

    what: str
    why: str
    as_model: str
    as_weights: str


def describe(path: Path) -> Format | None:
    """Return the format of a file or folder; None if it does not exist or cannot be read.

    The format follows from the content, and from the extension if the content is unknown.
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
        return _other("an empty file", "It has no content.", "Write or download it again.")
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header + 8 <= size:  # before MAGIC: the length in the first bytes may look like magic
        return _safetensors(complete=True, size=size)
    text = head.lstrip().lower()
    for at, magic, what, why, fix in MAGIC:
        if (head[at:] if at else text if magic.startswith(b"<") else head).startswith(magic):
            return _other(what, why, fix)
    if head.startswith(b"PK\x03\x04"):
        return _archive(path)
    if head[:2] in PICKLES:
        return _checkpoint(path, "a pickle, as torch.save wrote it before PyTorch 1.6")
    return _safetensors(complete=False, size=size) if head[8:9] == b"{" and header < LONGEST_HEADER else None


def _safetensors(*, complete: bool, size: int) -> Format:
    if not complete:
        why = f"It ends after {size} bytes, within its header."
        return _other("a damaged safetensors file", why, "Copy it again.")
    as_model = "Give it as --weights, and the code that builds the model as MODEL."
    return Format("a safetensors file", "", as_model, "Give the model that it was saved from.")


def _by_name(path: Path) -> Format:
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        return Format(
            "an ONNX file",
            NO_CODE_WHY,
            f"kirsch measure {path} measures its latency. For other commands: {AS_CALLABLE}",
            IN_CALLABLE,
        )
    if suffix in (".pt", ".pth", ".bin", ".ckpt", ".safetensors"):
        why = (
            "It does not start like a zip archive, a pickle or a safetensors file: it is damaged or has another format."
        )
        return _other(f"a file of an unknown format with the extension {suffix}", why, "Save or download it again.")
    if suffix in (".h5", ".hdf5", ".keras", ".tflite", ".pb"):
        why = f"{KERAS_WHY} The file also does not start like a file with this extension: it is damaged."
        return _other(f"a file with the extension {suffix}", why, IN_CALLABLE)
    if suffix == ".py":
        return Format("Python code", OTHER_WHY, f"Name the callable in it: {path}:build.", IN_CALLABLE)
    return _other("a file of an unknown format", OTHER_WHY, IN_CALLABLE)


def _archive(path: Path) -> Format:
    """Return the format of a zip archive, by the names of its members."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, ValueError, zipfile.BadZipFile):
        return _other(
            "a damaged zip archive, as torch.save and Keras write it",
            "It is truncated.",
            "Save or download it again.",
        )
    parts = {name.partition("/")[2] for name in names} | set(names)
    if "data.pkl" in parts and any(name.startswith("code/") for name in parts):
        return _checkpoint(path, "a TorchScript model (torch.jit.save)", "torch.jit.load")
    if "data.pkl" in parts and not any(name.startswith("models/") for name in parts):
        return _checkpoint(path, "a PyTorch checkpoint (torch.save)")
    what, why = next(
        ((what, why) for sign, what, why in ARCHIVES if any(name.startswith(sign) for name in parts)),
        ("a zip archive", OTHER_WHY),
    )
    return _other(what, why, IN_CALLABLE)


def _folder(path: Path) -> Format:
    if (path / "plan.json").is_file():
        fix = "Give the original as MODEL and the folder as --pruned."
        return Format("a folder written by kirsch prune", "It contains weights and a plan, and no code.", fix, fix)
    if (path / "saved_model.pb").is_file():
        return _other("a TensorFlow SavedModel", NO_CODE_WHY, IN_CALLABLE)
    if (path / "config.json").is_file():
        fix = f'Give a callable that loads it: AutoModel.from_pretrained("{path}") in file.py:callable.'
        return Format(
            "a folder of a transformers model", "The code of the model is in the package transformers.", fix, fix
        )
    files = sorted(path.glob("*.safetensors"))
    fix = f"Give the file in it: {files[0]}." if files else "Give a safetensors file."
    return Format("a folder", "A model is given as code, and weights are given as a file.", AS_CALLABLE, fix)


def _checkpoint(path: Path, what: str, load: str = "torch.load") -> Format:
    why = "Loading it can execute code; weights are read from safetensors files only."
    convert = CONVERT.format(path=path)
    if load != "torch.load":
        script = f'{load}("{path}").state_dict()'
        convert = convert.replace(f'torch.load("{path}", weights_only=True)', script)
    return Format(what, why, f"{AS_CALLABLE} For its weights: {convert}", convert)


def _other(what: str, why: str, fix: str) -> Format:
    return Format(what, why, AS_CALLABLE if fix == IN_CALLABLE else fix, fix)
