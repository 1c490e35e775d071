"""From a command line to one resolved, validated configuration.

Hydra composes the groups in ``conf/``; every value is then set and checked here, so that a
misspelt key or a bad value is one sentence. The result is a :class:`Config` of plain Python
values; nothing further in knows Hydra or OmegaConf.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.utils import get_object
from omegaconf import MISSING, DictConfig, ListConfig, Node, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from runfolder import naming
from runfolder.errors import UserError, nearest
from runfolder.failures import FailureKind
from runfolder.files import write_atomically
from runfolder.folder import RunFolder
from runfolder.plain_yaml import read_yaml, write_yaml
from runfolder.records import is_number

CONF = Path(__file__).parent / "conf"
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")  # of torch.compile; true is the first
GRAPH = "graph"  # the value of compile that makes a CUDA graph of a whole step
COMPONENTS = ("model", "data", "optim", "schedule", "method")
GROUPS = ("stage", *COMPONENTS, "debug")
# Options that came when runs had been made without them. At these values they are left out of a configuration, so that
# such a run is found under its name.
_LATER = {
    "data": {"label_noise": 0.0, "label_noise_seed": 0, "corruption": None, "severity": None},
    "optim": {"fused": None},
}
_LATER_ABOVE = {"eval_train": False, "eval_start": False, "train_images": None, "validation_images": 0}
_LATER_ABOVE |= {"validation_from": "spread", "budget_seconds": None}
_LATER_ABOVE |= {"matmul_precision": "highest", "conv_precision": "high"}
# What any optimizer may be given, and what is said where it has no such option.
_OF_ANY_OPTIMIZER = {
    "weight_decay": "takes no weight_decay, and this recipe gives it {value}; optim.weight_decay=0 trains without.",
    "fused": "has no fused kernels; leave optim.fused out.",
}
_COMPOSED = "tract.methods.composed.Composed"  # of method=[a,b]


class Loss(StrEnum):
    """What is minimised; see ``tasks/losses.py``."""

    cross_entropy = "cross_entropy"
    bce = "bce"  # binary cross-entropy per class


class Held(StrEnum):
    """Which training images are held out for validation."""

    spread = "spread"
    last = "last"


class Precision(StrEnum):
    """Number format of forward and backward passes; parameters stay float32."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Products(StrEnum):
    """What float32 products may be computed in, by torch's words."""

    highest = "highest"  # float32
    high = "high"  # TF32 on a GPU that has it
    medium = "medium"  # torch's choice below that; on a GPU TF32 too


@dataclass
class Runtime:
    """How a run is executed. Nothing here changes its result, and nothing enters its name."""

    runs: str = "runs"  # where run folders are made
    data_dir: str = "data"  # where data sets are downloaded to
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    workers: int = 2  # loader processes, where images are not kept in memory
    threads: int | None = None  # CPU threads per process; None leaves torch's choice
    deterministic: bool = True  # deterministic kernels: the same bytes after any interruption
    checkpoint_seconds: float | None = None  # between checkpoints; None: 300, or 100 times what the last one took
    checkpoint_steps: int | None = None  # and after every so many steps
    keep_checkpoints: int = 2
    log_every: int = 50  # steps between points of train/*
    deadline_minutes: float | None = None  # stop with a checkpoint before so many minutes have passed
    deadline_at: float | None = None  # the same as a time: seconds since 1970
    progress: bool = True
    heartbeat_seconds: float = 10.0  # between signs of life; after six missing ones others may take the run
    patience_seconds: float = 0.0  # how long to wait for another process that trains this run
    on_term: str = "stop"  # SIGTERM: "stop" with a checkpoint, or "save" one and go on until killed
    data_copy: str | None = None  # read the data from this copy of data.root (staging sets it)
    gpus: int = 1  # a submitted run gets so many GPUs, one rank each; 0: one rank on the CPU
    gpu_seconds_per_epoch: float | None = None  # an estimate for --dry-run until a run like it has finished
    save_outputs: bool = False  # the result's class scores of all test images, for ensembles of runs (outputs.npz)
    profile: bool = False  # torch profiler over a few steps, trace in the run folder
    anomaly: bool = False  # torch.autograd.detect_anomaly


