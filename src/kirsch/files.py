"""Files that are either whole or absent: written to a temporary name, synced, renamed, and hashed in a manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import stat
import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import filelock

from kirsch import strict_json
from kirsch.errors import OutputError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a kill at any moment, sees the old content or the new, never a part."""
    write_chunks(path, (content,))


def write_chunks(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file whole, as `write_bytes` does, from pieces that need not be in memory together."""
    if path.is_dir():
        raise OutputError(f"{path} cannot be written.", "It is a folder.", "Delete or move it.")
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
    r"""Write a UTF-8 text file whole; see `write_bytes`.

    What UTF-8 cannot hold, such as a byte of a file name that is not text, is written as \udc80: JSON reads that back.
    """
    write_bytes(path, content.encode(errors="backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole, two spaces a level; NaN and infinity are refused."""
    write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """JSON as Kirsch writes it: two spaces a level, a newline at the end.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


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
        _settle(temporary)
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


def _settle(folder: Path) -> None:
    """Sync every file of a folder, and give it the user's file mode."""
    for file in (path for path in folder.rglob("*") if path.is_file()):
        file.chmod(0o666 & ~_umask())  # safetensors writes 0600 whatever the umask
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


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


def write_manifest(folder: Path, beside: Collection[str] = ()) -> None:
    """Record name, bytes and sha256 of every file of a folder, in manifest.json.

    Args:
        folder: holds regular files and folders alone.
        beside: names of files that the manifest leaves out.
    """
    names = _present(folder)[0] - {MANIFEST, *beside}
    write_entries(folder, {name: ((folder / name).stat().st_size, sha256(folder / name)) for name in names})


def write_entries(folder: Path, found: Mapping[str, tuple[int, str]]) -> None:
    """Write a manifest of these files: bytes and sha256 by name."""
    listed = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(found.items())}
    write_json(folder / MANIFEST, {"kirsch_manifest": 1, "files": listed})


def damage(folder: Path) -> str:
    """The first thing that is wrong with a folder that has a manifest, naming the file; empty when it is sound."""
    return next(iter(flaws(folder).values()), "")


def flaws(folder: Path, beside: Collection[str] = ()) -> dict[str, str]:
    """What is wrong with a folder that has a manifest: a sentence for each file, by name; empty when it is sound.

    Sound means: the manifest is as Kirsch writes it, and the folder holds exactly the files that it names, with their
    bytes. Who changes a file and recomputes the manifest is not found out; a manifest guards against faults of disks,
    copies and hands, not against forgery.

    Args:
        folder: with manifest.json.
        beside: names of files that the manifest leaves out.
    """
    try:
        known = entries(folder)
    except OSError as error:
        return {MANIFEST: f"{folder / MANIFEST} cannot be read: {error.strerror or error}"}
    except ValueError as error:
        return {MANIFEST: str(error)}
    if not known:
        return {MANIFEST: f"{folder / MANIFEST} names no files"}
    outside = {name: f"{folder / MANIFEST} names {name!r}, outside its folder" for name in known if _leads_out(name)}
    if outside:
        return outside
    present, found = _present(folder)
    for name, (size, digest) in known.items():
        if name not in found and (flaw := _flaw(folder / name, size, digest, name in present)):
            found[name] = flaw
    for name in sorted(present - known.keys() - {MANIFEST, *beside}):
        found[name] = f"{folder / name} is not in its manifest"
    return found


