"""The data of a job's runs on the node's own disk, if the profile wants them there."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from runfolder.folder import RunFolder, typed
from runfolder.plain_yaml import read_yaml
from slurm.profile import Cluster
from slurm.stage import staged


class Copies(dict[RunFolder, Path]):
    """Where the data of each run are on this node.

    Args:
        cluster: the profile.
        cwd: the folder that relative paths start from.
        report: gets a line per copy.
    """

    def __init__(self, cluster: Cluster, cwd: str, report: Callable[[str], None]):
        super().__init__()
        self._cluster, self._cwd, self._report = cluster, cwd, report

    def make(self, folders: list[RunFolder], held: ExitStack) -> None:
        """Copy what these runs read, once; the copies are kept in use until ``held`` ends.

        Raises:
            UserError: that cannot be done here.
        """
        if self._cluster.stage_to is None:
            return
        made: dict[Path, Path] = {}
        for folder in folders:
            source = self._source(folder)
            if source is None:
                continue
            if source not in made:
                copy = staged(source, _expanded(self._cluster.stage_to), self._cluster.stage_keep_hours, self._report)
                made[source] = held.enter_context(copy)
            self[folder] = made[source]

    def _source(self, folder: RunFolder) -> Path | None:
        """What to copy for a run; small data sets in ``data_dir`` are read once and stay where they are."""
        if self._cluster.stage_from is not None:
            return _expanded(self._cluster.stage_from)
        try:
            config = read_yaml(folder.config)
            root, data_dir = config["data"].get("root"), config["runtime"]["data_dir"]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # the run itself will say what is wrong
        return None if root is None or root == data_dir else Path(self._cwd, root)


def _expanded(text: str) -> Path:
    return typed(os.path.expandvars(text))