# What belongs to one start of a run, not to the run: forgotten when it is started again.
OF_ONE_START = {
    "deadline_minutes": None,
    "deadline_at": None,
    "progress": True,
    "patience_seconds": 0.0,
    "on_term": "stop",
    "data_copy": None,
}


@dataclass
class Config:
    """One run, completely. Batch sizes are global: over all ranks and micro-batches."""

    experiment: str = MISSING
    seed: int = 0
    epochs: int = MISSING
    max_steps: int | None = None  # end (and let the schedule end) after so many steps
    budget_seconds: float | None = None  # of training, for which max_steps was chosen; only noted
    batch_size: int = MISSING
    micro_batch: int | None = None  # most images in one forward pass of one rank; more are accumulated
    drop_last: bool = False
    eval_every: int = 1  # epochs; the last epoch is always evaluated
    eval_batch_size: int = 1000
    eval_images: int | None = None  # evaluate on so many test images, spread evenly; None: on all
    eval_train: bool = False  # evaluate on the training images too, unaugmented, as fit/*
    eval_start: bool = False  # evaluate before the first step too, as epoch 0
    train_images: int | None = None  # train on so many of the training images, spread evenly; None: on all
    validation_images: int = 0  # so many training images are not trained on, but evaluated as val/*
    validation_from: Held = Held.spread  # which ones: spread evenly, or the last
    loss: Loss = Loss.cross_entropy
    label_smoothing: float = 0.0
    mixup: float = 0.0  # alpha of Mixup; with cutmix too, each group gets one of the two
    cutmix: float = 0.0  # alpha of CutMix
    mix_group: int | None = None  # images that are mixed alike, of each other; None: the whole batch
    repeats: int = 1  # repeated augmentation: an epoch has so many copies of each of images / repeats images
    precision: Precision = Precision.fp32
    matmul_precision: Products = Products.highest  # of float32 matrix products
    conv_precision: Products = Products.high  # of float32 convolutions on a GPU: highest, or high as torch has it
    channels_last: bool = False
    compile: bool | str = False  # torch.compile's mode, or "graph": a whole step as one CUDA graph
    ema_decay: float | None = None
    clip_grad_norm: float | None = None
    decay_matrices_only: bool = False  # no weight decay for 1-D tensors, position embeddings and class tokens
    bias_lr: float = 1.0  # the learning rate of biases is so many times that of other parameters
    start_from: str | None = None  # weights to begin with: a run's name or folder, a checkpoint, timm:NAME
    overfit_batches: int | None = None  # train on the first so many batches again and again, unaugmented
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)  # tables that values are derived from; empty once resolved
    runtime: Runtime = field(default_factory=Runtime)


ConfigStore.instance().store(name="schema", node=Config)


def _value_of_nearest(table: DictConfig, key: float) -> Any:
    """The entry whose (positive, numeric) key is nearest to ``key`` in ratio."""
    return table[min(table, key=lambda entry: abs(math.log(float(entry) / key)))]


def _value_of_choice(table: DictConfig, choice: str, *, _node_: Node) -> Any:
    """The entry of a recipe for the component that was chosen."""
    if choice not in table:
        key, known = _node_._get_full_key(None), ", ".join(map(str, table))
        raise UserError(f"this recipe has no {key} for {choice}, only for {known}; give {key}=VALUE.")
    return table[choice]


def _value_of_recipe(key: str, default: Any, *, _root_: DictConfig) -> Any:
    """What a recipe says of a component, or what the component's file does."""
    default = OmegaConf.create(default) if isinstance(default, list | dict) else default
    return OmegaConf.select(_root_.recipe, key, default=default)


OmegaConf.register_new_resolver("nearest", _value_of_nearest, replace=True)
OmegaConf.register_new_resolver("listed", _value_of_choice, replace=True)
OmegaConf.register_new_resolver("of_recipe", _value_of_recipe, replace=True)


