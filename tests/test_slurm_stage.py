"""Copies on the node's disk: whole or not there, made once, and never deleted while somebody uses them."""

import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from runfolder.errors import UserError
from slurm import copying, stage
from slurm.stage import staged

ROOT = Path(__file__).parents[1]
_CHILD = """
import os, signal, sys, time
from pathlib import Path
from slurm import copying, stage

source, local, keep = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
pour = copying.Copying.pour
signal.alarm(60)  # whatever happens

def say(line):
    print(line, flush=True)

def use():
    with stage.staged(source, local, keep, say) as data:
        say("using")
        sys.stdin.readline()
"""
_SLOWLY = """
def slowly(*arguments):
    say("pouring")
    time.sleep(0.05)
    pour(*arguments)

copying.Copying.pour = slowly
"""


@pytest.fixture
def source(tmp_path):
    return make_source(tmp_path / "data set")


def make_source(folder: Path, size: int = 1000) -> Path:
    (folder / "train" / "zebra").mkdir(parents=True)
    (folder / "train" / "zebra" / "ünïcode.jpg").write_bytes(os.urandom(size))
    (folder / "train" / "empty.bin").write_bytes(b"")
    (folder / "a.bin").write_bytes(os.urandom(3 * size))
    (folder / "no files").mkdir()
    return folder


