"""Kills for lack of memory, as both versions of control groups count them."""

import pytest

from slurm.memory import oom_kills

EVENTS = "low 0\nhigh 0\nmax 12\noom 3\noom_kill {}\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {}\n"


@pytest.mark.parametrize("kills", [0, 2])
@pytest.mark.parametrize(
    ("groups", "file", "text"),
    [
        ("0::/job_7/step_0\n", "job_7/step_0/memory.events", EVENTS),
        ("5:cpu,cpuacct:/x\n4:memory:/slurm/job_7\n", "memory/slurm/job_7/memory.oom_control", CONTROL),
        ("4:memory,hugetlb:/job_7\n0::/\n", "memory/job_7/memory.oom_control", CONTROL),
    ],
)
def test_kills_are_counted(tmp_path, groups, file, text, kills):
    (tmp_path / "cgroup").write_text(groups)
    counter = tmp_path / "fs" / file
    counter.parent.mkdir(parents=True)
    counter.write_text(text.format(kills))
    assert oom_kills(tmp_path / "cgroup", tmp_path / "fs") == kills


def test_where_nothing_is_counted_there_are_none(tmp_path):
    assert oom_kills(tmp_path / "missing", tmp_path) == 0
    (tmp_path / "cgroup").write_text("0::/nowhere\n")
    assert oom_kills(tmp_path / "cgroup", tmp_path) == 0
    assert isinstance(oom_kills(), int)
