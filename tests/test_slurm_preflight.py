import re
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from torchvision.datasets import CIFAR10

from runfolder.errors import UserError
from runfolder.folder import RunFolder
from slurm import batch, preflight, queue
from slurm.packing import Part, shape_of
from slurm.profile import load_cluster
from tests.cases import tiny_config
from tests.slurm_cluster import cluster, make_cluster, needs_slurm  # noqa: F401

QUICK = {"python": "true"}  # for tests of anything but the import: this "interpreter" always succeeds


def here(**changes):
    return load_cluster("local", QUICK | {"free_gib": 0} | changes)


def there(**changes):
    return load_cluster("slurm", QUICK | {"free_gib": 0, "cpus_without_gpu": 1} | changes)


@pytest.fixture
def inside(cluster, monkeypatch):  # noqa: F811
    enter(cluster, monkeypatch)
    return cluster


def enter(bed, monkeypatch):
    for key in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(key, bed.environment[key])


def options_of(profile, gpus=0):
    """What sbatch is asked for a job of this profile."""
    part = Part(shape_of(profile, gpus), [[RunFolder("run")]])
    return batch.options_of(batch.script(Path("/submission"), profile, part, "job", 1))


def check(profile, runs, configs, options=None, **keywords):
    if options is None:
        options = options_of(profile) if profile.scheduler == "slurm" else []
    return preflight.check(profile, runs, configs, options, **keywords)


def refused(sentence, *arguments, **keywords):
    """`check` raises one sentence that fits a pattern."""
    with pytest.raises(UserError, match=sentence) as error:
        check(*arguments, **keywords)
    assert "\n" not in str(error.value)


@needs_slurm
def test_a_good_profile_passes_without_a_word(inside, tmp_path, capsys):
    profile = there(
        partition="low,high", account="x", memory_gb=1.5, setup=["true"], extra={"mail_type": "FAIL", "hold": True}
    )
    asked = "--partition=low,high --account=x --time=1440 --cpus-per-task=1 --mem=1536M --mail-type=FAIL --hold"
    assert set(asked.split()) <= set(options_of(profile))
    check(profile, tmp_path / "runs", [tiny_config(tmp_path)])
    check(there(), tmp_path / "runs", [])
    assert capsys.readouterr().out == ""
    assert queue.jobs() == []
    assert list((tmp_path / "runs").iterdir()) == []


# What a person may have written, and what the sentence must contain.
WRONG = [
    ({"partition": "lwo"}, r"unknown partition cluster.partition=lwo; nearest: low\."),
    ({"partition": "low,hihg"}, r"unknown partition cluster.partition=hihg; nearest: high\."),
    (
        {"constraint": "fast"},
        r"got: Invalid feature specification \(from `sbatch .*fast.*`\); change cluster.constraint\.",
    ),
    (
        {"cpus_without_gpu": 99},
        r"got: Requested node configuration is not available .*; change cluster.nodes, gpus_per_node",
    ),
    ({"nodes": 7}, r"got: Requested node configuration is not available"),
    ({"memory_gb": 999}, r"got: Requested node configuration is not available"),
    ({"exclude": "nowhere"}, r"got: Invalid node name specified .*; change cluster.exclude\."),
    ({"reservation": "mine"}, r"got: Requested reservation is invalid .*; change cluster.reservation\."),
    ({"extra": {"speed": "high"}}, r"got: unrecognized option '--speed=high' .*; change cluster.extra\."),
    ({"extra": {"mail-type": "YES"}}, r"got: Invalid --mail-type specification .*; change cluster.extra\."),
]


@needs_slurm
@pytest.mark.parametrize(("changes", "sentence"), WRONG, ids=[next(iter(changes)) for changes, _ in WRONG])
def test_what_slurm_does_not_take_is_one_sentence(changes, sentence, inside, tmp_path):
    refused(sentence, there(**changes), tmp_path, [])


@needs_slurm
def test_options_of_the_caller_are_what_slurm_judges(inside, tmp_path):
    check(there(), tmp_path, [], options=["--partition=low", "--gpus-per-node=2"])
    refused("node configuration", there(), tmp_path, [], options=["--partition=low", "--gpus-per-node=3"])


@needs_slurm
def test_time_limits_and_partitions_that_are_down(inside, tmp_path):
    inside.run("scontrol", "update", "partitionname=low", "maxtime=60")
    inside.run("scontrol", "update", "partitionname=high", "state=down")
    try:
        check(there(timeout_minutes=60), tmp_path, [])
        long = there(timeout_minutes=61)
        refused(r"cluster.timeout_minutes to be at most the 60 of partition low, got 61", long, tmp_path, [])
        check(there(timeout_minutes=61, partition="low,abrupt"), tmp_path, [])
        (note, *_) = check(there(timeout_minutes=61, qos="long"), tmp_path, [])
        assert note == "cluster.timeout_minutes=61 is above the 60 of partition low."
        down = there(partition="high")
        refused(r"expected partition high to be up, got one that starts no jobs; nearest: abrupt", down, tmp_path, [])
        inside.run("scontrol", "update", "partitionname=low", "default=no")
        refused(r"expected cluster.partition=NAME, since this cluster has no default, got null", there(), tmp_path, [])
    finally:
        inside.run("scontrol", "update", "partitionname=low", "maxtime=infinite", "default=yes")
        inside.run("scontrol", "update", "partitionname=high", "state=up")


