"""Files and folders are whole or absent, and damage is named."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kirsch import files
from kirsch.errors import OutputError


def assert_nothing_half_written(folder: Path) -> None:
    assert not list(folder.rglob(f"{files.TEMPORARY}*"))


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    """A folder with a manifest."""
    with files.new_folder(tmp_path / "sound") as new:
        (new / "weights").write_bytes(bytes(range(256)))
        (new / "inner").mkdir()
        (new / "inner" / "manifest.json").write_text("{}")
    return tmp_path / "sound"


@pytest.fixture
def umask():
    """Sets the umask, and puts the old one back."""
    old = os.umask(0o027)
    yield 0o027
    os.umask(old)


def fail(code: int):
    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


# ------------------------------------------------------------------------------------------------ one file


def test_a_file_holds_what_was_written_and_replaces_the_old(tmp_path):
    target = tmp_path / "a.txt"
    files.write_text(target, "old")
    files.write_text(target, "Kürbis ×2\n")
    assert target.read_bytes() == "Kürbis ×2\n".encode()
    assert_nothing_half_written(tmp_path)


def test_json_is_two_spaces_a_level_and_ends_with_a_newline(tmp_path):
    files.write_json(tmp_path / "a.json", {"ü": [1]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "ü": [\n    1\n  ]\n}\n'


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_what_is_no_number_and_keeps_the_old_file(tmp_path, value):
    files.write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", value)
    assert (tmp_path / "a.json").read_text() == "1\n"


def test_a_file_has_the_mode_that_the_umask_asks_for(tmp_path, umask):
    files.write_text(tmp_path / "a", "x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failed_rename_says_why_and_keeps_the_old_file(tmp_path, monkeypatch, code):
    files.write_text(tmp_path / "a", "old")
    monkeypatch.setattr(Path, "replace", fail(code))
    with pytest.raises(OutputError, match=f"a cannot be written. {os.strerror(code)}. Free space or choose another"):
        files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert_nothing_half_written(tmp_path)


def test_a_folder_that_takes_no_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "mkstemp", fail(errno.EROFS))
    with pytest.raises(OutputError, match=r"a cannot be written\. Read-only file system\."):
        files.write_text(tmp_path / "a", "x")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(OutputError, match=r"none/a cannot be written\. No such file or directory\."):
        files.write_text(tmp_path / "none" / "a", "x")


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OutputError, match=r"a cannot be written\."):
        files.write_text(tmp_path / "a", "x")
    assert_nothing_half_written(tmp_path)


def test_a_file_above_the_size_that_the_system_allows_leaves_the_old_one(tmp_path):
    """A true EFBIG, in a process of its own: the nearest thing to a full disk that any system has."""
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
    assert_nothing_half_written(tmp_path)


def test_a_kill_before_the_rename_leaves_the_old_file_and_a_sweep_removes_the_rest(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from kirsch import files\n"
        "target = Path(sys.argv[1]); files.write_text(target, 'old')\n"
        "Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.write_text(target, 'new')\n"
    )
    found = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a")], check=False)
    assert found.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2  # the half written one is there: the kill came where it should
    files.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_interrupt_leaves_nothing_half_written(tmp_path, monkeypatch):
    def interrupt(_handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_text(tmp_path / "a", "x")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ a folder


def test_a_new_folder_is_sound_and_replaces_the_old_one_wholly(tmp_path, sound):
    assert files.damage(sound) == ""
    with files.new_folder(sound) as new:
        (new / "other").write_text("x")
    assert sorted(path.name for path in sound.iterdir()) == ["manifest.json", "other"]
    assert files.damage(sound) == ""
    assert_nothing_half_written(tmp_path)


def test_a_folder_whose_block_fails_never_appears_and_the_old_one_stays(tmp_path, sound):
    def fill() -> None:
        with files.new_folder(sound) as new:
            (new / "weights").write_text("half")
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        fill()
    assert (sound / "weights").read_bytes() == bytes(range(256))
    assert files.damage(sound) == ""
    assert_nothing_half_written(tmp_path)


def test_a_kill_while_an_old_folder_is_replaced_never_leaves_half_of_it(tmp_path, sound):
    """The kill comes when the old folder's removal begins: under its name there is the new folder, whole."""
    script = (
        "import os, shutil, signal, sys; from pathlib import Path; from kirsch import files\n"
        "shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with files.new_folder(Path(sys.argv[1])) as new: (new / 'weights').write_text('new')\n"
    )
    found = subprocess.run([sys.executable, "-c", script, str(sound)], check=False)
    assert found.returncode == -signal.SIGKILL
    assert files.damage(sound) == ""
    assert (sound / "weights").read_text() == "new"
    files.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["sound"]


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path, sound, monkeypatch):
    plain = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if target == sound and "old" not in self.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with (
        pytest.raises(OutputError, match=r"The folder .*sound cannot be written\. No space left on device\."),
        files.new_folder(sound) as new,
    ):
        (new / "weights").write_text("new")
    assert (sound / "weights").read_bytes() == bytes(range(256))
    assert_nothing_half_written(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OutputError, match=r"The folder .*file/new cannot be written\."),
        files.new_folder(tmp_path / "file" / "new"),
    ):
        pass