def _refuse_environment(*_: Any) -> None:
    raise UserError(
        "expected values without ${oc.env:...}, since a run's folder keeps them; let the shell insert what may be seen."
    )


OmegaConf.register_new_resolver("oc.env", _refuse_environment, replace=True)
OmegaConf.register_new_resolver("python", get_object, replace=True)  # a value that the code has, by its dotted name


def parse_overrides(arguments: list[str]) -> dict[str, list[Any]]:
    """Command-line overrides as {key: list of values}; ``seed=0,1`` gives two values.

    Raises:
        UserError: not of the form key=value, or with Hydra's + or ~ (every key exists already).
    """
    parsed: dict[str, list[Any]] = {}
    for text in arguments:
        key, equals, value = text.partition("=")
        if value.startswith("~") and '"' not in value:
            text = f'{key}="{value}"'  # a path
        try:
            (override,) = OverridesParser.create().parse_overrides([text])
        except OverrideParseException:
            cure = f"""; with special characters write {shlex.quote(f'{key}="{value}"')}""" if equals else ""
            raise UserError(f"expected key=value, got {text!r}{cure}.") from None
        key = override.key_or_group
        if not text.startswith(f"{key}="):
            raise UserError(
                f"expected key=value, got {text!r}; every key exists already, so +, ~ and @ are not needed."
            )
        if key in parsed:
            raise UserError(f"{key} is given twice; several values are written {key}=A,B.")
        try:
            values = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
        except HydraException:
            raise UserError(f"expected values one by one, got {text!r}; write {key}=A,B.") from None
        parsed[key] = [OmegaConf.create(v) if isinstance(v, dict | list) else v for v in values]
    return parsed


def parse_single(arguments: list[str]) -> dict[str, Any]:
    """Overrides of one run: {key: value}.

    Raises:
        UserError: as :func:`parse_overrides`, and where a key has several values.
    """
    parsed = parse_overrides(arguments)
    for key, values in parsed.items():
        if len(values) > 1:
            raise UserError(
                f"{key} has {len(values)} values, which are several runs; add --local, --submit or --dry-run."
            )
    return {key: values[0] for key, values in parsed.items()}


def compose_config(experiment: str, overrides: dict[str, Any]) -> Config:
    """The resolved, validated configuration of one run.

    Args:
        experiment: the name of a file in ``conf/``.
        overrides: {dotted key or group: value}.

    Raises:
        UserError: an unknown key, group or choice (with the nearest valid names) or a bad value.
    """
    choices = _choices_of_source(experiment, overrides)
    choices |= {key: value for key, value in overrides.items() if key in GROUPS}
    if isinstance(choices.get("method"), list | ListConfig):
        tree = _with_methods(experiment, choices, list(choices["method"]))
    else:
        tree = _chosen(experiment, choices)
    known = _flat_keys(tree)
    for key, value in overrides.items():
        if key not in GROUPS:
            _set(tree, key, value, known)
    if (derived := tree.recipe.get("derived")) is not None:  # by the function of this dotted name
        for key, value in get_object(derived)(experiment, overrides, tree).items():
            _set(tree, key, value, known)
    config = from_tree(tree)
    if config.start_from is not None and "?" in config.start_from:
        config.start_from = _run_by_choices(experiment, overrides, config.start_from)
    return config


def _choices_of_source(experiment: str, overrides: dict[str, Any]) -> dict[str, Any]:
    """The groups that ``recipe.source`` chooses: those of the recipe's tables {source: choice} that are called so."""
    recipe = _compose_groups(CONF, experiment, ()).recipe
    usual = recipe.get("source")
    source = overrides.get("recipe.source", usual)
    tables = {key: table for key, table in recipe.items() if isinstance(table, DictConfig) and usual in table}
    for table in tables.values():
        if source not in table:
            raise UserError(f"unknown choice recipe.source={source}; {nearest(str(source), map(str, table))}.")
    return {group: table[source] for group, table in tables.items() if group in GROUPS}


def _chosen(experiment: str, choices: dict[str, Any]) -> DictConfig:
    """The tree with these choices of groups; a copy."""
    words = tuple((group, str(choice)) for group, choice in choices.items())
    for group, choice in words:
        _require_choice(group, choice)
    return copy.deepcopy(_compose_groups(CONF, experiment, words))


def _with_methods(experiment: str, choices: dict[str, Any], names: list[str]) -> DictConfig:
    """The tree with several methods; their order is that of the names."""
    _require(0 < len(names) == len(set(names)), "method", "one method or different ones", names)
    tree = _chosen(experiment, choices | {"method": names[0]})
    if len(names) > 1:
        nodes = {name: _chosen(experiment, choices | {"method": name}).method for name in names}
        with open_dict(tree):
            tree.method = {"name": naming.AND.join(names), naming.TARGET: _COMPOSED} | nodes
    return tree


def _run_by_choices(experiment: str, overrides: dict[str, Any], query: str) -> str:
    """The name of the run that ``EXPERIMENT?KEY=VALUE&...`` describes.

    Without an experiment: this one, with all choices of the run itself but those given. Of
    another experiment only seed, model and method are taken over.
    """
    name, _, choices = query.partition("?")
    taken = overrides
    if name not in ("", experiment):
        taken = {key: value for key, value in overrides.items() if key.split(".")[0] in ("seed", "model", "method")}
    before = compose_config(name or experiment, taken | parse_single(choices.split("&")))
    return run_name(before) if name in ("", experiment) else f"{name}/{run_name(before)}"


def from_tree(tree: DictConfig | dict) -> Config:
    """A :class:`Config` from a composed tree, which is used up, or from the content of a ``config.yaml``.

    Raises:
        UserError: unknown keys, missing or bad values.
    """
    try:
        tree = tree if isinstance(tree, DictConfig) else OmegaConf.merge(_schema(), tree)
        OmegaConf.resolve(tree)
        tree.recipe = {}
        config = OmegaConf.to_object(tree)
        _name_folders(config)
    except MissingMandatoryValue as error:
        raise UserError(f"expected a value for {error.full_key}, got none; give {error.full_key}=VALUE.") from None
    except OmegaConfBaseException as error:
        if (refusal := _refusal_of_resolver(error)) is not None:
            raise refusal from None
        where = f"bad value for {error.full_key}" if error.full_key else "configuration"
        raise UserError(f"{where}: {_first_line(error)}.") from None
    validate(config)
    if config.compile == COMPILE_MODES[0]:
        config.compile = True  # one run has one name
    for group, usual in _LATER.items():
        node = getattr(config, group)
        setattr(config, group, {key: value for key, value in node.items() if key not in usual or value != usual[key]})
    return config


def _refusal_of_resolver(error: BaseException | None) -> UserError | None:
    """What a resolver has raised, from the error that OmegaConf makes of it."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


@functools.cache
def _schema() -> DictConfig:
    return OmegaConf.structured(Config)


def _name_folders(config: Config) -> None:
    """One folder has one name, however it is spelled and from wherever a run is started or resumed.

    A ``data.root`` in the machine's ``runtime.data_dir`` is named by that; others are absolute.
    """
    runtime, root = config.runtime, config.data.get("root")
    runtime.runs, runtime.data_dir = _tidy("runtime.runs", runtime.runs), _tidy("runtime.data_dir", runtime.data_dir)
    if config.start_from is not None and config.start_from.endswith((".pt", ".pth")):
        config.start_from = _tidy("start_from", config.start_from)
    if isinstance(root, str):
        pair = (("data.root", root), ("runtime.data_dir", runtime.data_dir))
        root, shared = (Path(_tidy(key, path)).absolute() for key, path in pair)
        inside = root.is_relative_to(shared)
        config.data["root"] = str(Path(runtime.data_dir, root.relative_to(shared)) if inside else root)


def _tidy(key: str, path: str) -> str:
    """A path without ~, doubled and final slashes, and steps up; relative where it was."""
    try:
        tidy = Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"expected a path for {key}, got {path!r}, and there is no home; write it out.") from None
    return (
        os.path.relpath(tidy.resolve())
        if ".." in tidy.parts and not tidy.is_absolute()
        else (str(tidy.resolve() if ".." in tidy.parts else tidy))
    )


def load_config(path: Path) -> Config:
    """The configuration in an existing run folder.

    Components are looked up by their names, wherever their code lies today.

    Raises:
        UserError: no such file, or not a configuration.
    """
    try:
        tree = read_yaml(path)
    except OSError:
        raise UserError(
            f"expected a run folder with a config.yaml, got {path.parent}; `ls runs/*` shows them."
        ) from None
    except ValueError as error:
        raise UserError(f"expected a configuration in {path}, got: {error}; start the run again elsewhere.") from None
    if not isinstance(tree, dict):
        raise UserError(f"expected a configuration in {path}, got {type(tree).__name__}; start the run again.")
    for key, value in naming.flatten(tree).items():
        if "${" in str(value):
            raise UserError(f"expected plain values in {path}, got {key}={value}; start the run again elsewhere.")
    for group in COMPONENTS:
        node = tree.get(group)
        if isinstance(node, dict) and node.get("name") in choices_of(group):
            node[naming.TARGET] = yaml.safe_load((CONF / group / f"{node['name']}.yaml").read_text())[naming.TARGET]
    return from_tree(tree)


def to_tree(config: Config) -> dict[str, Any]:
    """The configuration as plain dictionaries, lists and scalars."""
    tree = asdict(config)
    for key in ("precision", "matmul_precision", "conv_precision", "loss", "validation_from"):
        tree[key] = str(tree[key].value)
    for key, usual in _LATER_ABOVE.items():
        if tree[key] == usual:
            del tree[key]
    return tree


def config_hash(config: Config) -> str:
    """See :func:`runfolder.naming.config_hash`."""
    return naming.config_hash(to_tree(config))


def run_name(config: Config) -> str:
    """Readable words plus the configuration's hash: the name of the run's folder."""
    return naming.run_name(to_tree(config))


def folder_of(config: Config) -> RunFolder:
    """Where this run lives: ``RUNS/EXPERIMENT/NAME-HASH``."""
    return RunFolder(Path(config.runtime.runs) / config.experiment / run_name(config))


def prepare_folder(config: Config) -> RunFolder:
    """Make the run folder; write its ``config.yaml``, with this start's ``runtime``.

    Not for a run that another process is training.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = folder_of(config)
    text = write_yaml(to_tree(config))
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        if not folder.config.exists() or folder.config.read_bytes() != text:
            write_atomically(folder.config, text)
    except OSError as error:
        raise UserError(
            f"expected a folder that can be written, got {folder}: {error.strerror}.", FailureKind.disk
        ) from None
    return folder


def build(node: dict[str, Any], **given: Any) -> Any:
    """Call the ``_target_`` of a component with its options, parts made first, and what the caller gives."""
    parts = {key: build(part) for key, part in naming.parts(node).items()}
    return get_object(node[naming.TARGET])(**options_of(node) | parts, **given)


def options_of(node: dict[str, Any]) -> dict[str, Any]:
    """A component's options: all but its name and target."""
    return {key: value for key, value in node.items() if key not in ("name", naming.TARGET)}