@needs_slurm
def test_nodes_out_of_service_are_a_note(inside, tmp_path):
    """Slurm queues such jobs, though --test-only refuses them as it refuses what can never run."""
    nodes = ",".join(inside.nodes)
    inside.run("scontrol", "update", f"nodename={nodes}", "state=drain", "reason=test")
    try:
        (note, *_) = check(there(), tmp_path, [])
        assert note.startswith(
            "Slurm cannot start such jobs now (Requested node configuration is not available); 3 of 3"
        )
        refused("Invalid feature", there(constraint="fast"), tmp_path, [])
    finally:
        inside.run("scontrol", "update", f"nodename={nodes}", "state=resume")


@needs_slurm
def test_a_controller_that_is_away_is_named(make_cluster, monkeypatch, tmp_path):  # noqa: F811
    bed = make_cluster(nodes=1)
    enter(bed, monkeypatch)
    bed.stop_slurmctld()
    refused("expected a Slurm controller that answers `scontrol ping`, got none", there(), tmp_path, [])


def test_without_slurm_the_commands_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name, **_: None if name in ("sbatch", "srun") else f"/bin/{name}")
    refused("found no sbatch, srun; log in to the cluster, or give cluster=local", there(), tmp_path, [], options=[])
    check(here(), tmp_path, [])


def pretend(monkeypatch, folder, **scripts):
    """Slurm commands that answer as on a cluster with accounting, which needs a data base."""
    for name, script in scripts.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("changes", "words", "cure"),
    [
        (
            {"account": "fisics"},
            "Invalid account or account/partition combination specified",
            "account (nearest: physics)",
        ),
        ({"qos": "gold"}, "Invalid qos specification", "qos"),
        ({}, "Job violates accounting/QOS policy (job submit limit)", "qos or the size of the jobs"),
        ({}, "Requested time limit is invalid (missing or exceeds some limit)", "timeout_minutes"),
    ],
)
def test_accounts_and_limits_of_a_cluster_with_accounting(changes, words, cure, monkeypatch, tmp_path):
    pretend(
        monkeypatch,
        tmp_path,
        sbatch=f'echo "allocation failure: {words}" >&2; exit 1',
        sacctmgr="printf 'physics\\nbiology\\nphysics\\n'",
        sinfo="echo n1 idle",
    )
    profile = there(**changes)
    with pytest.raises(UserError, match=re.escape(f"got: {words} (from `sbatch --test-only")) as error:
        preflight._check_request(profile, options_of(profile))
    assert str(error.value).endswith(f"; change cluster.{cure}.")


def test_a_foreign_account_that_slurm_takes_is_a_note(monkeypatch, tmp_path):
    pretend(monkeypatch, tmp_path, sbatch="exit 0", sacctmgr="echo physics")
    note = "cluster.account=fisics is not among your accounts; nearest: physics."
    assert preflight._check_request(there(account="fisics"), []) == [note]
    assert preflight._check_request(there(account="physics"), []) == []
    pretend(monkeypatch, tmp_path, sacctmgr="echo no accounting >&2; exit 1")
    assert preflight._check_request(there(account="fisics"), []) == []


def test_runs_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    refused(r"runs that can be written, got .*file/runs: Not a directory", here(), tmp_path / "file" / "runs", [])
    refused(r"runs that can be written, got /proc/runs: ", here(), Path("/proc/runs"), [])
    refused(r"expected cluster.free_gib=1e\+06 GiB free below", here(free_gib=1e6), tmp_path, [])


@pytest.mark.parametrize(
    ("folder", "only_here"),
    [("/tmp/runs", True), ("/run/x", True), ("/home/a/runs", False), ("/big disk/x", True), ("/big disk2", False)],
)
def test_folders_that_other_nodes_cannot_see(folder, only_here, monkeypatch):
    lines = [
        "22 1 8:1 / / rw - ext4 /dev/sda1 rw",
        "23 22 0:20 / /run rw,nosuid shared:5 - tmpfs tmpfs rw",
        r"24 22 0:21 / /big\040disk rw - tmpfs none rw",
    ]
    monkeypatch.setattr(Path, "read_text", lambda path: "\n".join(lines) + "\n")
    assert preflight._only_here(Path(folder)) == only_here


@needs_slurm
def test_runs_on_this_machine_alone_are_a_note_for_slurm(inside):
    with tempfile.TemporaryDirectory(dir="/tmp") as runs:
        sentence = f"{runs} seems to be on this machine alone"
        notes = check(there(), Path(runs), [])  # on a busy machine another one: a node that has not answered in time
        assert sum(sentence in note for note in notes) == 1
        assert check(here(), Path(runs), []) == []


