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


MAGIC = (
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes it (.h5)", KERAS_WHY, IN_CALLABLE),
    (4, b"TFL3", "a TensorFlow Lite model", NO_CODE_WHY, IN_CALLABLE),
    (0, b"GGUF", "a GGUF file of llama.cpp", NO_CODE_WHY, IN_CALLABLE),
    (
        0,
        b"version https://git-lfs",
        "a pointer of Git LFS",
        "The file that it stands for was not fetched.",
        "Run: git lfs pull",
    ),
    *(
        (0, start, "a web page", "The download gave a page in place of the file.", "Download the file itself.")
        for start in (b"<!doctype html", b"<html")
    ),
)
"""Where in a file which bytes stand, what it is then, why Kirsch does not take it, and what to do."""

OTHER_WHY = "Weights are read from safetensors files alone."
ARCHIVES = (
    ("model.weights.h5", "a Keras model (.keras)", KERAS_WHY),
    ("metadata.json", "a Keras model (.keras)", KERAS_WHY),
    ("models/", "an exported program (torch.export.save)", NO_CODE_WHY),
    ("archive_format", "an exported program (torch.export.save)", NO_CODE_WHY),
)
"""How the name of a member of a zip archive begins, and what the archive is then."""

PICKLES = tuple(bytes([0x80, protocol]) for protocol in (2, 3, 4, 5))
LONGEST_HEADER = 100_000_000
"""Bytes that safetensors allows for its header."""


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
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header + 8 <= size:  # first, since the length may begin with the bytes of any other format
        return _safetensors(whole=True, size=size)
    text = head.lstrip().lower()
    for at, magic, what, why, fix in MAGIC:
        if (head[at:] if at else text if magic.startswith(b"<") else head).startswith(magic):
            return _other(what, why, fix)
    if head.startswith(b"PK\x03\x04"):
        return _archive(path)
    if head[:2] in PICKLES:
        return _checkpoint(path, "a pickle, as torch.save wrote it before PyTorch 1.6")
    return _safetensors(whole=False, size=size) if head[8:9] == b"{" and header < LONGEST_HEADER else None


def _safetensors(*, whole: bool, size: int) -> Format:
    if not whole:
        why = f"It ends after {size} bytes, within its header: it was cut off."
        return _other("a damaged safetensors file", why, "Copy it again.")
    as_model = "Give it as --weights, and the code that builds the model as MODEL."
    return Format("a safetensors file", "", as_model, "Give the model that it was saved from.")


def _by_name(path: Path) -> Format:
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
        return Format("Python code", OTHER_WHY, f"Name the callable in it: {path}:build.", IN_CALLABLE)
    return _other("a file of an unknown format", OTHER_WHY, IN_CALLABLE)


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
        return Format("a folder of kirsch prune", "It holds weights and a plan, and no code.", fix, fix)
    if (path / "saved_model.pb").is_file():
        return _other("a TensorFlow SavedModel", NO_CODE_WHY, IN_CALLABLE)
    if (path / "config.json").is_file():
        fix = f'Give a callable that loads it: AutoModel.from_pretrained("{path}") in file.py:callable.'
        return Format("a folder of a transformers model", "Its code is in that library.", fix, fix)
    files = sorted(path.glob("*.safetensors"))
    fix = f"Give the file in it: {files[0]}." if files else "Give a safetensors file."
    return Format("a folder", "A model is named by its code, and weights by a file.", AS_CALLABLE, fix)


def _checkpoint(path: Path, what: str, load: str = "torch.load") -> Format:
    why = "It is a pickle or code, which runs what is in it when it is loaded; weights are read from safetensors alone."
    convert = CONVERT.format(path=path)
    if load != "torch.load":
        script = f'{load}("{path}").state_dict()'
        convert = convert.replace(f'torch.load("{path}", weights_only=True)', script)
    return Format(what, why, f"{AS_CALLABLE} For its weights: {convert}", convert)


def _other(what: str, why: str, fix: str) -> Format:
    return Format(what, why, AS_CALLABLE if fix == IN_CALLABLE else fix, fix)