def validate(config: Config) -> None:
    """Check what types cannot: ranges, and each component's options against its signature.

    Raises:
        UserError: naming the key, what was expected and what came.
    """
    for key in ("epochs", "batch_size", "eval_every", "eval_batch_size"):
        _require(getattr(config, key) >= 1, key, "at least 1", getattr(config, key))
    if not (config.eval_start and config.max_steps == 0):  # an evaluation of what it starts from
        _require_one_or_null("max_steps", config.max_steps)
    budget = config.budget_seconds
    _require(budget is None or 0 < budget < math.inf, "budget_seconds", "above 0 or null", budget)
    for key in ("micro_batch", "mix_group", "eval_images", "train_images", "overfit_batches"):
        _require_one_or_null(key, getattr(config, key))
    _require(0 <= config.seed < 2**32, "seed", "0 to 2^32 - 1", config.seed)
    _require(0 <= config.label_smoothing < 1, "label_smoothing", "0 <= value < 1", config.label_smoothing)
    if config.loss is Loss.bce:
        _require(config.label_smoothing == 0, "label_smoothing", "0 with loss=bce", config.label_smoothing)
    for key in ("mixup", "cutmix"):
        _require(getattr(config, key) >= 0, key, "0 or more", getattr(config, key))
    modes = (*COMPILE_MODES, GRAPH)
    _require(config.compile in (False, True, *modes), "compile", f"true, false, {', '.join(modes)}", config.compile)
    _require(config.repeats >= 1, "repeats", "at least 1", config.repeats)
    held = config.validation_images
    _require(held >= 0, "validation_images", "0 or more", held)
    whole = held == 0 and config.train_images is None
    _require(whole or config.repeats == 1, "repeats", "1 with validation_images or train_images", config.repeats)
    _require(
        config.ema_decay is None or 0 < config.ema_decay < 1, "ema_decay", "0 < value < 1 or null", config.ema_decay
    )
    _require(0 < config.bias_lr < math.inf, "bias_lr", "a number above 0", config.bias_lr)
    conv = config.conv_precision
    _require(conv is not Products.medium, "conv_precision", "highest or high", conv.value)
    clip = config.clip_grad_norm
    _require(clip is None or clip > 0, "clip_grad_norm", "above 0 or null", clip)
    runtime = config.runtime
    _require(runtime.workers >= 0, "runtime.workers", "0 or more", runtime.workers)
    seconds = runtime.checkpoint_seconds
    _require(seconds is None or seconds >= 0, "runtime.checkpoint_seconds", "0 or more, or null", seconds)
    _require(runtime.keep_checkpoints >= 1, "runtime.keep_checkpoints", "at least 1", runtime.keep_checkpoints)
    _require(runtime.log_every >= 1, "runtime.log_every", "at least 1", runtime.log_every)
    for key in ("heartbeat_seconds", "gpu_seconds_per_epoch"):
        value = getattr(runtime, key)
        _require(value is None or value > 0, f"runtime.{key}", "above 0", value)
    _require(runtime.patience_seconds >= 0, "runtime.patience_seconds", "0 or more", runtime.patience_seconds)
    _require(runtime.on_term in ("stop", "save"), "runtime.on_term", "stop or save", runtime.on_term)
    _require(runtime.gpus >= 0, "runtime.gpus", "0 or more", runtime.gpus)
    for key in ("threads", "checkpoint_steps"):
        _require_one_or_null(f"runtime.{key}", getattr(runtime, key))
    deadline = runtime.deadline_minutes
    _require(deadline is None or deadline > 0, "runtime.deadline_minutes", "above 0 or null", deadline)
    for group in COMPONENTS:
        _check_component(group, getattr(config, group))
    rates = {"lr": config.optim.get("lr")} | {k: v for k, v in config.optim.items() if k.endswith("_lr")}
    for key, rate in rates.items():
        _require(isinstance(rate, int | float) and 0 < rate < math.inf, f"optim.{key}", "a number above 0", rate)
    try:
        build(config.method)
    except (TypeError, ValueError) as error:
        raise UserError(f"method: {error}") from None
    for key, value in options_of(config.model).items():
        if isinstance(value, int) and not isinstance(value, bool):
            _require(value >= 1, f"model.{key}", "at least 1", value)
    for key, value in {"data.padding": config.data, "schedule.warmup_epochs": config.schedule}.items():
        number = value.get(key.split(".")[1], 0)
        _require(number >= 0, key, "0 or more", number)


@functools.cache
def _targets_of(conf: Path, group: str) -> set[str]:
    """What the files of a group build; nothing else is ever imported, whatever a run folder says."""
    return {yaml.safe_load(path.read_text())[naming.TARGET] for path in (conf / group).glob("*.yaml")}