def test_a_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "a").write_text("mine")
    with (
        pytest.raises(OutputError, match=r"The folder .*a cannot be written\. Not a directory\."),
        files.new_folder(tmp_path / "a") as new,
    ):
        (new / "b").write_text("x")
    assert (tmp_path / "a").read_text() == "mine"


def test_the_modes_in_a_folder_are_those_that_the_umask_asks_for(tmp_path, umask):
    with files.new_folder(tmp_path / "a") as new:
        (new / "private").touch(mode=0o600)  # as safetensors does
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a", *(tmp_path / "a").iterdir())}
    assert modes == {"a": 0o750, "private": 0o640, "manifest.json": 0o640}


def test_the_manifest_lists_bytes_and_the_known_sha256(tmp_path):
    """The sha256 of "abc" is the first example of FIPS 180-4."""
    with files.new_folder(tmp_path / "a") as new:
        (new / "abc").write_text("abc")
    entries = json.loads((tmp_path / "a" / "manifest.json").read_text())["files"]
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert entries == {"abc": {"bytes": 3, "sha256": digest}}


# ------------------------------------------------------------------------------------------------ damage


@given(place=st.integers(0, 255), bit=st.integers(0, 7))
def test_a_flipped_bit_is_seen(tmp_path_factory, place, bit):
    folder = tmp_path_factory.mktemp("flip")
    content = bytearray(range(256))
    (folder / "weights").write_bytes(content)
    files.write_manifest(folder)
    assert files.damage(folder) == ""
    content[place] ^= 1 << bit
    (folder / "weights").write_bytes(content)
    assert files.damage(folder) == f"{folder / 'weights'} does not have the sha256 of its manifest"


def test_a_truncated_file_is_seen(sound):
    (sound / "weights").write_bytes(bytes(range(255)))
    assert files.damage(sound) == f"{sound / 'weights'} does not have the sha256 of its manifest"


def test_a_missing_file_is_seen(sound):
    (sound / "weights").unlink()
    assert files.damage(sound) == f"{sound / 'weights'} is missing"


def test_a_file_inside_that_is_called_like_the_manifest_is_watched_too(sound):
    (sound / "inner" / "manifest.json").write_text("[]")
    assert "inner/manifest.json does not have the sha256" in files.damage(sound)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "inner/../../outside"])
def test_a_name_outside_the_folder_is_refused(sound, name):
    (sound.parent / "outside").write_text("x")
    entries = {name: {"bytes": 1, "sha256": "0"}}
    files.write_json(sound / "manifest.json", {"kirsch_manifest": 1, "files": entries})
    assert files.damage(sound) == f"{sound / 'manifest.json'} names {name!r}, outside its folder"


def replace_by_link(path):
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


def replace_by_socket(path):
    path.unlink()
    with socket.socket(socket.AF_UNIX) as made, contextlib.chdir(path.parent):  # such paths must be short
        made.bind(path.name)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("replace", "kind"),
    [
        (replace_by_link, "a symbolic link"),
        (replace_by_pipe, "a named pipe"),
        (replace_by_socket, "a socket"),
        (replace_by_folder, "a folder"),
    ],
)
def test_what_is_no_file_of_its_own_is_named_by_its_kind(sound, replace, kind):
    """Even a link to a file with the right bytes: nothing keeps those as they are."""
    replace(sound / "weights")
    assert files.damage(sound) == f"{sound / 'weights'} is {kind}"
    (sound / "manifest.json").rename(sound / "weights.json")
    assert files.damage(sound) == f"{sound / 'manifest.json'} is missing"


@pytest.mark.parametrize("name", ["new", "inner/new", ".hidden", "Weights"])
def test_a_file_that_the_manifest_does_not_name_is_named(sound, name):
    (sound / name).write_text("")
    assert files.damage(sound) == f"{sound / name} is not in its manifest"


def test_a_file_whose_entry_is_gone_is_not_sound_whatever_it_holds(sound):
    content = json.loads((sound / "manifest.json").read_text())
    del content["files"]["weights"]
    files.write_json(sound / "manifest.json", content)
    assert files.damage(sound) == f"{sound / 'weights'} is not in its manifest"


def test_a_manifest_that_names_no_files_is_damage(sound):
    files.write_json(sound / "manifest.json", {"kirsch_manifest": 1, "files": {}})
    assert files.damage(sound) == f"{sound / 'manifest.json'} names no files"