def entries(folder: Path) -> dict[str, tuple[int, str]]:
    """Bytes and sha256 by name, from the manifest of a folder.

    Raises:
        OSError: the manifest cannot be read.
        ValueError: it is missing or damaged; names the file and says why, without a point at its end.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        raise ValueError(f"{path} is missing")
    if path.is_symlink() or not path.is_file():  # reading a pipe would wait for ever
        raise ValueError(f"{path} is not a file")
    content = path.read_bytes()
    try:
        return _entries(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def unlisted(folder: Path) -> list[str]:
    """The names of files that the manifest of a folder does not name; none where the manifest is damaged."""
    try:
        known = entries(folder)
    except (OSError, ValueError):
        return []
    return sorted(_present(folder)[0] - known.keys() - {MANIFEST})


def odd(folder: Path) -> dict[str, str]:
    """Entries of a folder that are neither files nor folders, such as links and pipes: a sentence each, by name."""
    return _present(folder)[1]


def _entries(text: bytes) -> dict[str, tuple[int, str]]:
    """Bytes and sha256 by name, from the text of a manifest.

    Raises:
        ValueError: it is not what `write_manifest` writes. Every other text of the same content is refused, too: so
            a repeated name cannot hide another.
    """
    content = strict_json.parse(text)
    if not isinstance(content, dict) or content.keys() != {"kirsch_manifest", "files"}:
        raise ValueError("an object with the keys 'kirsch_manifest' and 'files' is expected")
    version, found = content["kirsch_manifest"], content["files"]
    if type(version) is not int or version != 1 or not isinstance(found, dict):
        raise ValueError("it is not a manifest of version 1")
    for name, entry in found.items():
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise ValueError(f"the entry of {name!r} must have 'bytes' and 'sha256' alone")
        if type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
            raise ValueError(f"the entry of {name!r} must have a whole number of bytes and a text as sha256")
    if json_text(content).encode() != text:
        raise ValueError("it is not spaced or ordered as Kirsch writes it")
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in found.items()}


def _leads_out(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or path.as_posix() != name or name == "."


def _flaw(file: Path, size: int, digest: str, there: bool) -> str:
    try:
        if not there:
            return f"{file} is a folder" if file.is_dir() else f"{file} is missing"
        if file.stat().st_size != size or sha256(file) != digest:
            return f"{file} does not have the sha256 of its manifest"
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        return f"{str(file)!r} cannot be read: {error}"
    return ""


def _present(folder: Path) -> tuple[set[str], dict[str, str]]:
    """The names of the regular files below a folder, and a sentence for every entry that is no file and no folder.

    What a killed process left half written is passed over, and links are not followed.
    """
    names, others = set(), {}

    def unreadable(error: OSError) -> None:
        name = Path(error.filename).relative_to(folder).as_posix()
        others[name] = f"{error.filename} cannot be read: {error.strerror}"

    for place, folders, here in os.walk(folder, onerror=unreadable):
        for entry in [*folders, *here]:
            path = Path(place, entry)
            name = path.relative_to(folder).as_posix()
            if entry.startswith(TEMPORARY):
                continue
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # a process that works here has just removed it
                continue
            if not name.isprintable() and not _is_text(name):
                others[name] = f"{str(path)!r} has a name that is not UTF-8"
            elif stat.S_ISREG(mode):
                names.add(name)
            elif not stat.S_ISDIR(mode):
                others[name] = f"{path} is {KINDS.get(stat.S_IFMT(mode), 'a device')}"
        folders[:] = sorted(entry for entry in folders if not entry.startswith(TEMPORARY))
    return names, others


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


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
    fix = "Choose another folder."
    # os.path: a name that is too long is no folder there, and an exception of pathlib
    if os.path.exists(folder) and not os.path.isdir(folder):  # noqa: PTH110, PTH112
        message = f"{folder} is a file."
        raise OutputError(message, "A folder is needed for the output.", fix)
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.isdir(place))  # noqa: PTH112
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        message = f"The folder {folder} has {free / 1e6:.0f} MB free; the work needs about {needed_bytes / 1e6:.0f} MB."
        raise OutputError(message, fix="Free space or choose another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=TEMPORARY, dir=folder) as probe:
            probe.write(b"kirsch")
            probe.flush()
    except OSError as error:
        message = f"The folder {folder} cannot be written."
        raise OutputError(message, f"{error.strerror or error}.", fix) from error


def remove(folder: Path) -> None:
    """Remove a folder so that a kill leaves either all of it or a rest that `sweep` removes."""
    going = folder.with_name(f"{TEMPORARY}{folder.name}")
    if going.exists():
        shutil.rmtree(going, ignore_errors=True)
    folder.replace(going)
    shutil.rmtree(going, ignore_errors=True)


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
    held = filelock.FileLock(lock, timeout=0)
    try:
        held.acquire()
    except filelock.Timeout as error:
        raise busy from error
    except OSError as error:
        raise OutputError(f"{lock} cannot be locked.", f"{error.strerror or error}.", "Delete or move it.") from error
    try:
        yield
    finally:
        held.release()
