"""Files that are either whole or absent: written to a temporary name, synced, renamed, and hashed in a manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock

from kirsch import strict_json
from kirsch.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a kill at any moment, sees the old content or the new, never a part."""
    write_chunks(path, (content,))


def write_chunks(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file whole, as `write_bytes` does, from pieces that need not be in memory together."""
    temporary = None
    try:
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written.", f"{error.strerror or error}.", "Free space or choose another folder."
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_text(path: Path, content: str) -> None:
    """Write a UTF-8 text file whole; see `write_bytes`."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole, two spaces a level; NaN and infinity are refused."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when the block ends well, with a manifest of what is in it.

    An older folder of that name is replaced. Yields the temporary folder to write into.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
        yield temporary
        write_manifest(temporary)
        _sync_folder(temporary)
        temporary.chmod(0o777 & ~_umask())
        _take_place(temporary, path)
    except OSError as error:
        raise OutputError(
            f"The folder {path} cannot be written.",
            f"{error.strerror or error}.",
            "Free space or choose another folder.",
        ) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    _sync_folder(path.parent)


def _take_place(new: Path, path: Path) -> None:
    """Give a folder its name. Removing an older one under that name would leave half of it there after a kill."""
    older = new.with_name(f"{new.name}-old") if path.is_dir() and not path.is_symlink() else None
    if older is not None:
        path.replace(older)
    try:
        new.replace(path)
    except OSError:
        if older is not None:
            older.replace(path)
        raise
    if older is not None:
        shutil.rmtree(older, ignore_errors=True)


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A folder inside `parent` that is gone when the block ends, and swept after a kill."""
    with tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=parent) as name:
        yield Path(name)


def write_manifest(folder: Path) -> None:
    """Record name, bytes and sha256 of each file of a folder; every file is synced and gets the user's file mode."""
    entries = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST):
        file.chmod(0o666 & ~_umask())  # safetensors writes 0600 whatever the umask
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        entries[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    write_json(folder / MANIFEST, {"kirsch_manifest": 1, "files": entries})


def damage(folder: Path) -> str:
    """What is wrong with a folder that has a manifest, in words that name the file; empty when it is sound."""
    try:
        files = strict_json.read(folder / MANIFEST)["files"]
        entries = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{folder / MANIFEST} is missing or damaged"
    flaws = (_flaw(folder, name, size, digest) for name, (size, digest) in entries.items())
    return next((flaw for flaw in flaws if flaw), "")


def _flaw(folder: Path, name: str, size: int, digest: str) -> str:
    file = folder / name
    try:
        if not file.resolve().is_relative_to(folder.resolve()):
            return f"{folder / MANIFEST} names {name!r}, outside its folder"
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size or sha256(file) != digest:
            return f"{file} does not have the sha256 of its manifest"
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        return f"{str(file)!r} cannot be read: {error}"
    return ""


def sha256(path: Path) -> str:
    """The sha256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(folder: Path, needed_bytes: int = 0) -> None:
    """Make sure, before any work, that a folder can be made and written and has room.

    Args:
        folder: made if it does not exist.
        needed_bytes: what the work will write, by estimate.

    Raises:
        OutputError: the folder is a file, cannot be written, or has too little room; no file is left behind.
    """
    mend = "Choose another folder."
    if folder.exists() and not folder.is_dir():
        message = f"{folder} is a file."
        raise OutputError(message, "A folder is needed for the output.", mend)
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        message = f"The folder {folder} has {free / 1e6:.0f} MB free; the work needs about {needed_bytes / 1e6:.0f} MB."
        raise OutputError(message, mend="Free space or choose another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=TEMPORARY, dir=folder) as probe:
            probe.write(b"kirsch")
            probe.flush()
    except OSError as error:
        message = f"The folder {folder} cannot be written."
        raise OutputError(message, f"{error.strerror or error}.", mend) from error


def sweep(folder: Path) -> None:
    """Remove what a killed process left half written in a folder."""
    for path in list(folder.rglob(f"{TEMPORARY}*")) if folder.is_dir() else ():  # a list: what it walks is removed
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    # Without this, a power cut may forget the rename itself. Not every platform lets a folder be opened.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def alone(lock: Path, busy: OutputError) -> Iterator[None]:
    """What a lock stands for, for this process alone; the lock of a process that died is free.

    Args:
        lock: a file, made if it is not there.
        busy: raised where another process holds it.
    """
    try:
        with filelock.FileLock(lock, timeout=0):
            yield
    except filelock.Timeout as error:
        raise busy from error
