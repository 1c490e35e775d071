"""What a submission is: the content of ``submission.json`` and the files beside it.

``RUNS/EXPERIMENT/slurm/SUBMISSION/`` is written once by whoever claims runs, and read by what
trains them, shows them and submits them again.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from runfolder.errors import UserError
from runfolder.files import read_json, write_json
from runfolder.folder import RunFolder
from slurm.profile import Cluster, from_tree, to_tree

FILE = "submission.json"


@dataclass(frozen=True)
class JobArray:
    """Jobs of one shape, each with the names of its runs."""

    job_name: str
    side_by_side: int  # runs of one job at a time
    jobs: list[list[str]]


@dataclass(frozen=True)
class Submission:
    """Who is to train which runs, and how."""

    folder: Path
    experiment: str
    cluster: Cluster
    cwd: str  # that every command of it is run in
    parts: list[JobArray]
    command: str = ""  # that a person typed
    created: str = ""

    @property
    def name(self) -> str:
        """What claims call it."""
        return self.folder.name

    @property
    def code(self) -> Path:
        """The copy of the code that its jobs run."""
        return self.folder / "code"

    @property
    def jobs(self) -> Path:
        """What submitit writes: pickles, batch scripts and the jobs' logs."""
        return self.folder / "jobs"

    def sign_of_life(self, job: str, restart: int) -> Path:
        """A file that the process of a job makes when it begins, for the batch script."""
        return self.folder / "started" / f"{job}-{restart}"

    def excluded_nodes(self, job: str) -> Path:
        """The nodes that a job found faulty, one a line, for the batch script."""
        return self.folder / f"exclude-{job}"

    def runs_of_ranks(self, job: str, restart: int) -> Path:
        """What the first rank of a job has chosen to train, for the other ranks."""
        return self.folder / "ranks" / f"{job}-{restart}.json"

    def runs_left_by(self, job: str, restart: int, rank: int | str) -> Path:
        """What a rank of a job leaves without having started it, for the other ranks; rank "*" for a pattern."""
        return self.folder / "ranks" / f"{job}-{restart}-left-{rank}.json"

    def runs(self, part: int, index: int) -> list[RunFolder]:
        """The runs of one job."""
        return [RunFolder(self.folder.parents[1] / name) for name in self.parts[part].jobs[index]]

    def write(self) -> None:
        """Write it into its folder."""
        content = {key: value for key, value in vars(self).items() if key != "folder"}
        written = {"cluster": to_tree(self.cluster), "parts": [asdict(part) for part in self.parts]}
        write_json(self.folder / FILE, content | written)

    @classmethod
    def read(cls, folder: Path) -> Submission:
        """The submission in a folder.

        Raises:
            UserError: there is none, or it cannot be read.
        """
        content = read_json(folder / FILE)
        if not content:
            raise UserError(f"expected a submission in {folder}, got a folder without {FILE}.")
        cluster, parts = from_tree(content["cluster"]), [JobArray(**part) for part in content["parts"]]
        return cls(folder, **content | {"cluster": cluster, "parts": parts})


@contextmanager
def closed_to_writers() -> Iterator[None]:
    """What is made meanwhile only its owner can write, whatever the umask: jobs execute it."""
    before = os.umask(0)
    os.umask(before | 0o022)
    try:
        yield
    finally:
        os.umask(before)


def make_folder(submissions: Path, experiment: str) -> Path:
    """A new folder for a submission.

    Raises:
        UserError: it cannot be made.
    """
    while True:
        folder = submissions / f"{experiment}-{time.strftime('%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        try:
            submissions.mkdir(parents=True, exist_ok=True)
            folder.mkdir(0o755)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"expected a folder that can be written, got {submissions}: {error.strerror}.") from None
