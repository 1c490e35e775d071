"""Real Slurm clusters for tests, see slurm/testbed.py; each is gone without a trace when its test is done.

from tests.slurm_cluster import cluster, make_cluster, needs_slurm  # noqa: F401

@needs_slurm
def test_something(cluster):  # noqa: F811
    cluster.run("sbatch", "--wrap", "true")
"""

import os
import shlex
import signal
import sys
from contextlib import ExitStack, contextmanager, suppress

import pytest

from slurm.testbed import Testbed, missing

needs_slurm = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@contextmanager
def running(root, **settings):
    """A cluster that is up; when it was stopped no process may know it any more."""
    bed = Testbed(root, **settings)
    try:
        yield bed.up()
    finally:
        bed.down()
        left = {pid: command_of(pid) for pid in bed.processes()}
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert not left, f"processes that outlived the cluster: {left}"


def command_of(pid: int) -> str:
    with suppress(OSError), open(f"/proc/{pid}/cmdline") as file:
        return file.read().replace("\0", " ").strip()
    return "?"


def incurious_python(path):
    """For a profile: content with the code, whose import by --submit takes seconds; see test_slurm_preflight.py."""
    path.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\nexec {shlex.quote(sys.executable)} "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster for all tests of a module: three nodes with two GPUs each."""
    with running(tmp_path_factory.mktemp("slurm")) as bed:
        yield bed


@pytest.fixture
def make_cluster(tmp_path_factory):
    """Makes clusters with the keywords of Testbed, for one test."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(running(tmp_path_factory.mktemp("slurm"), **settings))
