import json
import os
import shutil
import subprocess
import sys

import pytest

from experiments.training.provenance import code_of
from runfolder.errors import UserError
from slurm import snapshot
from slurm.snapshot import take
from tests.cases import TINY

ROOT = snapshot.ROOT


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def write(path, text, mode=0o644):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


@pytest.fixture
def checkout(tmp_path):
    """A repository like ours, with one commit and a clean working tree."""
    root = tmp_path / "checkout"
    write(root / ".gitignore", "/runs/\n__pycache__/\n")
    write(root / "tract" / "__init__.py", "version = 1\n")
    write(root / "tract" / "old.py", "")
    write(root / "start", "#!/bin/sh\n", 0o755)
    write(root / "README.md", "read\n")
    git(tmp_path, "init", "--quiet", str(root))
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "first")
    return root


def files(folder):
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() or p.is_symlink()}


def test_a_clean_checkout_is_copied_file_by_file(checkout, tmp_path):
    write(checkout / "runs" / "x" / "log.txt", "")
    write(checkout / "tract" / "__pycache__" / "a.pyc", "")
    target = tmp_path / "copy"
    record = take(target, checkout)
    assert files(target) == set(git(checkout, "ls-files").split()) | {"snapshot.json"}
    assert os.access(target / "start", os.X_OK)
    assert not os.access(target / "README.md", os.X_OK)
    head = git(checkout, "rev-parse", "HEAD")
    known = {"commit": head, "dirty": False, "unknown": None}
    assert record == known | {"untracked": [], "diff": None, "left_out": []}
    assert json.loads((target / "snapshot.json").read_text()) == record


def test_changes_are_in_the_copy_and_the_patch_makes_them_again(checkout, tmp_path):
    write(checkout / "tract" / "__init__.py", "version = 2\n")
    (checkout / "tract" / "old.py").unlink()
    write(checkout / "tract" / "nöw.py", "new = 1\n")
    target = tmp_path / "copy"
    record = take(target, checkout)
    assert (record["dirty"], record["untracked"], record["diff"]) == (True, ["tract/nöw.py"], "snapshot.patch")
    assert not (target / "tract" / "old.py").exists()
    # The other route: the commit, the patch and the new files give the same tree.
    again = tmp_path / "again"
    git(tmp_path, "clone", "--quiet", str(checkout), str(again))
    git(again, "apply", str(target / "snapshot.patch"))
    for name in record["untracked"]:
        shutil.copy(checkout / name, again / name)
    shutil.rmtree(again / ".git")
    assert files(target) - {"snapshot.json", "snapshot.patch"} == files(again)
    for name in files(again):
        assert (target / name).read_bytes() == (again / name).read_bytes()


def test_what_is_no_code_stays_behind(checkout, tmp_path):
    for name in ("data/a.py", "elsewhere/b.txt", "tract/small.bin", "tract/large.bin"):
        write(checkout / name, "")
    os.truncate(checkout / "tract" / "small.bin", 5 * 2**20)
    os.truncate(checkout / "tract" / "large.bin", 5 * 2**20 + 1)
    git(checkout, "init", "--quiet", str(checkout / "other"))
    write(checkout / "other" / "c.py", "")
    (checkout / "runs").symlink_to(tmp_path)  # a link is not what `/runs/` in .gitignore means
    target = checkout / "jobs" / "copy"
    record = take(target, checkout, skip=[checkout / "elsewhere"])
    assert record["left_out"] == ["other/", "tract/large.bin"]
    assert files(target) - set(git(checkout, "ls-files").split()) == {"snapshot.json", "tract/small.bin"}


def test_links_lead_to_the_copy_or_to_where_they_led(checkout, tmp_path):
    write(tmp_path / "shared" / "x.txt", "x")
    links = {
        "tract/relative.py": "__init__.py",
        "up.py": "tract/../tract/old.py",
        "tract/absolute.py": str(checkout / "tract" / "old.py"),
        "outside": "../shared",
        "broken": "nowhere",
    }
    for name, aim in links.items():
        (checkout / name).symlink_to(aim)
    target = tmp_path / "deeper" / "down" / "copy"
    take(target, checkout)
    assert os.readlink(target / "tract" / "relative.py") == "__init__.py"
    assert os.readlink(target / "broken") == "nowhere"
    for name in ("up.py", "tract/absolute.py"):
        assert (target / name).resolve() == target.resolve() / "tract" / "old.py"
    assert (target / "outside").resolve() == tmp_path / "shared"


def test_without_git_the_packages_are_copied(checkout, tmp_path):
    shutil.rmtree(checkout / ".git")
    write(checkout / "tract" / "__pycache__" / "a.pyc", "")
    write(checkout / "notes.odt", "")
    record = take(tmp_path / "copy", checkout)
    assert (record.pop("commit"), record.pop("dirty")) == (None, None)
    assert "not a git repository" in record.pop("unknown")
    assert record == {"untracked": [], "diff": None, "left_out": []}
    assert files(tmp_path / "copy") == {"README.md", "tract/__init__.py", "tract/old.py", "snapshot.json"}


