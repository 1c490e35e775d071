"""What submitit pickles: a job of a submission, by the submission's folder and its place in it.

All else it reads when it begins, from the submission and from its own copy of the code.
"""

from __future__ import annotations

import sys
from pathlib import Path

from runfolder.place import place_of_this_rank, slurm_start
from slurm.notices import Notices
from slurm.submission import Submission
from slurm.supervisor import PATIENCE, Place, Supervisor


class Job:
    """One job.

    Args:
        submission: the submission's folder.
        part: which of its job arrays.
        index: which element of it.
    """

    def __init__(self, submission: str, part: int, index: int):
        self.submission, self.part, self.index = submission, part, index

    def __call__(self) -> None:
        """Train the runs of this job; ends the process with the exit code."""
        with Notices() as notices:
            submission, place = Submission.read(Path(self.submission)), Place(slurm_start(), *place_of_this_rank()[:2])
            settings = {"patience_seconds": PATIENCE} | ({"on_term": "save"} if place.job_start else {})
            supervisor = Supervisor(
                submission, self.part, self.index, notices, place, submission.code, settings=settings
            )
            sys.exit(supervisor.run())