def content(folder: Path) -> dict[str, bytes | None]:
    """All there is in a folder, links followed: bytes of files, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.exists()
    }


def copies(local: Path) -> list[Path]:
    return sorted((local / "staged").iterdir())


def refused(words: str, source: Path, local: Path) -> None:
    """It is an error with these words, and nothing is left."""
    with pytest.raises(UserError, match=words), staged(source, local, report=quiet):
        pass
    assert copies(local) == []


def pack(folder: Path, archive: Path) -> Path:
    if archive.suffix == ".zip":
        shutil.make_archive(str(archive.with_suffix("")), "zip", folder)
    else:
        with tarfile.open(archive, "w:gz" if archive.name.endswith("gz") else "w") as tar:
            tar.add(folder, ".")
    return archive


@contextmanager
def child(code: str, source: Path, local: Path, keep: float = 24.0, before: tuple = ()):
    """A process of its own that runs some code after `_CHILD`."""
    command = [*before, sys.executable, "-c", _CHILD + code, str(source), str(local), str(keep)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(process: subprocess.Popen, word: str) -> list[str]:
    """The lines of a process up to the first that begins with this word."""
    lines = []
    while not "".join(lines[-1:]).startswith(word):
        line = process.stdout.readline()
        assert line, lines
        lines.append(line)
    return lines


def quiet(_line: str) -> None:
    pass


# -- the same bytes ---------------------------------------------------------------------


def test_a_folder_is_copied_with_what_its_links_point_to(source, tmp_path):
    elsewhere = make_source(tmp_path / "elsewhere")
    (source / "linked").symlink_to(elsewhere)
    (source / "linked too").symlink_to(elsewhere)
    (source / "file").symlink_to("a.bin")
    (source / "dead").symlink_to("nothing")
    expected = content(source)
    expected |= {
        f"{name}/{key}": value for name in ("linked", "linked too") for key, value in content(elsewhere).items()
    }
    lines = []
    with staged(source, tmp_path / "local", report=lines.append) as data:
        assert content(data) == expected
        assert not any(path.is_symlink() for path in data.rglob("*"))
    assert [line.split()[0] for line in lines] == ["left", "staged"]
    assert "dead" in lines[0]
    assert "staged 10 files" in lines[1]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "a.zip"])
def test_an_archive_is_the_folder_it_was_made_of(source, tmp_path, name):
    archive = pack(source, tmp_path / name)
    with staged(archive, tmp_path / "local", report=quiet) as data:
        assert content(data) == content(source)


def test_a_tar_keeps_its_inner_links_and_its_later_members(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "folder/x", b"old")
        add(tar, "folder/x", b"newer")
        add(tar, "hard", type=tarfile.LNKTYPE, linkname="folder/x")
        add(tar, "soft", type=tarfile.SYMTYPE, linkname="folder")
    with staged(tmp_path / "a.tar", tmp_path / "local", report=quiet) as data:
        assert (data / "hard").read_bytes() == (data / "soft" / "x").read_bytes() == b"newer"


def test_a_folder_inside_itself_is_an_error(source, tmp_path):
    (source / "train" / "loop").symlink_to(source)
    refused("link to a folder that it is in, train/loop", source, tmp_path / "l")


def test_progress_is_reported(source, tmp_path, monkeypatch):
    monkeypatch.setattr(copying, "REPORT_EVERY", 0.0)
    lines = []
    with staged(source, tmp_path / "local", report=lines.append):
        pass
    assert "files found so far" in lines[0]
    assert any("3 files, 0.0 MB of 0.0 MB" in line and "/s" in line for line in lines[1:-1])
    assert lines[-1].startswith("staged 3 files, 0.0 MB in 0 s")


# -- once -------------------------------------------------------------------------------


def test_of_several_processes_one_copies_and_the_others_wait(source, tmp_path):
    local = tmp_path / "local"
    with child(_SLOWLY + "use()", source, local) as first:
        until(first, "pouring")
        with child(_SLOWLY + "use()", source, local) as second, child("use()", source, local) as third:
            first, *others = ["".join(until(process, "using")) for process in (first, second, third)]
    assert first.count("staged 3 files") == 1
    assert [lines.split()[:3] for lines in others] == [["reused", "3", "files,"]] * 2
    assert len(copies(local)) == 1


def test_a_second_start_reads_only_what_a_glimpse_needs(source, tmp_path, monkeypatch):
    with staged(source, tmp_path / "local", report=quiet):
        monkeypatch.setattr(copying.Copying, "make", None)
        with staged(source, tmp_path / "local", report=quiet) as data:
            assert content(data) == content(source)


@pytest.mark.parametrize("waiting", [False, True])
def test_a_killed_copier_is_replaced(source, tmp_path, waiting):
    """By the next start, and by a process that was waiting for it; nobody sees the half copy."""
    stuck = "copying.Copying.pour = lambda *a: a[2] in seen or (seen.append(1), pour(*a), say('half'), time.sleep(60))"
    with child(f"seen = []\n{stuck}\nuse()", source, tmp_path / "l") as copier:
        until(copier, "half")
        (half,) = copies(tmp_path / "l")
        assert any(path.is_file() for path in (half / "copying").rglob("*"))
        assert not (half / "data").exists()
        with child("use()" if waiting else "sys.stdin.readline()\nuse()", source, tmp_path / "l") as other:
            if waiting:
                assert f"process {copier.pid} on" in until(other, "waiting")[-1]
            copier.kill()
            copier.wait()
            print("" if waiting else "\n", end="", file=other.stdin, flush=True)
            assert "staged 3 files" in "".join(until(other, "using"))
            (entry,) = copies(tmp_path / "l")
            assert content(entry / "data") == content(source)
            assert not (entry / "copying").exists()


def test_the_lock_of_a_folder_that_was_just_removed_is_none(tmp_path, monkeypatch):
    entry, flock = tmp_path / "entry", stage.fcntl.flock
    with monkeypatch.context() as patch:
        patch.setattr(stage.fcntl, "flock", lambda *a: [shutil.rmtree(entry), flock(*a)])
        assert stage._try_lock(entry, create=True) is None
    with stage._try_lock(entry, create=True):
        assert stage._try_lock(entry) is None
    stage._try_lock(entry).close()


def test_a_folder_that_goes_while_it_is_made_is_tried_again_and_a_file_in_its_place_is_an_error(tmp_path, monkeypatch):
    """pathlib looks again after mkdir has found something, and may find nothing."""
    entry = tmp_path / "entry"
    with monkeypatch.context() as patch:
        patch.setattr(stage.Path, "is_dir", lambda path: [shutil.rmtree(path), False][1])
        entry.mkdir()
        assert stage._try_lock(entry, create=True) is None
    stage._try_lock(entry, create=True).close()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        stage._try_lock(tmp_path / "file", create=True)


def test_coming_and_going_at_the_same_time(source, tmp_path):
    """With keep_hours=0 the copy is made and deleted all the time; who uses it always finds it whole."""
    often = """
for _ in range(25):
    with stage.staged(source, local, keep, lambda line: None) as data:
        for again in range(2):
            assert (data / "a.bin").read_bytes() == (source / "a.bin").read_bytes()
            assert len(list((data / "train").iterdir())) == 2
            time.sleep(0.002 * (os.getpid() % 4))
