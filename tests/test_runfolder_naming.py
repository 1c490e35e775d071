"""The name of a run: its hash is of what decides the result, and of nothing else."""

import copy
import functools
import hashlib
import json

import pytest
import yaml

from experiments.config import compose_config, to_tree
from runfolder import naming
from runfolder.folder import RunFolder


@functools.cache
def _written():
    return yaml.safe_dump(to_tree(compose_config("quickstart", {"method": "tract"})))


@pytest.fixture
def tree():
    """A real configuration, as ``config.yaml`` gives it back."""
    return yaml.safe_load(_written())


def _changed(tree, key, value):
    changed = copy.deepcopy(tree)
    *parents, last = key.split(".")
    node = changed
    for parent in parents:
        node = node[parent]
    node[last] = value
    return changed


def test_the_hash_is_of_every_setting_but_the_machines(tree):
    """Changing any leaf changes the hash, unless it is the machine's or says where code lies."""
    for key, value in naming.flatten(tree).items():
        if key == "runtime.data_dir":  # which data.root may lie in, see below
            continue
        same = key.startswith("runtime.") or key.endswith("_target_")
        changed = _changed(tree, key, f"other than {value}")
        assert (naming.config_hash(changed) == naming.config_hash(tree)) == same, key


def test_the_hash_is_that_of_its_definition(tree):
    """By a second route: through JSON, whose reader drops what says where code lies."""

    def without_targets(pairs):
        return {key: value for key, value in pairs if key != "_target_"}

    del tree["runtime"]
    decisive = json.loads(json.dumps(tree), object_pairs_hook=without_targets)
    text = json.dumps(decisive, sort_keys=True)
    tree["runtime"] = {"data_dir": "anywhere"}
    assert naming.config_hash(tree) == hashlib.sha256(text.encode()).hexdigest()[:8]


def test_the_hash_does_not_depend_on_order_and_changes_nothing(tree):
    before = copy.deepcopy(tree)
    backwards = {key: dict(reversed(v.items())) if isinstance(v, dict) else v for key, v in reversed(tree.items())}
    assert naming.config_hash(backwards) == naming.config_hash(tree)
    assert tree == before


@pytest.mark.parametrize(
    ("data_dir", "root", "inside"),
    [
        ("data", "data", ""),
        ("/disk", "/disk", ""),
        ("data", "data/cifar", "cifar"),
        ("/disk", "/disk/cifar", "cifar"),
        ("data", "database", None),
        ("data", "/data", None),
        ("data", None, None),
    ],
)
def test_only_the_place_within_the_machines_data_counts(tree, data_dir, root, inside):
    assert naming.in_data_dir(root, data_dir) == inside

    def hashed(data_dir, root):
        return naming.config_hash(_changed(_changed(tree, "runtime.data_dir", data_dir), "data.root", root))

    elsewhere = {None: root, "": "/mnt"}.get(inside, f"/mnt/{inside}")
    assert hashed(data_dir, root) == hashed("/mnt", elsewhere)
    assert hashed(data_dir, root) != hashed("/mnt", "/mnt/other")


def test_flattening_loses_no_leaf_and_no_place(tree):
    tree["model"]["deep"] = {"deeper": {"seed": 1, "deepest": [2, {"as": "it is"}]}}
    flat = naming.flatten(tree)
    back = copy.deepcopy(tree)
    for key in flat:
        back = _changed(back, key, None)
    assert set(naming.flatten(back).values()) == {None}
    for key, value in flat.items():
        back = _changed(back, key, value)
    assert back == tree
    assert naming.flatten(flat) == flat


def test_hyper_parameters_are_what_tensorboard_takes(tree):
    shown = naming.hyper_parameters(tree)
    assert all(isinstance(value, int | float | str) for value in shown.values())
    assert not any("_target_" in key for key in shown)
    flat = naming.flatten(tree)
    assert {key: str(value) for key, value in shown.items()} == {key: str(flat[key]) for key in shown}
    assert flat.keys() - shown.keys() == {key for key in flat if key.endswith("_target_")}


def test_a_name_ends_in_its_hash_and_tells_runs_apart(tree):
    name = naming.run_name(tree)
    assert naming.hash_in(name) == naming.config_hash(tree)
    assert name.startswith("digits-")
    assert "-tract0.1-s0-" in name
    names = {
        naming.run_name(_changed(tree, key, value)) for key, value in (("seed", 1), ("optim.lr", 7.0), ("epochs", 3))
    }
    assert len(names | {name}) == 4
    assert RunFolder(f"runs/quickstart/{name}").name == name


@pytest.mark.parametrize(
    "name", ["small", "s0", "a-1234567", "a-123456789", "a-1234567G", "a-12345678-again", "12345678"]
)
def test_other_names_have_no_hash(name):
    assert naming.hash_in(name) is None
