"""Files and folders are written atomically, and damage is found."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kirsch import files
from kirsch.errors import OutputError
from replacements import REPLACEMENTS


def assert_no_temporary_files(folder: Path) -> None:
    assert not list(folder.rglob(f"{files.TEMPORARY}*"))


@pytest.fixture
def intact(tmp_path: Path) -> Path:
    """Return a folder that matches its manifest."""
    with files.new_folder(tmp_path / "folder") as new:
        (new / "weights").write_bytes(bytes(range(256)))
        (new / "inner").mkdir()
        (new / "inner" / "manifest.json").write_text("{}")
    return tmp_path / "folder"


@pytest.fixture
def umask():
    """Set the umask, and restore the old one afterwards."""
    old = os.umask(0o027)
    yield 0o027
    os.umask(old)


def fail(code: int):
    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


# ------------------------------------------------------------------------------------------------ one file


def test_a_file_contains_the_written_text_and_replaces_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    files.write_text(target, "old")
    files.write_text(target, "Kürbis ×2\n")
    assert target.read_bytes() == "Kürbis ×2\n".encode()
    assert_no_temporary_files(tmp_path)


def test_json_is_indented_by_two_spaces_and_ends_with_a_newline(tmp_path):
    files.write_json(tmp_path / "a.json", {"ü": [1]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "ü": [\n    1\n  ]\n}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_nan_and_infinity_and_keeps_the_old_file(tmp_path, value):
    files.write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", value)
    assert (tmp_path / "a.json").read_text() == "1\n"


def test_the_mode_of_a_file_follows_the_umask(tmp_path, umask):
    files.write_text(tmp_path / "a", "x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failed_rename_names_the_reason_and_keeps_the_old_file(tmp_path, monkeypatch, code):
    files.write_text(tmp_path / "a", "old")
    monkeypatch.setattr(Path, "replace", fail(code))
    with pytest.raises(OutputError, match=f"a cannot be written. {os.strerror(code)}. Free space or choose another"):
        files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert_no_temporary_files(tmp_path)


def test_a_read_only_file_system_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "mkstemp", fail(errno.EROFS))
    with pytest.raises(OutputError, match=r"a cannot be written\. Read-only file system\."):
        files.write_text(tmp_path / "a", "x")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(OutputError, match=r"none/a cannot be written\. No such file or directory\."):
        files.write_text(tmp_path / "none" / "a", "x")


def test_a_folder_at_the_path_of_a_file_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OutputError, match=r"a cannot be written\."):
        files.write_text(tmp_path / "a", "x")
    assert_no_temporary_files(tmp_path)


def test_a_file_above_the_size_limit_of_the_system_keeps_the_old_file(tmp_path):
    """A limit on the file size in a separate process causes a real EFBIG error. It stands in for a full disk."""
    script = (
        "import resource, signal, sys; from pathlib import Path; from kirsch import files\n"
        "from kirsch.errors import OutputError\n"
        "target = Path(sys.argv[1]); files.write_bytes(target, b'old')\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: files.write_bytes(target, bytes(5000))\n"
        "except OutputError as error: print(error)\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "a")], check=True, capture_output=True, text=True
    )
    assert "a cannot be written. File too large. Free space or choose another folder." in found.stdout
    assert (tmp_path / "a").read_bytes() == b"old"
    assert_no_temporary_files(tmp_path)


def test_a_kill_before_the_rename_keeps_the_old_file_and_the_temporary_file_can_be_removed(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from kirsch import files\n"
        "target = Path(sys.argv[1]); files.write_text(target, 'old')\n"
        "Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.write_text(target, 'new')\n"
    )
    found = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], check=False)
    assert found.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2  # the kill came after the temporary file was written
    files.remove_temporary(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_interrupt_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(_handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(tmp_path / "a", "x")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ a folder


def test_a_new_folder_matches_its_manifest_and_replaces_the_old_folder(tmp_path, intact):
    assert files.first_flaw(intact) == ""
    with files.new_folder(intact) as new:
        (new / "other").write_text("x")
    assert sorted(path.name for path in intact.iterdir()) == ["manifest.json", "other"]
    assert files.first_flaw(intact) == ""
    assert_no_temporary_files(tmp_path)


def test_an_error_in_the_block_keeps_the_old_folder(tmp_path, intact):
    def fill() -> None:
        with files.new_folder(intact) as new:
            (new / "weights").write_text("half")
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        fill()
    assert (intact / "weights").read_bytes() == bytes(range(256))
    assert files.first_flaw(intact) == ""
    assert_no_temporary_files(tmp_path)


def test_a_kill_while_the_old_folder_is_removed_leaves_the_complete_new_folder(tmp_path, intact):
    script = (
        "import os, shutil, signal, sys; from pathlib import Path; from kirsch import files\n"
        "shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with files.new_folder(Path(sys.argv[1])) as new: (new / 'weights').write_text('new')\n"
    )
    found = subprocess.run([sys.executable, "-c", script, str(intact)], check=False)
    assert found.returncode == -signal.SIGKILL
    assert files.first_flaw(intact) == ""
    assert (intact / "weights").read_text() == "new"
    files.remove_temporary(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_failed_rename_of_a_folder_keeps_the_old_folder(tmp_path, intact, monkeypatch):
    plain = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if target == intact and "old" not in self.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with (
        pytest.raises(OutputError, match=r"The folder .*folder cannot be written\. No space left on device\."),
        files.new_folder(intact) as new,
    ):
        (new / "weights").write_text("new")
    assert (intact / "weights").read_bytes() == bytes(range(256))
    assert_no_temporary_files(tmp_path)


def test_a_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match=r"The folder .*file/new cannot be written\."),
        files.new_folder(tmp_path / "file" / "new"),
    ):
        pass


def test_a_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "a").write_text("user")
    with (
        pytest.raises(OutputError, match=r"The folder .*a cannot be written\. Not a directory\."),
        files.new_folder(tmp_path / "a") as new,
    ):
        (new / "b").write_text("x")
    assert (tmp_path / "a").read_text() == "user"


def test_the_modes_in_a_folder_follow_the_umask(tmp_path, umask):
    with files.new_folder(tmp_path / "a") as new:
        (new / "private").touch(mode=0o600)  # safetensors creates its files with this mode
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a", *(tmp_path / "a").iterdir())}
    assert modes == {"a": 0o750, "private": 0o640, "manifest.json": 0o640}


def test_the_manifest_lists_size_and_sha256(tmp_path):
    """The sha256 of "abc" is the first example of FIPS 180-4."""
    with files.new_folder(tmp_path / "a") as new:
        (new / "abc").write_text("abc")
    entries = json.loads((tmp_path / "a" / "manifest.json").read_text())["files"]
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert entries == {"abc": {"bytes": 3, "sha256": digest}}


# ------------------------------------------------------------------------------------------------ damage


@given(place=st.integers(0, 255), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found(tmp_path_factory, place, bit):
    folder = tmp_path_factory.mktemp("flip")
    content = bytearray(range(256))
    (folder / "weights").write_bytes(content)
    files.write_manifest(folder)
    assert files.first_flaw(folder) == ""
    content[place] ^= 1 << bit
    (folder / "weights").write_bytes(content)
    assert files.first_flaw(folder) == f"{folder / 'weights'} does not have the sha256 that its manifest states"


def test_a_truncated_file_is_found(intact):
    (intact / "weights").write_bytes(bytes(range(255)))
    assert files.first_flaw(intact) == f"{intact / 'weights'} does not have the sha256 that its manifest states"


def test_a_missing_file_is_found(intact):
    (intact / "weights").unlink()
    assert files.first_flaw(intact) == f"{intact / 'weights'} is missing"


def test_a_file_named_like_the_manifest_in_a_subfolder_is_checked(intact):
    (intact / "inner" / "manifest.json").write_text("[]")
    assert "inner/manifest.json does not have the sha256" in files.first_flaw(intact)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "inner/../../outside"])
def test_a_name_outside_the_folder_is_refused(intact, name):
    (intact.parent / "outside").write_text("x")
    entries = {name: {"bytes": 1, "sha256": "0"}}
    files.write_json(intact / "manifest.json", {"kirsch_manifest": 1, "files": entries})
    assert files.first_flaw(intact) == f"{intact / 'manifest.json'} names {name!r}, outside its folder"


@pytest.mark.parametrize(("replace", "kind"), REPLACEMENTS.items())
def test_an_entry_that_is_not_a_regular_file_is_named_with_its_kind(intact, replace, kind):
    """A link to a file with the right bytes is refused as well, since its target may change."""
    replace(intact / "weights")
    assert files.first_flaw(intact) == f"{intact / 'weights'} is {kind}"
    (intact / "manifest.json").rename(intact / "weights.json")
    assert files.first_flaw(intact) == f"{intact / 'manifest.json'} is missing"


@pytest.mark.parametrize("name", ["new", "inner/new", ".hidden", "Weights"])
def test_a_file_that_the_manifest_does_not_list_is_found(intact, name):
    (intact / name).write_text("")
    assert files.first_flaw(intact) == f"{intact / name} is not in its manifest"


def test_a_file_whose_entry_was_removed_is_found(intact):
    content = json.loads((intact / "manifest.json").read_text())
    del content["files"]["weights"]
    files.write_json(intact / "manifest.json", content)
    assert files.first_flaw(intact) == f"{intact / 'weights'} is not in its manifest"


def test_an_empty_manifest_is_refused(intact):
    files.write_json(intact / "manifest.json", {"kirsch_manifest": 1, "files": {}})
    assert files.first_flaw(intact) == f"{intact / 'manifest.json'} names no files"


def test_names_are_case_sensitive(intact):
    (intact / "weights").rename(intact / "Weights")
    assert list(files.flaws(intact)) == ["weights", "Weights"]


def test_flaws_returns_all_flaws_by_name(intact):
    (intact / "weights").write_text("x")
    (intact / "inner" / "manifest.json").unlink()
    assert files.flaws(intact) == {
        "inner/manifest.json": f"{intact / 'inner/manifest.json'} is missing",
        "weights": f"{intact / 'weights'} does not have the sha256 that its manifest states",
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"files": []}',
        '{"files": {"weights": 3}}',
        '{"files": {"weights": {"bytes": Infinity, "sha256": "0"}}}',
        '{"files": {"weights": {"bytes": null, "sha256": "0"}}}',
        '{\n  "kirsch_manifest": true,\n  "files": {}\n}\n',
        '{\n  "kirsch_manifest": 2,\n  "files": {}\n}\n',
        '{\n  "kirsch_manifest": 1,\n  "files": {\n    "a": 1\n  }\n}\n',
        '{\n  "kirsch_manifest": 1,\n  "files": {},\n  "more": 1\n}\n',
        "[" * 100_000,
    ],
)
def test_a_damaged_manifest_is_named(intact, text):
    (intact / "manifest.json").write_text(text)
    assert files.first_flaw(intact).startswith(f"{intact / 'manifest.json'} is damaged: ")


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace('"files": {', '"files": {"weights": {"bytes": 1, "sha256": "0"},', 1),  # named twice
        lambda text: text.replace('"bytes": 256', '"bytes": 256.0'),
        lambda text: text.replace('"bytes": 256', '"bytes": 1, "bytes": 256'),
        lambda text: text.rstrip(),
        lambda text: json.dumps(json.loads(text)),
    ],
)
def test_a_manifest_in_another_format_than_the_written_one_is_damaged(intact, change):
    path = intact / "manifest.json"
    path.write_text(change(path.read_text()))
    assert files.first_flaw(intact).startswith(f"{path} is damaged: ")


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('"bytes": 256', '"bytes": NaN', "NaN is not a JSON number"),
        ('"bytes": 256', '"bytes": "256"', "the entry of 'weights' must have a whole number of bytes"),
        ('"bytes": 256', '"size": 256', "the entry of 'weights' must have the keys 'bytes' and 'sha256' only"),
        ('"kirsch_manifest": 1', '"kirsch_manifest": "1"', "it is not a manifest of version 1"),
    ],
)
def test_an_error_in_a_manifest_is_named_with_file_and_reason(intact, old, new, why):
    path = intact / "manifest.json"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged: {why}")):
        files.entries(intact)
    assert files.first_flaw(intact).startswith(f"{path} is damaged: {why}")


def test_a_manifest_that_is_not_utf8_is_refused(intact):
    (intact / "manifest.json").write_bytes(b"\xff\xfe\x00")
    assert files.first_flaw(intact) == f"{intact / 'manifest.json'} is damaged: it is not UTF-8 text (byte 0)"


def test_a_missing_folder_is_found(tmp_path):
    assert "none/manifest.json is missing" in files.first_flaw(tmp_path / "none")


def test_an_impossible_file_name_is_found(intact):
    entries = {"a\0b": {"bytes": 1, "sha256": "0"}}
    files.write_json(intact / "manifest.json", {"kirsch_manifest": 1, "files": entries})
    assert files.first_flaw(intact) == f"{intact}/a\0b is missing"


def test_a_file_name_that_is_not_utf8_is_found(intact):
    Path(os.fsdecode(os.fsencode(intact) + b"/\xff")).write_text("")
    assert files.first_flaw(intact).endswith("has a name that is not UTF-8")


def test_an_unreadable_file_is_found(intact, monkeypatch):
    monkeypatch.setattr(files, "sha256", fail(errno.EACCES))
    assert "cannot be read: [Errno 13] Permission denied" in files.first_flaw(intact)


# -------------------------------------------------------------------------------- checks before any work


def test_check_writable_creates_the_folder_and_leaves_it_empty(tmp_path):
    files.check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_file_at_the_path_of_the_output_folder_is_refused(tmp_path):
    (tmp_path / "a").write_text("user")
    with pytest.raises(OutputError, match=r"a is a file\. A folder is needed for the output\. Choose another folder\."):
        files.check_writable(tmp_path / "a")
    with pytest.raises(OutputError, match=r"The folder .*a/b cannot be written\. Not a directory\."):
        files.check_writable(tmp_path / "a" / "b")
    assert (tmp_path / "a").read_text() == "user"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_an_unwritable_folder_is_refused_before_any_work(tmp_path, monkeypatch, code):
    monkeypatch.setattr(files.tempfile, "NamedTemporaryFile", fail(code))
    with pytest.raises(OutputError, match=f"The folder .* cannot be written. {os.strerror(code)}. Choose another"):
        files.check_writable(tmp_path)


def test_too_little_free_space_is_refused_with_both_sizes_and_no_folder_is_created(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 3_000_000))
    with pytest.raises(OutputError, match=r"has 3 MB free; the work needs about 20 MB\. Free space"):
        files.check_writable(tmp_path / "a", needed_bytes=20_000_000)
    assert list(tmp_path.iterdir()) == []
    files.check_writable(tmp_path / "a", needed_bytes=3_000_000)


def test_remove_temporary_removes_only_temporary_entries(tmp_path):
    for name in (f"{files.TEMPORARY}a", f"kept/{files.TEMPORARY}b", f"{files.TEMPORARY}a/{files.TEMPORARY}c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "part").write_text("x")
    (tmp_path / "kept" / f"{files.TEMPORARY}file").write_text("x")
    (tmp_path / "kept" / "user").write_text("x")
    files.remove_temporary(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["kept", "kept/user"]


def test_remove_temporary_ignores_a_missing_folder(tmp_path):
    files.remove_temporary(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []
