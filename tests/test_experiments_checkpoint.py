import errno
import os
from pathlib import Path

import pytest
import torch

from experiments.training.checkpoint import FORMAT, CheckpointError, Keeper, load, newest_good, weights_digest
from runfolder import files
from runfolder.errors import UserError
from runfolder.files import write_atomically
from runfolder.folder import newest_first

HASH = "0123abcd"


def newest(checkpoints):
    return newest_first(checkpoints)[0]


def _content(step):
    return {"model": {"weight": torch.full((40,), float(step))}, "list": [1, 2.5, "a", None]}


def _saved(folder, steps=(1, 2), keep=5):
    keeper = Keeper(folder, HASH, keep)
    return [keeper.save(step, _content(step)) for step in steps]


def _named(folder, data, step=2):
    """Any bytes under a name whose checksum is right."""
    import hashlib

    path = folder / f"step-{step:08d}-{hashlib.sha256(data).hexdigest()[:16]}.pt"
    path.write_bytes(data)
    return path


def test_what_is_saved_is_loaded(tmp_path):
    path = _saved(tmp_path / "checkpoints")[-1]
    content = load(path, HASH)
    assert content["step"] == 2
    assert torch.equal(content["model"]["weight"], _content(2)["model"]["weight"])
    assert content["list"] == _content(2)["list"]
    assert newest(path.parent) == newest_good(path.parent, HASH, pytest.fail) == path


def _cut(share):
    return lambda data: data[: int(len(data) * share)]


def _flipped(share):
    def flip(data):
        place = min(int(len(data) * share), len(data) - 1)
        return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]

    return flip