def test_a_name_in_other_case_is_another_name(sound):
    (sound / "weights").rename(sound / "Weights")
    assert list(files.flaws(sound)) == ["weights", "Weights"]


def test_all_flaws_are_found_by_name(sound):
    (sound / "weights").write_text("x")
    (sound / "inner" / "manifest.json").unlink()
    assert files.flaws(sound) == {
        "inner/manifest.json": f"{sound / 'inner/manifest.json'} is missing",
        "weights": f"{sound / 'weights'} does not have the sha256 of its manifest",
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
def test_a_damaged_manifest_is_named(sound, text):
    (sound / "manifest.json").write_text(text)
    assert files.damage(sound).startswith(f"{sound / 'manifest.json'} is damaged: ")


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
def test_a_manifest_that_reads_otherwise_than_it_was_written_is_damaged(sound, change):
    path = sound / "manifest.json"
    path.write_text(change(path.read_text()))
    assert files.damage(sound).startswith(f"{path} is damaged: ")


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('"bytes": 256', '"bytes": NaN', "NaN is not a JSON number"),
        ('"bytes": 256', '"bytes": "256"', "the entry of 'weights' must have a whole number of bytes"),
        ('"bytes": 256', '"size": 256', "the entry of 'weights' must have 'bytes' and 'sha256' alone"),
        ('"kirsch_manifest": 1', '"kirsch_manifest": "1"', "it is not a manifest of version 1"),
    ],
)
def test_a_fault_in_a_manifest_is_named_with_its_file_and_its_reason(sound, old, new, why):
    path = sound / "manifest.json"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=re.escape(f"{path} is damaged: {why}")):
        files.entries(sound)
    assert files.damage(sound).startswith(f"{path} is damaged: {why}")


def test_a_manifest_that_is_no_text_is_named(sound):
    (sound / "manifest.json").write_bytes(b"\xff\xfe\x00")
    assert files.damage(sound) == f"{sound / 'manifest.json'} is damaged: it is not UTF-8 text (byte 0)"


def test_a_missing_folder_is_damage(tmp_path):
    assert "none/manifest.json is missing" in files.damage(tmp_path / "none")


def test_a_name_that_no_file_can_have_is_damage(sound):
    entries = {"a\0b": {"bytes": 1, "sha256": "0"}}
    files.write_json(sound / "manifest.json", {"kirsch_manifest": 1, "files": entries})
    assert files.damage(sound) == f"{sound}/a\0b is missing"


def test_a_file_whose_name_is_no_text_is_damage(sound):
    Path(os.fsdecode(os.fsencode(sound) + b"/\xff")).write_text("")
    assert files.damage(sound).endswith("has a name that is not UTF-8")


def test_a_file_that_cannot_be_read_is_damage(sound, monkeypatch):
    monkeypatch.setattr(files, "sha256", fail(errno.EACCES))
    assert "cannot be read: [Errno 13] Permission denied" in files.damage(sound)


# ------------------------------------------------------------------------------------------------ before any work


def test_a_writable_folder_is_made_and_left_empty(tmp_path):
    files.check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_file_in_the_place_of_the_output_folder_is_named(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(OutputError, match=r"a is a file\. A folder is needed for the output\. Choose another folder\."):
        files.check_writable(tmp_path / "a")
    with pytest.raises(OutputError, match=r"The folder .*a/b cannot be written\. Not a directory\."):
        files.check_writable(tmp_path / "a" / "b")
    assert (tmp_path / "a").read_text() == "mine"


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_named_before_any_work(tmp_path, monkeypatch, code):
    monkeypatch.setattr(files.tempfile, "NamedTemporaryFile", fail(code))
    with pytest.raises(OutputError, match=f"The folder .* cannot be written. {os.strerror(code)}. Choose another"):
        files.check_writable(tmp_path)


def test_a_folder_without_room_is_named_with_both_sizes_and_nothing_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 3_000_000))
    with pytest.raises(OutputError, match=r"has 3 MB free; the work needs about 20 MB\. Free space"):
        files.check_writable(tmp_path / "a", needed_bytes=20_000_000)
    assert list(tmp_path.iterdir()) == []
    files.check_writable(tmp_path / "a", needed_bytes=3_000_000)


def test_a_sweep_removes_only_what_is_half_written(tmp_path):
    for name in (f"{files.TEMPORARY}a", f"kept/{files.TEMPORARY}b", f"{files.TEMPORARY}a/{files.TEMPORARY}c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "part").write_text("x")
    (tmp_path / "kept" / f"{files.TEMPORARY}file").write_text("x")
    (tmp_path / "kept" / "mine").write_text("x")
    files.sweep(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["kept", "kept/mine"]


def test_a_sweep_of_a_missing_folder_does_nothing(tmp_path):
    files.sweep(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []
