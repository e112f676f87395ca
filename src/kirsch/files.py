"""Atomic writing of files and folders, and manifests: lists of the files of a folder with their hashes.

A file is written under a temporary name, synced and renamed, so that it is never seen half written.
"""

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
IRREGULAR_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
}


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically: even if the process is killed, readers see either the old content or the new."""
    write_chunks(path, (content,))


def write_chunks(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file atomically from chunks, which need not fit into memory together."""
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
    r"""Write a UTF-8 text file atomically.

    A character that UTF-8 cannot encode is written as an escape such as \udc80, which a JSON reader restores. Python
    uses such characters for the undecodable bytes of a file name.
    """
    write_bytes(path, content.encode(errors="backslashreplace"))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically; see `json_text`."""
    write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """Return JSON in the format of Kirsch: two spaces a level, a newline at the end.

    Raises:
        ValueError: a number is NaN or infinite.
    """
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that gets its final name, and a manifest, when the block ends without an error.

    An older folder of that name is replaced.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
        yield temporary
        _sync_files(temporary)
        write_manifest(temporary)
        _sync_folder(temporary)
        temporary.chmod(0o777 & ~_umask())
        _replace_folder(temporary, path)
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


def _sync_files(folder: Path) -> None:
    """Sync every file of a folder, and set the user's default file mode."""
    for file in (path for path in folder.rglob("*") if path.is_file()):
        file.chmod(0o666 & ~_umask())  # safetensors writes 0600 regardless of the umask
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _replace_folder(new: Path, path: Path) -> None:
    """Rename a folder to its final name.

    An older folder of that name is renamed before it is removed, so that a kill during the removal leaves no
    incomplete folder under that name.
    """
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


def write_manifest(folder: Path, unlisted_names: Collection[str] = ()) -> None:
    """Record name, size and sha256 of every file of a folder in its manifest.json.

    Args:
        folder: a folder that contains only regular files and folders.
        unlisted_names: names of files that the manifest leaves out.
    """
    names = _scan(folder)[0] - {MANIFEST, *unlisted_names}
    write_entries(folder, {name: ((folder / name).stat().st_size, sha256(folder / name)) for name in names})


def write_entries(folder: Path, new_entries: Mapping[str, tuple[int, str]]) -> None:
    """Write a manifest with these entries: size in bytes and sha256 by file name."""
    listed = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(new_entries.items())}
    write_json(folder / MANIFEST, {"kirsch_manifest": 1, "files": listed})


def first_flaw(folder: Path) -> str:
    """Return a sentence on the first file that does not match the manifest of its folder; empty if all match."""
    return next(iter(flaws(folder).values()), "")


def flaws(folder: Path, unlisted_names: Collection[str] = ()) -> dict[str, str]:
    """Return a sentence for each file that does not match the manifest of its folder, by file name.

    The result is empty if the manifest has the format of Kirsch, and the folder contains exactly the listed files with
    the listed hashes. A manifest protects against disk failures and accidental changes, not against forgery: it can be
    recomputed after a change.

    Args:
        folder: a folder with a manifest.json.
        unlisted_names: names of files that the manifest leaves out.
    """
    try:
        known = entries(folder)
    except OSError as error:
        return {MANIFEST: f"{folder / MANIFEST} cannot be read: {error.strerror or error}"}
    except ValueError as error:
        return {MANIFEST: str(error)}
    if not known:
        return {MANIFEST: f"{folder / MANIFEST} names no files"}
    outside = {name: f"{folder / MANIFEST} names {name!r}, outside its folder" for name in known if _is_outside(name)}
    if outside:
        return outside
    present, flaws_by_name = _scan(folder)
    for name, (size, digest) in known.items():
        if name not in flaws_by_name and (flaw := _flaw(folder / name, size, digest, present=name in present)):
            flaws_by_name[name] = flaw
    for name in sorted(present - known.keys() - {MANIFEST, *unlisted_names}):
        flaws_by_name[name] = f"{folder / name} is not in its manifest"
    return flaws_by_name


