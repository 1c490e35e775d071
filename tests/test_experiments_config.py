import dataclasses
import math
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from analysis import tables
from experiments.config import (
    CONF,
    Config,
    Runtime,
    build,
    choices_of,
    compose_config,
    config_hash,
    folder_of,
    from_tree,
    load_config,
    parse_single,
    prepare_folder,
    run_name,
    to_tree,
)
from runfolder import naming
from runfolder.errors import UserError
from runfolder.naming import TARGET
from runfolder.plain_yaml import write_yaml
from slurm.command import main
from tests.cases import tiny_config
from tract import DEFAULT_LAMBDA

# Command line after `quickstart.py`, and what the sentence must contain: the key and a cure.
BAD = [
    ("sed=1", "unknown key sed; nearest: seed"),
    ("runtime.wokers=1", "unknown key runtime.wokers; nearest: runtime.workers"),
    ("optim.momentum=0.9", "unknown key optim.momentum; nearest: "),
    ("optim.name=x", "unknown key optim.name"),
    ("model._target_=os.system", "unknown key model._target_"),
    ("experiment=other", "unknown key experiment"),
    ("optim=sgdd", "unknown choice optim=sgdd; nearest: sgd"),
    ("model=resnet20", "unknown choice model=resnet20; nearest: resnet"),
    ("seed=abc", "seed"),
    ("seed=", "seed"),
    ("seed=1.5", "seed"),
    ("seed=-1", "seed to be 0 to 2^32 - 1, got -1"),
    ("epochs=0", "epochs to be at least 1, got 0"),
    ("epochs=1.5", "epochs"),
    ("batch_size=null", "batch_size"),
    ("max_steps=0", "max_steps to be at least 1 or null, got 0"),
    ("micro_batch=0", "micro_batch to be at least 1 or null"),
    ("eval_every=0", "eval_every to be at least 1"),
    ("label_smoothing=1", "label_smoothing"),
    ("ema_decay=1", "ema_decay"),
    ("clip_grad_norm=0", "clip_grad_norm"),
    ("precision=fp8", "expected one of [fp32, bf16, fp16]"),
    ("runtime.threads=0", "runtime.threads to be at least 1 or null"),
    ("runtime.workers=-1", "runtime.workers to be 0 or more"),
    ("runtime.log_every=0", "runtime.log_every"),
    ("runtime.keep_checkpoints=0", "runtime.keep_checkpoints"),
    ("runtime.checkpoint_steps=0", "runtime.checkpoint_steps"),
    ("runtime.deadline_minutes=0", "runtime.deadline_minutes"),
    ("runtime.checkpoint_seconds=abc", "runtime.checkpoint_seconds"),
    ("runtime.device=abacus", "runtime.device to be auto, cpu, cuda or cuda:N"),
    ("optim=sgd", "this recipe has no optim.lr for sgd, only for adam; give optim.lr=VALUE"),
    ("optim.lr=0", "optim.lr to be a number above 0, got 0"),
    ("optim.lr=nan", "optim.lr to be a number above 0, got nan"),
    ("optim.lr=inf", "optim.lr to be a number above 0, got inf"),
    ("optim.lr=true", "optim.lr to be a number, got True"),
    ("optim.betas=3", "optim.betas to be a list of numbers, got 3"),
    ("optim.betas=[a,b]", "optim.betas to be a list of numbers"),
    ("optim.eps=-1", "optim: "),
    ("optim=sgd optim.lr=0.1 optim.momentum=abc", "optim.momentum to be a number, got 'abc'"),
    ("optim=sgd optim.lr=0.1 optim.momentum=-1", "optim: "),
    ("schedule.final=abc", "schedule.final to be a number, got 'abc'"),
    ("schedule.warmup_epochs=-1", "schedule.warmup_epochs to be 0 or more"),
    ("schedule=multistep schedule.milestones=3", "schedule.milestones to be a list of numbers, got 3"),
    ("schedule=multistep schedule.milestones=[a]", "schedule.milestones to be a list of numbers"),
    ("method.lambda_=0.1", "unknown key method.lambda_"),
    ("method=tract method.lambda_=0", "method: expected lambda_ > 0 and finite, got 0"),
    ("method=[tract,patchnorm] method.tract.lambda_=inf", "method: expected lambda_ > 0 and finite, got inf"),
    ("method=[tract,patchnorm] method.tract.lambda_=abc", "method.tract.lambda_ to be a number, got 'abc'"),
    ("method=[tract,patchnorm] method.tract.lamda=1", "unknown key method.tract.lamda; nearest: method.tract.lambda_"),
    ("method=[tract,patchnorm] method.lambda_=1", "unknown key method.lambda_; nearest: method.tract.lambda_"),
    ("method=[tract,pathnorm]", "unknown choice method=pathnorm; nearest: patchnorm"),
    ("method=[tract,tract]", "method to be one method or different ones, got ['tract', 'tract']"),
    ("method=[]", "method to be one method or different ones, got []"),
    ("model=vit_small method=[patchnorm,dual_patchnorm]", "method: expected a model without normalised patches"),
    ("method=tract method.lambda_=abc", "method.lambda_ to be a number, got 'abc'"),
    ("method=tract method.layer=conv", "nearest: conv1"),
    ("method=tract method.layer=blocks", "TrAct supports nn.Linear"),
    ("method=tract method.statistics=both", "statistics"),
    ("model.width=0", "model.width to be at least 1"),
    ("model.width=2.5", "model.width to be a whole number, got 2.5"),
    ("model=vit_small model.heads=3", "heads"),
    ("model=vit_small model.patch=3", "patch"),
    ("data.padding=-1", "data.padding to be 0 or more"),
    ("data.flip=3", "data.flip to be true or false, got 3"),
    ("data.augment=blur", "data.augment to be one of crop_flip, none, resized_crop, three_augment, "),
    ("data.augment=three_augment data.in_memory=false", "colour images"),
    ("loss=mse", "expected one of [cross_entropy, bce]"),
    ("loss=bce label_smoothing=0.1", "label_smoothing to be 0 with loss=bce"),
    ("mixup=-1", "mixup to be 0 or more"),
    ("repeats=0", "repeats to be at least 1"),
    ("mix_group=0", "mix_group to be at least 1 or null"),
    ("eval_images=0", "eval_images to be at least 1 or null"),
    ("bias_lr=0", "bias_lr to be a number above 0, got 0"),
    ("bias_lr=inf", "bias_lr to be a number above 0, got inf"),
    ("start_from=nowhere", "expected a finished run in start_from="),
    ("data.augment=resized_crop", "data.in_memory=false"),
    ("data.mean=3", "data.mean"),
    ("data.mean=[a]", "data.mean"),
    ("data.mean=[0.1,0.2]", "data.mean and data.std with 1 numbers"),
    ("data.std=[0]", "std above 0"),
    ("batch_size=5000 drop_last=true", "expected at least batch_size=5000 training images with drop_last, got 1437"),
    ("data=imagefolder", "data.root"),
    ("data=imagefolder data.root=missing", "expected train/"),
    ("data=imagefolder data.root=empty", "expected train/"),
    ("+new=1", "are not needed"),
    ("++seed=1", "are not needed"),
    ("~seed", "are not needed"),
    ("optim@other=sgd", "are not needed"),
    ("seed", "expected key=value"),
    ("seed=1 seed=2", "seed is given twice"),
    ("seed=0,1", "add --local, --submit or --dry-run"),
    ("seed=range(0,2)", "add --local, --submit or --dry-run"),
    ("seed=interval(0,1)", "seed=A,B"),
    ("optim=glob(*)", "optim=A,B"),
    ("grid=quickstart", "add --local, --submit or --dry-run"),
    ("jobs=2", "add --local, --submit or --dry-run"),
    ("cluster=local", "add --local, --submit or --dry-run"),
    ("cluster.parallel=2", "add --local, --submit or --dry-run"),
    ("--submit cluster.paralel=2", "parallel"),
    ("--submit cluster=nowhere", "unknown cluster profile 'nowhere'"),
    ("--submit jobs=2", "cluster.parallel"),
    ("--local cluster.parallel=2", "jobs=N"),
    ("--fast", "unknown flag --fast; the flags are --local"),
    ("seed=1 --fast", "unknown flag --fast; the flags are --local"),
    ("--resume", "--resume"),
    ("--local --submit", "--local"),
    ("--resume missing", "expected a run folder"),
    ("--resume empty", "expected a run folder"),
    ("--dry-run grid=quick", "unknown grid 'quick'; nearest: quickstart"),
    ("--dry-run grid=figure3", "quickstart has quickstart"),
    ("--dry-run jobs=0", "jobs=N"),
    ("--dry-run jobs=many", "jobs=N"),
    ("--dry-run seed=0,0", "twice"),
    ("--dry-run method=tract,proxy", "unknown choice method=proxy"),
    ("--dry-run optim.rl=1,2", "unknown key optim.rl; nearest: optim.lr"),
    ("--local optim.lr=0", "optim.lr"),
]