say("all found")
"""
    with child(often, source, tmp_path / "l", 0) as first, child(often, source, tmp_path / "l", 0) as second:  # noqa: SIM117
        with child(often, source, tmp_path / "l", 0) as third:
            for process in (first, second, third):
                said, _ = process.communicate()
                assert said == "all found\n"
    assert copies(tmp_path / "l") == []


# -- changed sources --------------------------------------------------------------------


@pytest.mark.parametrize("change", ["more", "less", "longer", "rewritten", "deep"])
def test_a_changed_source_gets_a_new_copy_and_the_old_one_goes_with_its_last_user(source, tmp_path, change):
    with staged(source, tmp_path / "local", report=quiet) as old:
        before = content(source)
        if change == "more":
            (source / "train" / "new").write_bytes(b"new")
        elif change == "less":
            (source / "train" / "empty.bin").unlink()
        elif change == "deep":
            (source / "train" / "zebra" / "ünïcode.jpg").write_bytes(b"x")
        else:
            (source / "a.bin").write_bytes(os.urandom(3000 + (change == "longer")))
            os.utime(source / "a.bin", ns=(0, 7))
        with staged(source, tmp_path / "local", report=quiet) as new:
            assert new != old
            assert content(new) == content(source) != before
            assert content(old) == before
    assert copies(tmp_path / "local") == [new.parent]


def test_an_unused_outdated_copy_goes_when_the_new_one_comes(source, tmp_path):
    with staged(source, tmp_path / "local", report=quiet):
        pass
    (source / "more").touch()
    with staged(source, tmp_path / "local", report=quiet) as new:
        assert copies(tmp_path / "local") == [new.parent]


def test_a_glimpse_ends_somewhere_but_a_touched_folder_is_seen(source, monkeypatch):
    monkeypatch.setattr(stage, "_LOOKED_AT", 5)  # a.bin, no files, train and its two; not what is in zebra
    before = stage._glimpse(source)
    deep = source / "train" / "zebra" / "ünïcode.jpg"
    deep.write_bytes(b"changed in place")
    assert stage._glimpse(source) == before
    os.utime(source)
    assert stage._glimpse(source) != before


def test_a_source_that_changes_meanwhile_is_an_error(source, tmp_path, monkeypatch):
    pour = copying.Copying.pour
    monkeypatch.setattr(copying.Copying, "pour", lambda *a: [pour(*a), (source / "more").touch()])
    refused("changes while it was copied", source, tmp_path / "local")


# -- damage -----------------------------------------------------------------------------


def test_a_tar_cut_anywhere_is_an_error(source, tmp_path):
    """Also between two members, where tarfile sees a short but proper archive."""
    whole = pack(source, tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        tar.getmembers()
        end = tar.offset  # where the end marker begins
    assert whole[end:].strip(b"\0") == b""
    for cut in [*range(0, end, 256), end, end + 511]:
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        refused("expected a complete copy of .*cut.tar", tmp_path / "cut.tar", tmp_path / "local")
    (tmp_path / "cut.tar").write_bytes(whole[: end + 512])
    with staged(tmp_path / "cut.tar", tmp_path / "local", report=quiet) as data:
        assert content(data) == content(source)


@pytest.mark.parametrize("name", ["a.tgz", "a.zip"])
@pytest.mark.parametrize("damage", ["no end", "half", "nothing", "one bit"])
def test_a_damaged_compressed_archive_is_an_error(source, tmp_path, name, damage):
    archive = pack(source, tmp_path / name)
    whole = archive.read_bytes()
    middle = len(whole) // 2
    other = bytes([whole[middle] ^ 1])
    changed = {"no end": whole[:-3], "half": whole[:middle], "nothing": b""}
    archive.write_bytes(changed.get(damage, whole[:middle] + other + whole[middle + 1 :]))
    refused(f"complete copy of .*{name} on node", archive, tmp_path / "local")


def test_a_file_that_comes_short_is_named(source, tmp_path, monkeypatch):
    """While it is read, and if it is short on the disk all the same."""
    with monkeypatch.context() as patch:
        patch.setattr(copying.Copying, "need", lambda *_: os.truncate(source / "a.bin", 2999))
        refused("2,999 bytes of 3,000 in a.bin", source, tmp_path / "local")
    monkeypatch.setattr(copying.Copying, "pour", lambda self, stream, name, size: (self.target / name).touch())
    refused(r"0 instead of .* bytes in the copy of", source, tmp_path / "local")


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "/tmp/evil"},
        {"name": "../evil"},
        {"name": "inside/../../evil"},
        {"name": "evil", "type": tarfile.SYMTYPE, "linkname": "../../../../.."},
        {"name": "evil", "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"name": "evil", "type": tarfile.LNKTYPE, "linkname": "../../../../secret"},
        {"name": "evil", "type": tarfile.FIFOTYPE},
    ],
    ids=lambda fields: "-".join(str(value) for value in fields.values()),
)
def test_an_evil_tar_is_refused(tmp_path, fields):
    (tmp_path / "secret").write_text("secret")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "good", b"good")
        add(tar, **fields)
    refused("expected members that stay inside", tmp_path / "a.tar", tmp_path / "l")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "l", "secret"]
    assert not Path("/tmp/evil").exists()


@pytest.mark.parametrize("evil", ["x/evil", None])
def test_links_that_lead_out_together_are_refused(tmp_path, evil):
    """Each is fine when it comes: ``x`` would be ``1``, until ``1/2/3`` is the top. With a file behind, and without."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x", type=tarfile.SYMTYPE, linkname="1/2/3/../..")
        add(tar, "1/2/3", type=tarfile.SYMTYPE, linkname="../..")
        if evil:
            add(tar, evil, b"evil")
    refused("expected members that stay inside", tmp_path / "a.tar", tmp_path / "l")
    assert not list(tmp_path.rglob("evil"))