def entries(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size in bytes and sha256 by file name, from the manifest of a folder.

    Raises:
        OSError: the manifest cannot be read.
        ValueError: the manifest is missing or damaged. The message names the file and the reason, without a period at
            its end.
    """
    path = folder / MANIFEST
    if not os.path.lexists(path):
        raise ValueError(f"{path} is missing")
    if path.is_symlink() or not path.is_file():  # reading a pipe would block forever
        raise ValueError(f"{path} is not a file")
    content = path.read_bytes()
    try:
        return _parse_entries(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def unlisted(folder: Path) -> list[str]:
    """Return the names of files that the manifest of a folder does not list; none if the manifest is damaged."""
    try:
        known = entries(folder)
    except (OSError, ValueError):
        return []
    return sorted(_scan(folder)[0] - known.keys() - {MANIFEST})


def irregular_entries(folder: Path) -> dict[str, str]:
    """Return a sentence for each entry of a folder that is not a file or a folder, such as a link or pipe, by name."""
    return _scan(folder)[1]


def _parse_entries(text: bytes) -> dict[str, tuple[int, str]]:
    """Return size in bytes and sha256 by file name, from the text of a manifest.

    Raises:
        ValueError: the text is not what `write_manifest` writes. The same content in another format is refused as well,
            because Kirsch did not write it.
    """
    content = strict_json.parse(text)
    if not isinstance(content, dict) or content.keys() != {"kirsch_manifest", "files"}:
        raise ValueError("an object with the keys 'kirsch_manifest' and 'files' is expected")
    version, listed = content["kirsch_manifest"], content["files"]
    if type(version) is not int or version != 1 or not isinstance(listed, dict):
        raise ValueError("it is not a manifest of version 1")
    for name, entry in listed.items():
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise ValueError(f"the entry of {name!r} must have the keys 'bytes' and 'sha256' only")
        if type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
            raise ValueError(f"the entry of {name!r} must have a whole number of bytes and a text as sha256")
    if json_text(content).encode() != text:
        raise ValueError("its spaces or the order of its entries differ from those that Kirsch writes")
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}


def _is_outside(name: str) -> bool:
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or path.as_posix() != name or name == "."


def _flaw(file: Path, size: int, digest: str, *, present: bool) -> str:
    try:
        if not present:
            return f"{file} is a folder" if file.is_dir() else f"{file} is missing"
        if file.stat().st_size != size or sha256(file) != digest:
            return f"{file} does not have the sha256 that its manifest states"
    except (OSError, ValueError) as error:  # ValueError: an impossible file name
        return f"{str(file)!r} cannot be read: {error}"
    return ""


def _scan(folder: Path) -> tuple[set[str], dict[str, str]]:
    """Return the names of the regular files below a folder, and a sentence for every other entry except folders.

    Temporary files are skipped, and links are not followed.
    """
    names, others = set(), {}

    def unreadable(error: OSError) -> None:
        name = Path(error.filename).relative_to(folder).as_posix()
        others[name] = f"{error.filename} cannot be read: {error.strerror}"

    for parent, folders, file_names in os.walk(folder, onerror=unreadable):
        for entry in [*folders, *file_names]:
            path = Path(parent, entry)
            name = path.relative_to(folder).as_posix()
            if entry.startswith(TEMPORARY):
                continue
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # another process has just removed it
                continue
            if not name.isprintable() and not _is_text(name):
                others[name] = f"{str(path)!r} has a name that is not UTF-8"
            elif stat.S_ISREG(mode):
                names.add(name)
            elif not stat.S_ISDIR(mode):
                others[name] = f"{path} is {IRREGULAR_KINDS.get(stat.S_IFMT(mode), 'a device')}"
        folders[:] = sorted(entry for entry in folders if not entry.startswith(TEMPORARY))
    return names, others


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def sha256(path: Path) -> str:
    """Return the sha256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(folder: Path, needed_bytes: int = 0) -> None:
    """Check that a folder can be created and written, and that its disk has enough free space.

    Args:
        folder: the folder to check; created if it does not exist.
        needed_bytes: estimated number of bytes to be written.

    Raises:
        OutputError: the folder is a file, cannot be written, or has too little space. No file is left behind.
    """
    fix = "Choose another folder."
    # os.path returns False for a name that is too long; pathlib raises
    if os.path.exists(folder) and not os.path.isdir(folder):  # noqa: PTH110, PTH112
        message = f"{folder} is a file."
        raise OutputError(message, "A folder is needed for the output.", fix)
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.isdir(path))  # noqa: PTH112
    free = shutil.disk_usage(existing).free
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
    """Remove a folder.

    If the process is killed during the call, the folder is either complete, or has a temporary name, so that a later
    call of `remove_temporary` removes the rest.
    """
    temporary = folder.with_name(f"{TEMPORARY}{folder.name}")
    if temporary.exists():
        shutil.rmtree(temporary, ignore_errors=True)
    folder.replace(temporary)
    shutil.rmtree(temporary, ignore_errors=True)


def remove_temporary(folder: Path) -> None:
    """Remove the temporary files and folders that a killed process left in a folder."""
    for path in list(folder.rglob(f"{TEMPORARY}*")) if folder.is_dir() else ():  # a list, since the loop removes paths
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    # Without this, a power cut may undo the rename. Some platforms cannot open a folder.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def exclusive_lock(path: Path, busy: OutputError) -> Iterator[None]:
    """Hold a file lock during the block. The operating system releases the lock of a process that died.

    Args:
        path: lock file, created if it does not exist.
        busy: error to raise if another process holds the lock.
    """
    lock = filelock.FileLock(path, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise busy from error
    except OSError as error:
        raise OutputError(f"{path} cannot be locked.", f"{error.strerror or error}.", "Delete or move it.") from error
    try:
        yield
    finally:
        lock.release()
