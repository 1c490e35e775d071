import dataclasses
import json
import re

import pytest
import yaml

from experiments.config import parse_single
from runfolder.errors import UserError
from slurm import profile
from slurm.profile import SHIPPED, Cluster, Scheduler, from_tree, load_cluster, names, to_tree

EXAMPLE = SHIPPED / "example-site.yaml"

# A key, a bad value, and what the sentence must contain.
BAD = [
    ("timeout", 5, "unknown key cluster.timeout; nearest: timeout_minutes"),
    ("base", "local", "unknown key cluster.base"),
    ("setup.module", "x", "unknown key cluster.setup.module"),
    ("scheduler", "pbs", "cluster.scheduler to be slurm or local, got 'pbs'"),
    ("scheduler", None, "cluster.scheduler to be slurm or local, got None"),
    ("partition", "", "cluster.partition to be one word or null, got ''"),
    ("partition", "a b", "cluster.partition to be one word or null, got 'a b'"),
    ("account", 4711, "cluster.account to be a word or null, got 4711; put quotes round it"),
    ("timeout_minutes", 0, "cluster.timeout_minutes to be at least 1, got 0"),
    ("timeout_minutes", 1.5, "cluster.timeout_minutes to be a whole number, got 1.5"),
    ("timeout_minutes", True, "cluster.timeout_minutes to be a whole number, got True"),
    ("timeout_minutes", None, "cluster.timeout_minutes to be a whole number, got None"),
    ("signal_seconds", 86400, "cluster.signal_seconds to be 1 to 65535 (below the time limit), got 86400"),
    ("signal_seconds", 0, "cluster.signal_seconds to be 1 to"),
    ("gpus_per_node", -1, "cluster.gpus_per_node to be 0 or more"),
    ("nodes", 0, "cluster.nodes to be at least 1 or null"),
    ("tasks_per_node", 0, "cluster.tasks_per_node to be at least 1 or null"),
    ("cpus_per_task", 0, "cluster.cpus_per_task to be at least 1"),
    ("cpus_without_gpu", 0, "cluster.cpus_without_gpu to be at least 1"),
    ("memory_gb", 0, "cluster.memory_gb to be above 0 or null"),
    ("memory_gb", float("nan"), "cluster.memory_gb to be above 0 or null"),
    ("parallel", 0, "cluster.parallel to be at least 1"),
    ("max_array_size", 0, "cluster.max_array_size to be at least 1 or null"),
    ("runs_per_gpu", 0, "cluster.runs_per_gpu to be at least 1"),
    ("gpus_per_job", 0, "cluster.gpus_per_job to be at least 1 or null"),
    ("gpus_per_job", 9, "cluster.gpus_per_job to be at most cluster.gpus_per_node=8, got 9"),
    ("setup", "module load x", "cluster.setup to be a list of shell lines, got 'module load x'"),
    ("setup", [1], "cluster.setup to be a list of shell lines, got [1]"),
    ("container", None, "cluster.container to be a word, got None"),
    ("python", " ", "cluster.python to be a word or null, got ' '"),
    ("extra", ["requeue"], "cluster.extra to be options as {name: value}"),
    ("extra", {"--mail-type": "FAIL"}, "options without dashes and spaces in cluster.extra, got '--mail-type'"),
    ("extra", {"time": 5}, "expected cluster.timeout_minutes, got the option time in cluster.extra"),
    ("extra", {"cpus_per_task": 5}, "expected cluster.cpus_per_task, got the option cpus_per_task"),
    ("extra", {"array": "0-3"}, "the option array in cluster.extra is set by --submit itself"),
    ("extra", {"mail-type": ["FAIL"]}, "cluster.extra.mail-type to be a word, a number or true, got ['FAIL']"),
    ("extra.exclusive", False, "cluster.extra.exclusive to be a word, a number or true, got False"),
    ("stage_from", "/data", "expected cluster.stage_to beside cluster.stage_from"),
    ("stage_keep_hours", -1, "cluster.stage_keep_hours to be 0 or more"),
    ("max_requeues", -1, "cluster.max_requeues to be 0 or more"),
    ("max_fruitless", 0, "cluster.max_fruitless to be at least 1"),
    ("free_gib", "lots", "cluster.free_gib to be a number, got 'lots'"),
]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A home of its own, a folder in TRACT_CLUSTERS, and no other settings."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(profile, "_OF_REPOSITORY", tmp_path / "clusters")
    monkeypatch.delenv("TRACT_CLUSTER", raising=False)
    (tmp_path / "given").mkdir()
    monkeypatch.setenv("TRACT_CLUSTERS", str(tmp_path / "given"))
    return tmp_path


def write(folder, name, **content):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize(("key", "value", "sentence"), BAD, ids=[f"{key}={value}" for key, value, _ in BAD])
def test_a_bad_value_is_one_sentence_that_names_its_file(key, value, sentence, home):
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        load_cluster("slurm", {key: value})
    assert "\n" not in str(error.value)
    if key not in ("base", "gpus_per_job", "stage_from"):  # keys of files alone, and of two keys together
        path = write(home / "given", "mine", **{key: value})
        with pytest.raises(UserError, match=re.escape(f" in {path}")):
            load_cluster("mine")


def test_runs_that_share_a_gpu_stay_on_one_node():
    assert load_cluster("slurm", {"runs_per_gpu": 2, "nodes": 1}).runs_per_gpu == 2
    with pytest.raises(UserError, match=r"cluster.nodes to be 1 or null where cluster.runs_per_gpu is 2, got 2"):
        load_cluster("slurm", {"runs_per_gpu": 2, "nodes": 2})