DAMAGE = {f"cut to {share:.1%}": _cut(share) for share in (0, 0.001, 0.3, 0.5, 0.9, 0.999)}
DAMAGE |= {f"a bit flipped at {share:.0%}": _flipped(share) for share in (0, 0.1, 0.35, 0.5, 0.75, 1)}
DAMAGE |= {
    "one byte less": lambda data: data[:-1],
    "one byte more": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "a page of zeros": lambda data: data[:512] + bytes(512) + data[1024:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage, tmp_path):
    good, bad = _saved(tmp_path)
    data = bad.read_bytes()
    changed = DAMAGE[damage](data)
    assert changed != data
    bad.write_bytes(changed)
    said = []
    assert newest_good(tmp_path, HASH, said.append) == good
    assert len(said) == 1
    assert str(bad) in said[0]
    with pytest.raises(CheckpointError):
        load(bad, HASH)


class _Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def _bytes_of(content):
    import io

    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _wrong(folder, kind):
    whole = {"format": FORMAT, "config_hash": HASH, "step": 2}
    if kind == "of another configuration":
        return Keeper(folder, "ffffffff", 5, newest(folder)).save(2, _content(2))
    if kind == "with a wrong name":
        path = Keeper(folder, HASH, 5, newest(folder)).save(2, _content(2))
        return path.rename(folder / f"step-00000002-{'0' * 16}.pt")
    contents = {
        "no torch file": b"some text",
        "a tensor": _bytes_of(torch.zeros(3)),
        "of another format": _bytes_of(whole | {"format": FORMAT + 1}),
        "without a format": _bytes_of({"config_hash": HASH}),
        "a harmful pickle": _bytes_of(whole | {"model": _Harmful(folder.parent / "harm")}),
    }
    return _named(folder, contents[kind])


KINDS = ["of another configuration", "with a wrong name", "no torch file", "a tensor", "of another format"]
KINDS += ["without a format", "a harmful pickle"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_checkpoint_is_named_and_never_run(kind, tmp_path):
    folder = tmp_path / "checkpoints"
    (good,) = _saved(folder, [1])
    bad = _wrong(folder, kind)
    said = []
    assert newest_good(folder, HASH, said.append) == good
    assert len(said) == 1
    assert str(bad) in said[0]
    assert "\n" not in said[0]
    assert not (tmp_path / "harm").exists()


def test_the_harmful_pickle_would_do_harm(tmp_path):
    path = _named(tmp_path, _bytes_of(_Harmful(tmp_path / "harm")))
    torch.load(path, weights_only=False)
    assert (tmp_path / "harm").is_dir()


def test_without_any_good_checkpoint_there_is_none(tmp_path):
    for path in _saved(tmp_path):
        path.write_bytes(b"")
    said = []
    assert newest_good(tmp_path, HASH, said.append) is None
    assert len(said) == 2
    assert newest_good(tmp_path / "missing", HASH, pytest.fail) is None


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_last_k_are_kept(keep, tmp_path):
    paths = _saved(tmp_path, [9, 10, 20_000_000, 100_000_000, 100_000_001], keep)
    assert sorted(tmp_path.iterdir()) == sorted(paths[-keep:])
    assert newest(tmp_path) == paths[-1]


def test_only_what_is_known_is_deleted(tmp_path):
    """A process that was superseded deletes nothing of the newer one's."""
    old = Keeper(tmp_path, HASH, 1)
    mine = old.save(3, _content(3))
    (its,) = _saved(tmp_path, [1])
    later = old.save(4, _content(4))
    assert sorted(tmp_path.iterdir()) == sorted([its, later])
    assert not mine.exists()


def test_checkpoints_that_were_passed_over_go_with_the_first_save(tmp_path):
    start, bad = _saved(tmp_path, [1, 9])
    keeper = Keeper(tmp_path, HASH, 2, start)
    assert bad.exists()
    new = keeper.save(2, _content(2))
    assert sorted(tmp_path.iterdir()) == sorted([start, new])


def test_the_same_checkpoint_written_again_stays(tmp_path):
    start, bad = _saved(tmp_path, [1, 2])
    keeper = Keeper(tmp_path, HASH, 2, start)
    assert keeper.save(2, _content(2)) == bad
    assert sorted(tmp_path.iterdir()) == sorted([start, bad])


def test_leftovers_of_a_killed_process_are_harmless_and_removed(tmp_path):
    (path,) = _saved(tmp_path, [1])
    leftover = tmp_path / f"step-00000002-{'0' * 16}.pt.123.tmp"
    leftover.write_bytes(b"half a file")
    assert newest(tmp_path) == path
    assert newest_good(tmp_path, HASH, pytest.fail) == path
    assert list(tmp_path.iterdir()) == [path]


def test_the_digest_tells_names_shapes_types_and_bytes_apart():
    class Weights(torch.nn.Module):
        def __init__(self, **tensors):
            super().__init__()
            for name, tensor in tensors.items():
                self.register_buffer(name, tensor)

    zeros = torch.zeros(2, 3)
    variants = [{"a": zeros}, {"b": zeros}, {"a": zeros.T}, {"a": zeros.int()}, {"a": -zeros}, {"a": zeros, "b": zeros}]
    assert len({weights_digest(Weights(**variant)) for variant in variants}) == len(variants)
    strided = torch.zeros(3, 2).T
    assert weights_digest(Weights(a=strided)) == weights_digest(Weights(a=zeros))


# -- whole files or none ------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_content(call, tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    files.remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_content_is_on_disk_before_the_name_and_the_folder_after(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    kind = lambda number: "folder" if Path(f"/proc/self/fd/{number}").is_dir() else "file"  # noqa: E731
    monkeypatch.setattr(files.os, "fsync", lambda number: [calls.append(kind(number)), fsync(number)])
    monkeypatch.setattr(files.os, "replace", lambda *names: [calls.append("rename"), replace(*names)])
    write_atomically(tmp_path / "file", b"content")
    assert calls == ["file", "rename", "folder"]


def test_a_failed_save_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    (good,) = _saved(tmp_path, [1])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        Keeper(tmp_path, HASH, 1, good).save(2, _content(2))
    assert newest_good(tmp_path, HASH, pytest.fail) == good


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, "node"), (errno.ESTALE, "node"), (errno.EACCES, "disk")])
def test_a_checkpoint_that_cannot_be_read_just_now_is_not_damaged(number, kind, tmp_path, monkeypatch):
    """Nothing is passed over, and so nothing deleted: it may be as good as ever."""
    paths = _saved(tmp_path)
    real = Path.read_bytes

    def fails(path):
        if path == paths[-1]:
            raise OSError(number, os.strerror(number), str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", fails)
    with pytest.raises(UserError, match=f"expected to read {paths[-1]}, got: .*nothing has been deleted") as refused:
        newest_good(tmp_path, HASH, pytest.fail)
    assert refused.value.kind == kind
    monkeypatch.undo()
    assert newest_good(tmp_path, HASH, pytest.fail) == paths[-1]


def test_a_checkpoint_that_has_just_gone_is_passed_over(tmp_path, monkeypatch):
    paths, said = _saved(tmp_path), []
    real = Path.read_bytes

    def goes(path):
        if path == paths[-1]:
            path.unlink()
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", goes)
    assert newest_good(tmp_path, HASH, said.append) == paths[0]
    assert "is gone" in said[0]