def _too_long_to_resolve(tar, up):
    """Links whose resolved path is longer than the system takes, so that it is not resolved; then ``up`` from there."""
    steps, folder, inside = "abcdefghijklmnop", "d" * 247, ""
    for step in steps:
        add(tar, f"{inside}{folder}", type=tarfile.DIRTYPE)
        add(tar, f"{inside}{step}", type=tarfile.SYMTYPE, linkname=folder)
        inside += f"{folder}/"
    far = "/".join(steps) + "/" + "l" * 254
    add(tar, far, type=tarfile.SYMTYPE, linkname="../" * len(steps))
    add(tar, "escape", type=tarfile.SYMTYPE, linkname=f"{far}/{up}")


ESCAPES = {
    "a file": lambda tar: add(tar, "escape/evil", b"evil"),
    "a hard link": lambda tar: (
        add(tar, "door", type=tarfile.LNKTYPE, linkname="escape/secret"),
        add(tar, "door", b"x"),
    ),
    "nothing more": lambda tar: None,
}


@pytest.mark.parametrize("then", ESCAPES)
def test_links_that_are_too_long_to_resolve_lead_nowhere(tmp_path, then):
    (tmp_path / "secret").write_text("secret")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        _too_long_to_resolve(tar, "../../../..")
        ESCAPES[then](tar)
    refused("expected members that stay inside", tmp_path / "a.tar", tmp_path / "l")
    assert (tmp_path / "secret").read_text() == "secret"
    assert not list(tmp_path.rglob("evil"))


def test_links_in_a_circle_are_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "a", type=tarfile.SYMTYPE, linkname="b")
        add(tar, "b", type=tarfile.SYMTYPE, linkname="a")
    refused("the link [ab]", tmp_path / "a.tar", tmp_path / "l")


@pytest.mark.parametrize("through", ["door/x", "door"])
def test_nothing_is_written_through_a_link_not_even_inside(tmp_path, through):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "room", type=tarfile.DIRTYPE)
        add(tar, "door", type=tarfile.SYMTYPE, linkname="room")
        add(tar, "door/x", b"x") if through == "door/x" else add(tar, "door", type=tarfile.DIRTYPE)
    refused("through the link door to", tmp_path / "a.tar", tmp_path / "l")


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_a_damaged_archive_is_a_sentence_wherever_it_is_damaged(tmp_path, kind):
    path, draw = tmp_path / f"a.{kind}", random.Random(0)
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for number in range(4):
                archive.writestr(f"folder/{number}", bytes(100))
    else:
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as tar:
            for number in range(4):
                add(tar, f"folder/{number}", bytes(100))
    whole = path.read_bytes()
    for number in range(80):
        content = bytearray(whole)
        for _ in range(draw.randrange(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content if number % 4 else content[: draw.randrange(len(content))])
        with suppress(UserError), staged(path, tmp_path / "l", keep_hours=0):
            pass
        assert copies(tmp_path / "l") == []


@pytest.mark.parametrize("name", ["/tmp/evil", "../evil", "a link"])
def test_an_evil_zip_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        member = zipfile.ZipInfo(name)
        member.external_attr = 0o120777 << 16 if name == "a link" else 0o644 << 16
        file.writestr(member, "/etc/passwd")
    refused("expected members that stay inside", tmp_path / "a.zip", tmp_path / "l")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "l"]