def _check_component(group: str, node: dict[str, Any]) -> None:
    if naming.TARGET not in node:
        raise UserError(f"expected {group}=NAME with one of {', '.join(choices_of(group))}, got none.")
    target = node[naming.TARGET]
    if target not in _targets_of(CONF, group.split(".")[0]) and (group, target) != ("method", _COMPOSED):
        raise UserError(f"expected {group} to build what a file in {CONF / group.split('.')[0]} names, got {target!r}.")
    parameters, parts = _parameters_of(node[naming.TARGET]), naming.parts(node)
    for key, part in parts.items():
        _check_component(f"{group}.{key}", part)
    for key, value in options_of(node).items():
        if key in parts:
            continue
        if key not in parameters and group == "optim" and key in _OF_ANY_OPTIMIZER:
            if value:
                raise UserError(f"{node.get('name')} {_OF_ANY_OPTIMIZER[key].format(value=value)}")
            del node[key]
            continue
        if key not in parameters:
            raise UserError(f"unknown key {group}.{key}; {nearest(key, parameters)}.")
        expected = parameters[key].annotation
        if not _accepts(expected, value):
            raise UserError(f"expected {group}.{key} to be {_readable(expected)}, got {value!r}.")
        if type(value) is int and "float" in _options(expected):
            node[key] = float(value)  # 1 and 1.0 are the same run


@functools.cache
def _parameters_of(target: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(get_object(target)).parameters


def _accepts(annotation: Any, value: Any) -> bool:
    checks = {
        "int": isinstance(value, int) and not isinstance(value, bool),
        "float": is_number(value),
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
        "list": isinstance(value, list) and all(map(is_number, value)),
        "None": value is None,
    }
    return any(checks.get(option, True) for option in _options(annotation))


def _readable(annotation: Any) -> str:
    words = {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "a word",
        "list": "a list of numbers",
        "None": "null",
    }
    return " or ".join(words.get(option, option) for option in _options(annotation))


def _options(annotation: Any) -> list[str]:
    """["list", "None"] for ``tuple[float, float] | None``: what a value from YAML may be."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    options = (option.strip() for option in re.sub(r"(list|tuple)(\[.*?\])?", "list", text).split("|"))
    return [option for option in options if option != "torch.Tensor"]


def choices_of(group: str) -> list[str]:
    """The names that ``group=NAME`` takes."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _require_choice(group: str, choice: str) -> None:
    if choice not in choices_of(group):
        raise UserError(f"unknown choice {group}={choice}; {nearest(choice, choices_of(group))}.")


@functools.cache
def _compose_groups(conf: Path, experiment: str, choices: tuple[tuple[str, str], ...]) -> DictConfig:
    # A component's keys must exist before they are set, so the tree is closed to new ones.
    with initialize_config_dir(str(conf), version_base="1.3"):
        try:
            tree = compose(experiment, [f"{group}={choice}" for group, choice in choices])
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"configuration {experiment}: {_first_line(error)}") from None
    OmegaConf.set_struct(tree, True)
    return tree


def _set(tree: DictConfig, key: str, value: Any, known: set[str]) -> None:
    if key not in known:
        raise UserError(f"unknown key {key}; {nearest(key, {*known, *GROUPS})}.")
    try:
        OmegaConf.update(tree, key, value, merge=False)
    except OmegaConfBaseException as error:
        raise UserError(f"bad value for {key}: {_first_line(error)}.") from None


def _flat_keys(tree: DictConfig) -> set[str]:
    """The keys that a person may set; the script decides the experiment, a group's choice the name."""
    keys = naming.flatten(OmegaConf.to_container(tree))
    return {key for key in keys if key != "experiment" and not key.endswith((naming.TARGET, ".name"))}


def _require(condition: bool, key: str, expected: str, got: Any) -> None:
    if not condition:
        raise UserError(f"expected {key} to be {expected}, got {got!r}.")


def _require_one_or_null(key: str, value: int | None) -> None:
    _require(value is None or value >= 1, key, "at least 1 or null", value)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")