def test_folders_of_images_need_both_splits(tmp_path):
    images = tmp_path / "images"
    config = tiny_config(tmp_path, data="imagefolder", data__root=str(images))
    refused(
        rf"expected train/ and test/ \(or val/\) in data.root={images}, got no such folder", here(), tmp_path, [config]
    )
    (images / "train").mkdir(parents=True)
    refused(r"got train; give data.root=DIR", here(), tmp_path, [config])
    (images / "val").mkdir()
    check(here(), tmp_path, [config, config, tiny_config(tmp_path)])


def test_cifar_is_fetched_here_unless_it_is_there(tmp_path, monkeypatch):
    """By the code that runs use, whose error it is when there is no network."""
    data = tmp_path / "data"
    config = tiny_config(tmp_path, data="cifar10", runtime__data_dir=str(data))
    monkeypatch.setattr(CIFAR10, "url", "file:///nowhere/")
    refused(r"expected CIFAR10 in .* or a way to download it", here(), tmp_path, [config])
    (data / CIFAR10.base_folder).mkdir(parents=True)
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        (data / CIFAR10.base_folder / name).write_text("")
    check(here(), tmp_path, [config])  # a data set that is there is not read
    (data / CIFAR10.base_folder / "test_batch").unlink()
    refused(r"expected CIFAR10 in .* or a way to download it", here(), tmp_path, [config])


def test_data_to_stage_must_be_there(tmp_path, monkeypatch):
    monkeypatch.setenv("STORE", str(tmp_path))
    staged = {"stage_to": "/local/$NODE"}
    check(here(stage_from="$STORE", **staged), tmp_path, [])
    refused(r"data in cluster.stage_from=\$STORE/x, got no such", here(stage_from="$STORE/x", **staged), tmp_path, [])
    (note,) = check(here(stage_from="$NODE/x", **staged), tmp_path, [])
    assert "cluster.stage_from=$NODE/x has a variable that is not set here" in note


def test_the_code_is_imported_as_a_job_does(tmp_path):
    """The real thing: this interpreter, the repository, a setup line that the import needs."""
    check(here(python=None), tmp_path, [])


# The profile, and what the sentence must contain; CODE is a folder with a package of ours that does not work.
BROKEN = [
    ({"setup": ["true", "modul load cuda"]}, r"got exit code 127 from `modul load cuda`: .*not found; correct it, or"),
    ({"setup": ["(exit 3)"]}, r"each line of cluster.setup to succeed, got exit code 3 from `\(exit 3\)`; correct it"),
    ({"setup": ["if true"]}, r"got: .*syntax error"),
    ({"setup": ["exit 4"]}, r"got: exit code 4; change cluster.setup"),
    ({"python": "no-such-python"}, r"expected `no-such-python` to import the code in .*got: .*not found; change"),
    (
        {"python": sys.executable},
        r"got: ModuleNotFoundError: No module named 'experiments'; change cluster.setup",
    ),
    ({"setup": ["sleep 60"]}, r"expected `true` to import the code within 1 s, got no end"),
]


@pytest.mark.parametrize(("changes", "sentence"), BROKEN, ids=[str(list(changes.values())[0]) for changes, _ in BROKEN])
def test_code_that_cannot_be_imported_is_one_sentence(changes, sentence, tmp_path, monkeypatch):
    if changes.get("setup") == ["sleep 60"]:
        monkeypatch.setattr(preflight, "_PATIENCE", 1.0)
    refused(sentence, here(**changes), tmp_path / "runs", [], code=tmp_path)  # the sleeping shell is not waited for


def test_setup_lines_reach_the_import_and_may_span_elements(tmp_path):
    setup = ["if true; then", "export A=1", "fi", "sleep 60 &", "false || true", "# a comment"]
    python = tmp_path / "python of ours"
    for value, status in ((1, 0), (2, 1)):
        python.write_text(f'#!/bin/sh\ntest "$A" = {value}\n')
        python.chmod(0o755)
        if status:
            refused("got: exit code 1; change", here(setup=setup, python=str(python)), tmp_path, [])
        else:
            check(here(setup=setup, python=str(python)), tmp_path, [])


def test_setup_lines_that_change_pythonpath_do_not_hide_the_code(tmp_path):
    """The code's own folder comes after them, as in the batch script."""
    check(here(setup=["export PYTHONPATH=/elsewhere"], python=sys.executable), tmp_path, [])
    check(here(setup=["unset PYTHONPATH"], python=sys.executable), tmp_path, [])


def test_a_container_that_is_only_on_the_nodes_is_a_note(tmp_path):
    (note,) = check(here(container="no-apptainer exec a.sif"), tmp_path, [])
    assert note.startswith("`no-apptainer exec a.sif true` could not be tried here (")
    check(here(container="env A=1"), tmp_path, [])
