"""The folder of the run that this process trains: taken, kept and given back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from experiments.config import Config, folder_of, prepare_folder
from experiments.ranks import Ranks
from runfolder.errors import SupersededError, UserError
from runfolder.failures import FailureKind, keep_room
from runfolder.files import write_json
from runfolder.folder import RunFolder
from runfolder.lease import Heartbeat, Lease, is_held, take
from runfolder.records import Result, read_result


class HeldFolder:
    """What the first rank does for all: it takes the run's folder, keeps it, and writes into it.

    A context manager: leaving it gives the folder back.

    Args:
        config: the run.
        abandon: called (in another thread) with the reason when another process has taken the run.
    """

    def __init__(self, config: Config, abandon: Callable[[str], None]):
        self.folder = folder_of(config)
        self.tell_progress: Callable[[], None] = lambda: None  # called at every heartbeat
        self._config, self._abandon = config, abandon
        self._lease: Lease | None = None
        self._is_taken = False
        self._stack = ExitStack()

    def __enter__(self) -> HeldFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)

    def take(self, ranks: Ranks) -> Result | None:
        """Take the folder for all ranks; the result if another process has finished the run meanwhile.

        Raises:
            UserError: the folder cannot be written.
            RunBusyError: another process trains this run.
        """
        finished = ranks.agree(self._take)
        self._is_taken = True
        return finished

    def _take(self) -> Result | None:
        folder, runtime = self.folder, self._config.runtime
        is_new = not folder.path.exists()
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"expected a folder that can be written, got {folder}: {error.strerror}.", FailureKind.disk
            ) from None
        self._stack.enter_context(_removed_if_unusable(folder, is_new))
        self._lease = take(folder, runtime.heartbeat_seconds, runtime.patience_seconds)
        self._stack.callback(self._lease.release)
        self._stack.enter_context(
            Heartbeat(self._lease, runtime.heartbeat_seconds, lambda: self.tell_progress(), self._abandon)
        )
        finished = read_result(folder)
        if finished is None:
            folder.failure.unlink(missing_ok=True)
            keep_room(folder)
            prepare_folder(self._config)
        return finished

    def check(self) -> None:
        """Before everything that is written.

        Raises:
            SupersededError: a newer process has taken the run.
        """
        if self._lease is not None:  # of the first rank
            self._lease.check()

    def may_write(self) -> bool:
        """Whether no other process has the run; other ranks than the first cannot tell a newer one."""
        if not self._is_taken:
            return not is_held(self.folder)
        try:
            if self._lease is not None:
                self._lease.check()
        except SupersededError:
            return False
        except OSError:
            pass
        return True

    def write_result(self, result: Result) -> None:
        """Write ``result.json``, if the run is still ours."""
        self.check()
        write_json(self.folder.result, result)
        self.folder.room.unlink(missing_ok=True)


@contextmanager
def _removed_if_unusable(folder: RunFolder, is_new: bool) -> Iterator[None]:
    """A new folder goes again when bad input shows before anything was trained."""
    try:
        yield
    except UserError:
        if is_new and folder.newest_checkpoint() is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