@pytest.mark.parametrize(("words", "part"), BAD, ids=[words for words, _ in BAD])
def test_bad_input_is_one_sentence_and_leaves_nothing(words, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    code = main("quickstart", "", "quickstart", words.split())
    out, err = capsys.readouterr()
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert part in err
    assert "Traceback" not in err + out
    assert not list(Path("runs").glob("*/*"))


def _finished_folder(folder, **overrides):
    config = tiny_config(folder, max_steps=1, epochs=1, **overrides)
    path = folder_of(config).path
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(to_tree(config)))
    return path


DAMAGE = {
    "not yaml": lambda text: b"a: [1",
    "binary": lambda text: bytes(range(256)),
    "empty": lambda text: b"",
    "a list": lambda text: b"- 1\n",
    "a bad value": lambda text: text.replace(b"epochs: 1", b"epochs: many"),
    "an unknown key": lambda text: text + b"more: 1\n",
    "a missing key": lambda text: re.sub(rb"batch_size: .*\n", b"", text, count=1),
    "no model": lambda text: re.sub(rb"model:\n(  .*\n)+", b"model: {}\n", text),
    "other values than its name": lambda text: text.replace(b"seed: 0", b"seed: 1"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_config_yaml_is_one_sentence(damage, tmp_path, capsys):
    folder = _finished_folder(tmp_path)
    text = (folder / "config.yaml").read_bytes()
    changed = DAMAGE[damage](text)
    assert changed != text
    (folder / "config.yaml").write_bytes(changed)
    before = sorted(tmp_path.rglob("*"))
    assert main("quickstart", "", "quickstart", ["--resume", str(folder)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


RESUME = [
    ("seed=1", "only runtime.*"),
    ("optim.lr=0.1", "only runtime.*"),
    ("runtime.wokers=1", "nearest: runtime.workers"),
    ("runtime.workers=many", "runtime.workers"),
    ("runtime.threads=0", "runtime.threads"),
    ("runtime.runs=elsewhere", "expected a run in RUNS/quickstart/"),
]


@pytest.mark.parametrize(("change", "part"), RESUME)
def test_only_valid_runtime_values_beside_resume(change, part, tmp_path, capsys):
    folder = _finished_folder(tmp_path)
    assert main("quickstart", "", "quickstart", ["--resume", str(folder), change]) == 2
    assert part in capsys.readouterr().err


def test_resume_continues_the_named_folder_wherever_the_data_lie(tmp_path, capsys):
    folder = _finished_folder(tmp_path / "runs", data="cifar10", model="resnet18")
    (folder / "result.json").write_text('{"metrics": {"test/top1": 50.0}}')
    change = f"runtime.data_dir={tmp_path / 'data'}"
    assert main("quickstart", "", "quickstart", ["--resume", str(folder), change]) == 0
    assert "finished already: test/top1 50.00" in capsys.readouterr().out
    assert [path for path in tmp_path.rglob("*") if path.name == "config.yaml"] == [folder / "config.yaml"]


def test_runs_and_experiments_that_are_links_are_resumed_where_they_are_said_to_be(tmp_path, monkeypatch, capsys):
    """As after a move to another disk."""
    folder = _finished_folder(tmp_path / "runs")
    (folder / "result.json").write_text('{"metrics": {"test/top1": 50.0}}')
    moved = tmp_path / "disk2" / folder.name
    moved.parent.mkdir()
    folder.rename(moved)
    folder.symlink_to(moved)
    assert main("quickstart", "", "quickstart", ["--resume", str(folder)]) == 0
    (tmp_path / "runs" / "quickstart").rename(tmp_path / "disk3")
    (tmp_path / "runs" / "quickstart").symlink_to(tmp_path / "disk3")
    assert main("quickstart", "", "quickstart", ["--resume", str(folder)]) == 0
    monkeypatch.chdir(tmp_path / "runs")
    assert main("quickstart", "", "quickstart", ["--resume", f"../runs/quickstart/{folder.name}/"]) == 0
    assert capsys.readouterr().out.count("finished already: test/top1 50.00") == 3


@pytest.mark.parametrize(
    "words", ["--dry-run method=tract seed=1", "method=tract --dry-run seed=1", "method=tract seed=1 --dry-run"]
)
def test_flags_and_values_come_in_any_order(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main("quickstart", "", "quickstart", words.split()) == 0
    assert "2 runs: 2 missing" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


# -- one configuration, one name ----------------------------------------------------------

SCRIPTS = ["quickstart", "cifar_resnet", "cifar_vit", "cifar100_zoo", "imagenet_resnet", "imagenet_deit"]


@pytest.mark.parametrize("experiment", SCRIPTS)
@pytest.mark.parametrize("method", choices_of("method"))
def test_a_configuration_survives_its_file(experiment, method, tmp_path):
    config = compose_config(experiment, {"method": method, "precision": "bf16", "ema_decay": 0.5})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_tree(config)))
    assert load_config(path) == config
    assert config_hash(load_config(path)) == config_hash(config)


def _leaves(tree, prefix=()):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def _other(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value / 2 if isinstance(value, float) and value else value + 1
    if isinstance(value, list):
        return [*value, 1]
    return {"x": 1} if isinstance(value, dict) else f"{value}x"


def _changed(config, path):
    config = dataclasses.replace(from_tree(to_tree(config)))
    *outer, last = path
    node = config
    for key in outer:
        node = getattr(node, key) if not isinstance(node, dict) else node[key]
    if isinstance(node, dict):
        node[last] = _other(node[last])
    elif last in ("precision", "loss"):
        value = getattr(node, last)
        setattr(node, last, next(other for other in type(value) if other is not value))
    else:
        setattr(node, last, _other(getattr(node, last)))
    return config


@pytest.mark.parametrize("experiment", SCRIPTS)
def test_everything_but_runtime_and_where_code_lies_decides_the_hash(experiment):
    config = compose_config(experiment, {"method": "tract"})
    before = config_hash(config)
    hashes = {path: config_hash(_changed(config, path)) for path, _ in _leaves(to_tree(config))}
    shared = {("runtime", "data_dir")} if "root" in config.data else set()  # then data.root is no longer the shared one
    is_free = lambda path: path[0] == "runtime" or path[-1] == TARGET  # noqa: E731
    for path, after in hashes.items():
        if path not in shared:
            assert (after == before) == is_free(path), path
    deciding = [after for path, after in hashes.items() if not is_free(path)]
    assert len(set(deciding)) == len(deciding)
    assert {path[1] for path in hashes if path[0] == "runtime"} == {f.name for f in dataclasses.fields(Runtime)}


def test_the_machines_own_data_folder_does_not_decide_the_hash():
    here, there, other = (
        compose_config("cifar_vit", values)
        for values in ({}, {"runtime.data_dir": "/scratch"}, {"data.root": "/scratch"})
    )
    assert there.data["root"] == other.data["root"] == "/scratch"
    assert config_hash(here) == config_hash(there) != config_hash(other)


def test_the_hash_does_not_depend_on_the_order_of_keys():
    def turned(node):
        return {key: turned(node[key]) for key in reversed(node)} if isinstance(node, dict) else node

    config = compose_config("cifar_resnet", {"method": "tract"})
    again = from_tree(turned(to_tree(config)))
    assert list(again.optim) != list(config.optim)
    assert config_hash(again) == config_hash(config)


NAMES = [
    ("quickstart", {"epochs": 30}, "digits-resnet_small-adam-30ep-vanilla-s0"),
    ("cifar_vit", {"method": "tract", "method.lambda_": 0.05, "seed": 3}, "cifar10-vit_cifar-adam-200ep-tract0.05-s3"),
    ("cifar_vit", {"method": ["tract", "patchnorm"]}, "cifar10-vit_cifar-adam-200ep-tract0.1+patchnorm-s0"),
    ("cifar_resnet", {"data": "cifar100", "optim": "adam"}, "cifar100-resnet18-adam-100ep-vanilla-s0"),
]


@pytest.mark.parametrize(("experiment", "overrides", "words"), NAMES)
def test_a_run_is_named_by_words_and_hash(experiment, overrides, words):
    config = compose_config(experiment, overrides)
    assert run_name(config) == f"{words}-{config_hash(config)}"
    assert re.fullmatch(r"[0-9a-f]{8}", config_hash(config))


def test_every_value_on_the_command_line_arrives():
    overrides = {"seed": 7, "optim.weight_decay": 0.5, "runtime.workers": 5, "schedule.final": 0.25, "data.mean": None}
    tree = to_tree(compose_config("cifar_vit", {**overrides, "data": "digits"}))
    for key, value in overrides.items():
        node = tree
        for part in key.split("."):
            node = node[part]
        assert node == value, key


# -- learning rates by number of epochs: section 4.1 and appendix of arXiv 2410.23970 ---------

RATES = {
    ("cifar_resnet", "sgd"): {100: 0.08, 200: 0.08, 400: 0.08, 800: 0.08},
    ("cifar_resnet", "adam"): {100: 1e-2, 200: 1e-2, 400: 1e-3, 800: 1e-3},
    ("cifar_vit", "adam"): {100: 1e-3, 200: 10**-3.2, 400: 10**-3.5, 800: 10**-3.5},
}


@pytest.mark.parametrize(("experiment", "optim"), RATES)
@pytest.mark.parametrize("epochs", [1, 100, 130, 150, 200, 250, 300, 400, 550, 600, 800, 5000])
def test_learning_rate_is_that_of_the_nearest_listed_number_of_epochs(experiment, optim, epochs):
    table = RATES[experiment, optim]
    nearest = min(table, key=lambda listed: max(listed, epochs) / min(listed, epochs))
    rate = compose_config(experiment, {"optim": optim, "epochs": epochs}).optim["lr"]
    assert math.isclose(rate, table[nearest], rel_tol=1e-12)


def test_a_given_learning_rate_wins_over_the_table():
    assert compose_config("cifar_vit", {"optim.lr": 0.5, "epochs": 100}).optim["lr"] == 0.5


# -- the files --------------------------------------------------------------------------------

COMPONENTS = [(group, name) for group in ("model", "data", "optim", "schedule", "method") for name in choices_of(group)]


@pytest.mark.parametrize(("group", "name"), COMPONENTS)
def test_a_component_is_named_after_its_file(group, name):
    assert yaml.safe_load((CONF / group / f"{name}.yaml").read_text())["name"] == name


@pytest.mark.parametrize("preset", choices_of("debug"))
def test_every_debug_preset_composes_and_changes_only_what_it_says(preset):
    tree = OmegaConf.to_container(OmegaConf.load(CONF / "debug" / f"{preset}.yaml"))
    plain, changed = (
        dict(_leaves(to_tree(compose_config("quickstart", {"debug": name})))) for name in ("none", preset)
    )
    said = dict(_leaves(tree))
    assert {path: value for path, value in changed.items() if plain[path] != value}.items() <= said.items()
    assert all(changed[path] == value for path, value in said.items())


def test_a_config_file_sets_only_what_exists():
    assert {f.name for f in dataclasses.fields(Config)} >= set(to_tree(compose_config("quickstart", {})))


@pytest.mark.parametrize("key", ["method.lambda_", "optim.lr", "schedule.warmup_epochs"])
def test_a_whole_number_and_its_float_are_the_same_run(key):
    whole, point = (compose_config("quickstart", {"method": "tract", key: value}) for value in (1, 1.0))
    assert run_name(whole) == run_name(point)


def test_a_relative_root_and_the_same_absolute_root_are_one_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    roots = ("images", "./images", str(tmp_path / "images"))
    names = {run_name(compose_config("quickstart", {"data": "imagefolder", "data.root": root})) for root in roots}
    assert len(names) == 1


# -- several methods ----------------------------------------------------------------------------------


def test_a_list_of_one_method_is_that_method():
    one, listed = (compose_config("quickstart", {"method": method}) for method in ("tract", ["tract"]))
    assert to_tree(one) == to_tree(listed)


def test_several_methods_are_nodes_under_their_names_in_their_order(tmp_path):
    choices = parse_single(["method=[patchnorm,tract]", "method.tract.lambda_=0.2", f"runtime.runs={tmp_path}"])
    config = compose_config("quickstart", choices)
    single = {name: compose_config("quickstart", {"method": name}).method for name in ("patchnorm", "tract")}
    single["tract"]["lambda_"] = 0.2
    assert list(config.method) == ["name", "_target_", "patchnorm", "tract"]
    assert {name: config.method[name] for name in single} == single
    again = load_config(prepare_folder(config).config)
    assert list(build(again.method).parts) == ["patchnorm", "tract"]
    turned = compose_config("quickstart", {"method": ["tract", "patchnorm"], "method.tract.lambda_": 0.2})
    assert config_hash(again) == config_hash(config) != config_hash(turned)


def test_lambda_is_the_librarys():
    assert compose_config("quickstart", {"method": "tract"}).method["lambda_"] == DEFAULT_LAMBDA


# -- what a run folder says is data -------------------------------------------------------


def _edited(tmp_path, change):
    """A run folder whose config.yaml, and whose name to match, another hand has changed."""
    folder = _finished_folder(tmp_path)
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    change(tree)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder.rename(folder.with_name(naming.run_name(tree)))


def _system(command):
    return {"name": "digits", "_target_": "os.system", "command": command}


HARMFUL = {
    "the data": lambda tree, command: tree.update(data=_system(command)),
    "a part of the method": lambda tree, command: tree["method"].update(part=_system(command)),
    "the model": lambda tree, command: tree.update(model=_system(command)),
    "the composed method's": lambda tree, command: tree["data"].update(
        _target_="tract.methods.composed.Composed", name="other", x=_system(command)
    ),
}


@pytest.mark.parametrize("where", HARMFUL)
def test_a_run_folder_executes_nothing(where, tmp_path, capsys):
    command = f"touch {tmp_path}/executed"
    folder = _edited(tmp_path / "runs", lambda tree: HARMFUL[where](tree, command))
    assert main("quickstart", "", "quickstart", ["--resume", str(folder)]) == 2
    error = capsys.readouterr().err
    refused = r"to build what a file in .*conf/\w+ names, got '(os.system|tract.methods.composed.Composed)'"
    assert re.search(f"{refused}|unknown key data.command", error)
    assert error.count("\n") == 1
    assert not (tmp_path / "executed").exists()


def test_a_neighbours_targets_are_not_imported(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "harmful.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\ndef build(name=None): pass\n")
    node = {"name": "new", "_target_": "harmful.build"}
    folder = _edited(tmp_path / "runs", lambda tree: tree.update(model=node))
    (folder / "result.json").write_text('{"metrics": {"test/top1": 50.0}, "seconds": 1.0, "steps": 1}')
    assert main("quickstart", "", "quickstart", ["--dry-run", f"runtime.runs={tmp_path / 'runs'}"]) == 0
    assert not (tmp_path / "executed").exists()


def test_nothing_of_the_environment_lands_in_a_run_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TOKEN", "s3cret")
    words = ["runtime.data_dir=${oc.env:TOKEN}", f"runtime.runs={tmp_path}/typed"]
    assert main("quickstart", "", "quickstart", words) == 2
    assert "without ${oc.env:...}" in capsys.readouterr().err
    folder = _edited(tmp_path / "runs", lambda tree: tree["runtime"].update(data_dir="${oc.env:TOKEN}"))
    assert main("quickstart", "", "quickstart", ["--resume", str(folder)]) == 2
    assert "expected plain values in" in capsys.readouterr().err
    assert not any("s3cret" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


BOMB = "a0: &a0 [x,x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
BAD_YAML = {
    "aliases": (BOMB, "an alias (*a0) in line"),
    "itself": ("more: &more [*more]\n", "an alias (*more)"),
    "very deep": ("more: " + "[" * 50_000 + "]" * 50_000 + "\n", "nested too deeply"),
}


@pytest.mark.parametrize("kind", BAD_YAML)
def test_yaml_that_would_not_end_is_a_sentence_with_the_files_name(kind, tmp_path, capsys):
    text, words = BAD_YAML[kind]
    folder = _finished_folder(tmp_path)
    with open(folder / "config.yaml", "a") as file:
        file.write(text)
    assert main("quickstart", "", "quickstart", ["--resume", str(folder)]) == 2
    error = capsys.readouterr().err
    assert f"in {folder}/config.yaml, got: {words}" in error.replace("it is ", "")
    assert main("quickstart", "", "quickstart", ["--dry-run", f"runtime.runs={tmp_path}"]) == 0
    (folder / "result.json").write_text('{"metrics": {"test/top1": 50.0}}')
    assert tables.main(["--runs", str(tmp_path), "--no-cache"]) in (0, 2)
    assert words in "".join(capsys.readouterr()).replace("it is ", "")


def test_what_is_written_has_no_aliases(tmp_path):
    shared = [0.5]
    assert write_yaml({"a": shared, "b": shared}) == b"a:\n- 0.5\nb:\n- 0.5\n"


# -- one folder, one name -----------------------------------------------------------------


def _root(monkeypatch, place, root, data_dir="data"):
    monkeypatch.chdir(place)
    settings = {"data": "imagefolder", "data.root": root, "runtime.data_dir": data_dir}
    config = compose_config("quickstart", settings)
    return config.data["root"], run_name(config)


def test_spellings_of_a_folder_are_one_run(tmp_path, monkeypatch):
    (tmp_path / "data" / "x").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    spellings = [
        "data/x",
        "data/x/",
        "./data/x",
        "data//x",
        "data/./x",
        "data/../data/x",
        f"{tmp_path}/data/x",
        "~/data/x",
    ]
    found = {_root(monkeypatch, tmp_path, root, data) for root in spellings for data in ("data", "data/", "./data")}
    assert len(found) == 1
    assert found.pop()[0] == "data/x"
    outside = {_root(monkeypatch, tmp_path / "data", root, "elsewhere") for root in ("x", "./x/", f"{tmp_path}/data/x")}
    assert len(outside) == 1
    assert outside.pop()[0] == f"{tmp_path}/data/x"


@pytest.mark.parametrize("word", ["runtime.runs=~/runs", 'runtime.runs="~/runs"', "runtime.runs=~/runs/"])
def test_a_path_in_the_home_folder(word, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compose_config("quickstart", parse_single([word])).runtime.runs == f"{tmp_path}/runs"


def test_quotes_that_are_advised_work(tmp_path, capsys):
    assert main("quickstart", "", "quickstart", ["runtime.runs=a(b"]) == 2
    (advised,) = shlex.split(re.search(r"write (.*)\.$", capsys.readouterr().err.strip())[1])
    assert compose_config("quickstart", parse_single([advised])).runtime.runs == "a(b"


def test_without_a_home_its_sign_is_refused(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(UserError, match="there is no home; write it out"):
        compose_config("quickstart", {"runtime.runs": "~/runs"})