def test_the_repository_around_an_ignored_folder_is_not_asked(checkout, tmp_path):
    inner = checkout / "runs" / "unpacked"
    write(inner / "tract" / "__init__.py", "version = 3\n")
    assert code_of(inner).commit is None
    take(tmp_path / "copy", inner)
    assert (tmp_path / "copy" / "tract" / "__init__.py").read_text() == "version = 3\n"


def test_a_copy_of_a_copy_is_of_the_same_commit(checkout):
    write(checkout / "tract" / "__init__.py", "version = 2\n")
    write(checkout / "tract" / "new.py", "")
    first, second = checkout / "runs" / "first", checkout / "runs" / "second"
    record = take(first, checkout)
    (checkout / "README.md").write_text("changed since\n")
    git(checkout, "commit", "--quiet", "--all", "-m", "second")
    assert code_of(first).commit == record["commit"] != code_of(checkout).commit
    assert take(second, first) == record
    assert code_of(second) == code_of(first)
    assert b"+version = 2" in code_of(second).patch


def test_a_copy_is_whole_or_not_there(checkout, tmp_path, monkeypatch):
    target = tmp_path / "copy"

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "write_json", full)
        with pytest.raises(UserError, match=r"expected to copy the code to .*copy, got: No space left on device"):
            take(target, checkout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkout"]
    take(target, checkout)
    with pytest.raises(UserError, match="which exists"):
        take(target, checkout)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"commit": null, "diff": "no.patch"}'])
def test_a_damaged_record_is_named(content, tmp_path):
    (tmp_path / "snapshot.json").write_text(content)
    with pytest.raises(UserError, match=r"snapshot.json what this copy of the code was made from"):
        code_of(tmp_path)


@pytest.fixture
def decoy(tmp_path):
    """An environment in which tract is installed elsewhere, as an editable install does."""
    write(tmp_path / "decoy" / "tract" / "__init__.py", "raise RuntimeError('the wrong tract')")
    return {**os.environ, "PYTHONPATH": str(tmp_path / "decoy"), "OMP_NUM_THREADS": "1"}


def test_a_run_from_a_copy_uses_and_records_the_copy(decoy, tmp_path):
    copy, runs = tmp_path / "copy", tmp_path / "runs"
    take(copy)
    record = {"commit": "c0ffee", "dirty": True, "untracked": ["new.py"], "diff": "snapshot.patch"}
    (copy / "snapshot.json").write_text(json.dumps(record))
    (copy / "snapshot.patch").write_text("a change\n")
    start = [sys.executable, str(copy / "experiments" / "quickstart.py"), f"runtime.runs={runs}", "max_steps=1"]
    words = [f"{key}={value}" for key, value in TINY.items()]
    assert subprocess.run([sys.executable, "-c", "import tract"], env=decoy, cwd=tmp_path).returncode == 1
    subprocess.run([*start, *words], env=decoy, cwd=tmp_path, check=True)
    (folder,) = (runs / "quickstart").iterdir()
    (attempt,) = json.loads((folder / "provenance.json").read_text())["attempts"]
    assert {key: attempt[key] for key in ("commit", "dirty", "untracked")} == {
        key: record[key] for key in ("commit", "dirty", "untracked")
    }
    assert (folder / attempt["diff"]).read_text() == "a change\n"


def test_a_module_of_a_copy_is_run_by_name(decoy, tmp_path):
    """As submitit starts it: python -m, in the copy."""
    copy = tmp_path / "copy"
    take(copy)
    where = [sys.executable, "-c", "import tract, experiments, slurm; print(tract.__file__)"]
    done = subprocess.run(where, env=decoy, cwd=copy, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(copy / "tract" / "__init__.py")


def _of_another_owner(monkeypatch):
    """As in a container: git's own variable for its tests."""
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")


def test_a_checkout_of_another_owner_is_asked_too(checkout, tmp_path, monkeypatch):
    head = git(checkout, "rev-parse", "HEAD")
    _of_another_owner(monkeypatch)
    assert subprocess.run(["git", "-C", checkout, "status"], capture_output=True, check=False).returncode != 0
    assert (code_of(checkout).commit, code_of(checkout).dirty) == (head, False)
    write(checkout / "tract" / "old.py", "edited = True\n")
    assert code_of(checkout).dirty is True
    record = take(tmp_path / "copy", checkout)
    assert (record["commit"], record["dirty"], record["diff"]) == (head, True, "snapshot.patch")


@pytest.mark.parametrize(
    ("program", "words"), [("#!/bin/sh\necho fatal: a fault >&2\nexit 128\n", "fatal: a fault"), (None, "git: No such")]
)
def test_unknown_is_not_clean(checkout, tmp_path, monkeypatch, program, words):
    (tmp_path / "bin").mkdir()
    if program is not None:
        write(tmp_path / "bin" / "git", program)
        (tmp_path / "bin" / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    code = code_of(checkout)
    assert (code.commit, code.dirty) == (None, None)
    assert code.unknown.startswith(words)
    record = take(tmp_path / "copy", checkout)
    assert code_of(tmp_path / "copy") == code
    assert record["unknown"] == code.unknown