def test_every_field_has_a_bad_value_or_needs_none():
    tested = {key.split(".")[0] for key, _, _ in BAD}
    assert {field.name for field in dataclasses.fields(Cluster)} - tested == {
        *("qos", "constraint", "exclude", "reservation"),  # as partition
        "stage_to",  # as python
    }


def test_shipped_profiles_load_and_the_plain_ones_are_the_defaults():
    assert set(names()) == {"example-site", "local", "slurm"}
    assert load_cluster("slurm") == Cluster()
    assert load_cluster("local") == dataclasses.replace(Cluster(), scheduler=Scheduler.local, parallel=1)
    assert load_cluster("example-site").account == "my_account"


def test_the_example_shows_every_key_and_its_default(home):
    """Every line that is commented out is a key with its default, but for those that show a choice of ours."""
    text = EXAMPLE.read_text()
    shown = dict(re.findall(r"^# ([a-z_]+): (.*)$", text, re.MULTILINE))
    assert set(shown) | set(yaml.safe_load(text)) == {field.name for field in dataclasses.fields(Cluster)} | {"base"}
    path = home / "shown.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in shown.items()))
    assert load_cluster(str(path)) == Cluster()


def test_the_first_place_wins_and_every_place_is_listed(home):
    places = [home / "given", home / "clusters", home / "home" / ".config" / "tract" / "clusters"]
    paths = [write(folder, "slurm", parallel=number) for number, folder in enumerate(places, 1)]
    for number, path in enumerate(paths, 1):
        assert load_cluster().parallel == number
        assert names() == {n: SHIPPED / f"{n}.yaml" for n in ("example-site", "local", "slurm")} | {"slurm": path}
        path.unlink()
    assert load_cluster() == Cluster()


def test_the_environment_names_the_profile_where_the_command_line_does_not(home, monkeypatch):
    monkeypatch.setenv("TRACT_CLUSTER", "local")
    assert load_cluster(None).scheduler is Scheduler.local
    assert load_cluster("slurm").scheduler is Scheduler.slurm


def test_an_unknown_profile_names_the_nearest_and_the_places(home):
    write(home / "given", "physics", parallel=1)
    with pytest.raises(
        UserError, match=r"unknown cluster profile 'phyics'; nearest: physics; looked for in .*given, .*clus"
    ):
        load_cluster("phyics")
    with pytest.raises(UserError, match=r"expected a cluster profile, got no/such.yaml, which is no file"):
        load_cluster("no/such.yaml")


def test_a_missing_folder_of_profiles_is_named(monkeypatch):
    monkeypatch.setenv("TRACT_CLUSTERS", "/no/such/place")
    with pytest.raises(UserError, match=r"TRACT_CLUSTERS, got /no/such/place"):
        load_cluster()


def test_a_profile_inherits_and_the_nearest_value_wins(home):
    given = home / "given"
    write(given, "site", account="physics", setup=["a", "b"], extra={"mail-type": "FAIL", "licenses": "x"})
    path = write(given / "sub", "mine", base="../site.yaml", setup=["c"], extra={"licenses": None}, parallel=3)
    found = load_cluster(str(path), {"parallel": 4, "extra.comment": "x"})
    assert (found.account, found.setup, found.parallel) == ("physics", ["c"], 4)
    assert found.extra == {"mail-type": "FAIL", "comment": "x"}


def test_a_profile_may_refine_its_namesake_but_not_itself(home):
    write(home / "given", "slurm", base="slurm", parallel=3)
    assert load_cluster() == dataclasses.replace(Cluster(), parallel=3)
    write(home / "given", "a", base="b")
    write(home / "given", "b", base="a")
    with pytest.raises(UserError, match=r"unknown cluster profile 'a' \(the base of .*b.yaml\)"):
        load_cluster("a")
    path = write(home, "own", base="own.yaml")
    with pytest.raises(UserError, match="which is its own base"):
        load_cluster(str(path))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("partition: [", "expected YAML in {path}, line 1"),
        ("- a", "expected KEY: VALUE lines in {path}, got list"),
        ("base: 3", "expected base to be the name of a profile, got 3 in {path}"),
    ],
)
def test_a_file_that_is_no_profile_is_named(content, sentence, home):
    path = home / "given" / "bad.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=re.escape(sentence.format(path=path))):
        load_cluster("bad")


def test_values_come_as_they_are_written(home):
    """From the command line through Hydra's parser, and from YAML: nothing is expanded here."""
    path = write(home / "given", "mine", stage_to="/local/${USER}/x", setup=["export A=${HOME}:$B"], free_gib=1)
    found = load_cluster("mine")
    assert (found.stage_to, found.setup) == ("/local/${USER}/x", ["export A=${HOME}:$B"])
    words = ["stage_to='~/$USER'", "setup=['export A=${HOME}']", "extra={mail-type: FAIL}", "partition='a,b'"]
    found = load_cluster(str(path), parse_single(words))
    assert (found.stage_to, found.setup, found.extra) == ("~/$USER", ["export A=${HOME}"], {"mail-type": "FAIL"})
    assert found.partition == "a,b"


def test_a_cluster_survives_json():
    cluster = load_cluster("example-site", {"memory_gb": 4, "scheduler": "local", "extra.a.b": True})
    assert type(to_tree(cluster)["scheduler"]) is str
    again = from_tree(json.loads(json.dumps(to_tree(cluster))))
    assert again == cluster
    assert isinstance(again.memory_gb, float)
    assert again.scheduler is Scheduler.local