@pytest.mark.parametrize("wrong", ["missing", "no archive", "a file in the way", "local inside"])
def test_what_cannot_be_is_one_sentence(source, tmp_path, wrong):
    (tmp_path / "file").write_text("no folder")
    arguments = {
        "missing": (tmp_path / "missing.tar", tmp_path / "local"),
        "no archive": (source / "a.bin", tmp_path / "local"),
        "a file in the way": (source, tmp_path / "file"),
        "local inside": (source, source / "local"),
    }
    with (
        pytest.raises(UserError, match=r"^expected [^\n]*, got [^\n]*; [^\n]*\.$") as caught,
        staged(*arguments[wrong]),
    ):
        pass
    assert wrong in ("no archive", "local inside") or f"on node {socket.gethostname()}" in str(caught.value)
    assert not (source / "local").exists()


# -- space ------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """A disk of 130 kB, counted in whole blocks."""
    local = tmp_path / "local"

    def usage(_path):
        used = sum(-(-path.stat().st_size // 4096) * 4096 for path in local.rglob("data/**/*") if path.is_file())
        return SimpleNamespace(free=130_000 - used)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return local


def test_the_copies_that_are_unused_longest_make_space(tmp_path, disk):
    """Three fill the disk; of two unused ones the one used earlier goes first."""
    sources = {name: make_source(tmp_path / name, 7_000) for name in ("first", "second", "used", "new")}
    lines = []
    for name in ("first", "used", "second"):
        with staged(sources[name], disk, report=quiet) as data:
            assert content(data) == content(sources[name])
    with staged(sources["used"], disk, report=quiet) as used, staged(sources["new"], disk, report=lines.append):
        names = {path.name.split("-")[0] for path in copies(disk)}
        assert names == {"second", "used", "new"}
        assert content(used) == content(sources["used"])
    assert sum("to make space" in line for line in lines) == 1


def test_copies_in_use_do_not_make_space(tmp_path, disk):
    used, new = make_source(tmp_path / "used", 15_000), make_source(tmp_path / "new", 15_000)
    with staged(used, disk, report=quiet) as data:
        with pytest.raises(UserError, match=r"expected 0\.\d MB free for .*new") as caught:  # noqa: SIM117
            with staged(new, disk, report=quiet):
                pass
        assert caught.value.kind == "disk"
        assert f"on node {socket.gethostname()}, got" in str(caught.value)
        assert content(data) == content(used)
        assert copies(disk) == [data.parent]


@pytest.mark.parametrize("name", ["folder", "a.tar", "a.tgz", "a.zip"])
def test_a_full_disk(tmp_path, name):
    """A real one, of 4 MB; how much a .tgz needs is seen only on the way."""
    source = tmp_path / "folder"
    source.mkdir()
    for number in range(6):
        (source / f"{number}.bin").write_bytes(b"\0" * 1_000_000)
    source = source if name == "folder" else pack(source, tmp_path / name)
    local = tmp_path / "small"
    local.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", local], check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        with pytest.raises(UserError, match="expected .* free for .*, got .*"), staged(source, local, report=quiet):
            pass
        assert copies(local) == []
        with pytest.MonkeyPatch.context() as patch:  # the disk fills up after it has been looked at
            patch.setattr(copying.Copying, "need", lambda self, size: None)
            with pytest.raises(UserError, match="got a full disk"), staged(source, local, report=quiet):
                pass
        assert copies(local) == []
    finally:
        subprocess.run(["umount", local], check=True)


# -- leaving ----------------------------------------------------------------------------


def test_without_keeping_the_last_user_takes_the_copy_along(source, tmp_path):
    with staged(source, tmp_path / "l", 0, quiet) as data:
        with staged(source, tmp_path / "l", 0, quiet):
            pass
        with child("use()", source, tmp_path / "l", 0) as other:
            until(other, "using")
            other.communicate("\n")
        assert content(data) == content(source)
    assert copies(tmp_path / "l") == []


def test_leaving_while_another_process_cleans_up(source, tmp_path):
    """It has just seen that the copy is used, and will not look again."""
    clean = """
sys.stdin.readline()
(entry,) = (local / "staged").iterdir()
with stage._try_lock(entry):
    assert stage._is_used(entry)
    say("seen")
    time.sleep(0.3)
"""
    with child(clean, source, tmp_path / "l") as other:
        with staged(source, tmp_path / "l", 0, quiet):
            print(file=other.stdin, flush=True)
            until(other, "seen")
        assert copies(tmp_path / "l") == []


def test_an_unused_copy_stays_for_its_own_time(source, tmp_path):
    """Whatever the one who cleans up asks for."""
    other = make_source(tmp_path / "other")
    with staged(source, tmp_path / "l", 2.0, quiet) as data:
        pass
    for hours, there in [(1.9, True), (2.1, False)]:
        said = json.loads((data.parent / "copy.json").read_text())
        (data.parent / "copy.json").write_text(json.dumps(said | {"used": time.time() - 3600 * hours}))
        with staged(other, tmp_path / "l", 0, quiet):
            assert data.exists() == there


def test_an_old_copy_is_still_good_for_a_new_user(source, tmp_path):
    with staged(source, tmp_path / "l", 0, quiet) as data:
        kept = tmp_path / "kept"
        shutil.copytree(data.parent, kept, ignore=shutil.ignore_patterns("users"))
    shutil.move(kept, data.parent)
    lines = []
    with staged(source, tmp_path / "l", 0, lines.append):
        assert "reused" in lines[0]


def test_a_copy_in_use_is_not_deleted(source, tmp_path):
    """Old, outdated, in the way: its user lives, here or in a container with process ids of its own."""
    apart = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
    can = not os.getuid() and not subprocess.run([*apart, "true"], check=False, stderr=subprocess.DEVNULL).returncode
    if not can:
        print("process ids of their own cannot be made here; looked at without")
    with child("use()", source, tmp_path / "l", 0, before=apart if can else ()) as user:
        until(user, "using")
        (entry,) = copies(tmp_path / "l")
        before = content(source)
        (source / "more").touch()
        with staged(source, tmp_path / "l", 0, quiet):
            with stage._try_lock(entry):
                assert not stage._remove_if_due(entry, space_needed=True)
            assert content(entry / "data") == before
        assert copies(tmp_path / "l") == [entry]
        user.communicate("\n")
    assert copies(tmp_path / "l") == []


def test_a_killed_user_counts_as_leaving_when_it_is_found(source, tmp_path):
    """Its copy stays for its time from then on, and goes at once if that is none."""
    other = make_source(tmp_path / "other")
    for keep in (1.0, 0.0):
        with child("use()", source, tmp_path / "l", keep) as user:
            until(user, "using")
            (entry,) = (path for path in copies(tmp_path / "l") if path.name.startswith("data"))
            said = json.loads((entry / "copy.json").read_text())
            (entry / "copy.json").write_text(json.dumps(said | {"used": time.time() - 7200}))
            user.send_signal(signal.SIGKILL)
            user.wait()
        with staged(other, tmp_path / "l", 0, quiet):
            assert entry.exists() == (keep > 0)


def test_a_loader_worker_that_outlives_its_parent_still_uses_the_copy(source, tmp_path):
    fork = """
with stage.staged(source, local, keep, say):
    if not (worker := os.fork()):
        time.sleep(60)
    say(f"worker {worker}")
    time.sleep(60)
"""
    other = make_source(tmp_path / "other")
    with child(fork, source, tmp_path / "l", 0) as user:
        worker = int(until(user, "worker")[-1].split()[1])
        try:
            user.kill()
            user.wait()
            (entry,) = copies(tmp_path / "l")
            with staged(other, tmp_path / "l", 0, quiet):
                assert content(entry / "data") == content(source)
        finally:
            os.kill(worker, signal.SIGKILL)
    with staged(other, tmp_path / "l", 0, quiet):
        assert not entry.exists()


def test_a_copy_from_before_the_node_was_started_is_made_again(source, tmp_path):
    with staged(source, tmp_path / "l", report=quiet) as data:
        pass
    (data / "a.bin").write_bytes(b"")  # what a power cut makes of a file that was not flushed
    said = json.loads((data.parent / "copy.json").read_text())
    (data.parent / "copy.json").write_text(json.dumps(said | {"boot": "another"}))
    with staged(source, tmp_path / "l", report=quiet) as again:
        assert again == data
        assert content(again) == content(source)


def test_an_error_in_the_body_passes_and_the_copy_is_left(source, tmp_path):
    with pytest.raises(KeyboardInterrupt), staged(source, tmp_path / "l", 0, quiet):
        raise KeyboardInterrupt
    assert copies(tmp_path / "l") == []


def test_a_copy_that_somebody_took_away_stops_nobody_from_leaving(source, tmp_path):
    with staged(source, tmp_path / "l", report=quiet):
        shutil.rmtree(tmp_path / "l")
    assert not (tmp_path / "l" / "staged").exists()
