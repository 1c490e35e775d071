"""A copy of the code that jobs run from, so that editing on does not change what is queued."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from experiments.training.provenance import SNAPSHOT, GitError, code_of, listed
from runfolder.errors import UserError
from runfolder.files import TEMPORARY, write_json

ROOT = Path(__file__).resolve().parents[1]
PATCH = "snapshot.patch"
_LARGE = 5 * 2**20  # bytes of an untracked file that is hardly code
_NEVER = ("runs", "data")
_PACKAGES = ("runfolder", "tract", "experiments", "slurm", "analysis")
_BESIDE = ("*.txt", "*.toml", "*.yml", "*.md")


def take(target: Path, root: Path = ROOT, skip: Iterable[Path] = ()) -> dict:
    """Copy the working tree, uncommitted changes and new files included; the copy is whole or not there.

    Args:
        target: the folder to make; it holds ``snapshot.json`` and, where there are uncommitted changes,
            ``snapshot.patch`` as well. A run that is started in it finds its provenance there.
        root: the checkout, or a folder with the packages where there is no git.
        skip: folders below ``root`` whose untracked files are not code, such as that of the runs.

    Returns:
        The content of ``snapshot.json``: commit, dirty, unknown, untracked, diff, left_out.

    Raises:
        UserError: the target exists or cannot be written.
    """
    if target.exists():
        raise UserError(f"expected a new folder for the copy of the code, got {target}, which exists; remove it.")
    root = root.resolve()
    code = code_of(root)
    names, left_out = _names(root, [target, *skip])
    record = {
        "commit": code.commit,
        "dirty": code.dirty,
        "unknown": code.unknown,
        "untracked": code.untracked,
        "diff": PATCH if code.patch else None,
        "left_out": left_out,
    }
    temporary = target.with_name(f"{target.name}.{os.getpid()}{TEMPORARY}")
    try:
        temporary.mkdir(parents=True)
        for name in names:
            _copy(root, name, temporary)
        if code.patch:
            (temporary / PATCH).write_bytes(code.patch)
        write_json(temporary / SNAPSHOT, record)
        temporary.rename(target)
    except OSError as error:
        raise UserError(f"expected to copy the code to {target}, got: {error.strerror}; free or choose disk.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # there only if something went wrong
    return record


def _names(root: Path, skip: list[Path]) -> tuple[list[str], list[str]]:
    """The files to copy, relative to the root, and what is left out."""
    try:
        tracked = listed(root, "--cached")
        untracked = listed(root, "--others", "--exclude-standard") if tracked else []
    except GitError:
        tracked = []
    if not tracked:
        return sorted(_packages(root)), []
    barred = [path.resolve() for path in skip]
    names, left_out = set(tracked), []
    for name in untracked:
        path = root / name
        if any(path.parent.resolve().is_relative_to(folder) for folder in barred):
            continue
        if name.endswith("/") or (not path.is_symlink() and path.exists() and path.stat().st_size > _LARGE):
            left_out.append(name)  # a repository of its own, or data
        else:
            names.add(name)
    return sorted(name for name in names if name.split("/")[0] not in _NEVER), sorted(left_out)


def _packages(root: Path) -> Iterator[str]:
    """The code's files where git cannot list them."""
    inside = (path for package in _PACKAGES for path in (root / package).rglob("*"))
    beside = (path for pattern in _BESIDE for path in root.glob(pattern))
    for path in (*inside, *beside):
        if (path.is_symlink() or path.is_file()) and "__pycache__" not in path.parts:
            yield str(path.relative_to(root))


def _copy(root: Path, name: str, copy: Path) -> None:
    source, target = root / name, copy / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        aim = Path(os.path.normpath(source.parent / os.readlink(source)))
        # Inside the tree a link leads to the copy, outside to where it led before.
        target.symlink_to(os.path.relpath(aim, source.parent) if aim.is_relative_to(root) else aim)
    elif source.is_file():  # neither deleted in the working tree nor another repository
        shutil.copy2(source, target)
