"""Weights to begin with: of a run, of a checkpoint file, or timm's.

Fine-tuning and transfer begin here. What fits another number of classes or another image
size is carried over as far as it can be, and said.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from experiments.config import Config, folder_of
from experiments.training import checkpoint
from runfolder.errors import UserError
from runfolder.folder import TIMM, typed
from runfolder.states import State, state_of


def load_start(config: Config, model: nn.Module, report: Callable[[str], None]) -> None:
    """Put the weights that ``start_from`` names into a model; does nothing without.

    A position embedding of another grid is interpolated (bicubic); a classifier of another
    number of classes keeps its fresh weights. A network of another kind says by a method
    ``start_weights`` what it takes from the weights, and which of its own stay fresh.

    Args:
        config: the run that begins.
        model: the network, after ``method.apply``.
        report: gets a sentence on what was loaded.

    Raises:
        UserError: nothing readable there, an unfinished run, or the weights of another network.
    """
    if config.start_from is None:
        return
    weights, origin = _weights(config)
    weights, fresh = getattr(model, "start_weights", _as_they_are)(weights)
    own, adapted = model.state_dict(), {}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for name, tensor in weights.items():
        if name in own and own[name].shape != tensor.shape:
            if name.endswith("pos_embed"):
                tensor = _resampled(tensor, own[name])
            elif tensor.shape[1:] == own[name].shape[1:] and name not in frozen:
                fresh.append(name)
                continue
        adapted[name] = tensor
    missing = sorted(own.keys() - adapted.keys() - set(fresh))
    unknown = sorted(adapted.keys() - own.keys())
    wrong = sorted(name for name in adapted.keys() & own.keys() if adapted[name].shape != own[name].shape)
    if missing or unknown or wrong:
        words = (("none of", missing), ("unknown", unknown), ("other shapes of", wrong))
        got = "; ".join(f"{kind} {', '.join(names[:3])}" for kind, names in words if names)
        raise UserError(f"expected weights of {config.model['name']} in start_from={origin}, got {got}.")
    model.load_state_dict(adapted | {name: own[name] for name in fresh})
    report(f"starts from {origin}" + (f"; fresh: {', '.join(fresh)}" if fresh else ""))


def _as_they_are(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    return weights, []


def _weights(config: Config) -> tuple[dict[str, Tensor], str]:
    given, run = config.start_from, folder_of(config).start(config.start_from)
    if given.startswith(TIMM):
        return _of_timm(given.removeprefix(TIMM)), given
    if run is not None:
        state = state_of(run) if run.path.is_dir() else State.missing
        if state != State.finished:
            raise UserError(
                f"expected a finished run in start_from={run}, got one that is {state}; train it first "
                "(a grid of both does, and --submit makes the one wait for the other)."
            )
        path = run.newest_checkpoint()
        if path is None:
            raise UserError(f"expected a checkpoint in {run.checkpoints}, got none; give start_from=FILE.")
    else:
        path = typed(given)
    try:
        content = torch.load(io.BytesIO(checkpoint.read(path)), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"expected a checkpoint in start_from={path}, got no such file.") from None
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"expected a checkpoint in start_from={path}, got: {reason}.") from None
    weights = content.get("model", content.get("state_dict", content)) if isinstance(content, dict) else content
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"expected {{name: tensor}} (or that under 'model') in start_from={path}, got something else.")
    return weights, str(run or path)


def _of_timm(name: str) -> dict[str, Tensor]:
    import timm

    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # whatever the network, the hub or the name have to say
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"expected weights that timm can load for start_from={TIMM}{name}, got: {reason}.") from None


def _resampled(embedding: Tensor, own: Tensor) -> Tensor:
    """A position embedding (1, tokens, width) of patches only, for another grid; not antialiased, as in DeiT."""
    from timm.layers import resample_abs_pos_embed

    side = round(own.shape[1] ** 0.5)
    return resample_abs_pos_embed(embedding, [side, side], num_prefix_tokens=0, antialias=False)
