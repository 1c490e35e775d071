"""Several methods as one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from tract.methods.base import Measure, Method, Occasion, Predictor, Setting

_T = TypeVar("_T")


class Composed(Method):
    """Each hook of every part, the first part's first: in the order in which they are named, and of their ``order``.

    A later part finds the model as the earlier ones have made it, and a layer may then have
    another name: after PatchNorm the embedding "emb" is "emb.embedding". Another network that
    it asks for is made in the same way. Parameter groups are
    the parts' groups cut by each other. What is evaluated are the predictors of the parts that
    say so themselves; a later part's tag that is taken gets the part's name in front.

    Args:
        parts: the methods by name.

    Raises:
        ValueError: one part changes shapes that another needs; (of hooks) two parts claim the same parameter, or
            give it different options.

    Example:
        >>> from tract.methods.patchnorm import PatchNormMethod
        >>> from tract.methods.tract import TrActMethod
        >>> both = Composed(tract=TrActMethod(0.1, None, "global"), patchnorm=PatchNormMethod(None))
        >>> _ = both.apply(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
    """

    def __init__(self, **parts: Method):
        if not parts:
            raise ValueError("expected at least one method, got none.")
        self._named = list(parts)
        self.parts = dict(sorted(parts.items(), key=lambda item: item[1].order))
        self._require_kept_shapes()
        self.advice = tuple(dict.fromkeys(advice for part in parts.values() for advice in part.advice))
        self.pieces = math.lcm(*(part.pieces for part in parts.values()))

    @property
    def replayable(self) -> bool:
        """Whether all parts are."""
        return all(part.replayable for part in self.parts.values())

    def _require_kept_shapes(self) -> None:
        for name, part in self.parts.items():
            for other, changing in self.parts.items():
                if part.keeps_shapes and changing.changes_shapes:
                    raise ValueError(
                        f"expected weights that keep their shapes for {name}, got {other}, which changes them while "
                        "it trains; leave one of them out."
                    )

    def prepare(self, setting: Setting) -> None:
        """All parts, one after the other; each gets other networks as the parts before it make them."""
        before: list[Method] = []

        def another(earlier: list[Method]) -> nn.Module:
            model = setting.another()
            for part in earlier:
                part.apply(model)
            return model

        for part in self.parts.values():
            part.prepare(replace(setting, another=partial(another, list(before))))
            before.append(part)

    def apply(self, model: nn.Module) -> str | None:
        """Apply all; none may claim what another claims, or put something else in its place."""
        said, claimed = [], {}
        for name, part in self.parts.items():
            said.append(part.apply(model))
            names = {parameter: name for name, parameter in model.named_parameters()}
            claimed |= {parameter: (name, names.get(parameter)) for parameter in part.claims(model)}
        self._require_different_claims(model)
        present = set(model.parameters())
        for parameter, (owner, name) in claimed.items():
            if parameter not in present:
                raise ValueError(
                    f"expected {name} to stay as {owner} has made it, got a later method that replaces it; give that "
                    "one another layer, or leave it out."
                )
        return "; ".join(filter(None, said)) or None

    def _require_different_claims(self, model: nn.Module) -> None:
        names = {parameter: name for name, parameter in model.named_parameters()}
        owners: dict[nn.Parameter, str] = {}
        for name, part in self.parts.items():
            for parameter in part.claims(model):
                other = owners.setdefault(parameter, name)
                if other != name:
                    first, second = sorted((other, name), key=self._named.index)
                    raise ValueError(
                        f"expected methods that leave each other's layers alone, got {first} and {second} both on "
                        f"{names[parameter]}; give one of them another layer, or leave it out."
                    )

    def claims(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Those of all parts."""
        return [parameter for part in self.parts.values() for parameter in part.claims(model)]

    def match(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        """All parts, one after the other."""
        for part in self.parts.values():
            part.match(model, weights)

    def param_groups(self, model: nn.Module) -> list[dict]:
        """The parts' groups cut by each other: parameters are together if they are in every part, with all options."""
        names = {parameter: name for name, parameter in model.named_parameters()}
        first, *others = (part.param_groups(model) for part in self.parts.values())
        groups = [group | {"params": list(group["params"])} for group in first]
        for more in others:
            more = [group | {"params": list(group["params"])} for group in more]
            cuts = [_cut(group, other, names) for group in groups for other in more]
            groups = [group for group in cuts if group["params"]]
        return groups

    def before_step(self, model: nn.Module, step: int) -> None:
        """All parts, one after the other."""
        for part in self.parts.values():
            part.before_step(model, step)

    def before_part(self, model: nn.Module, step: int, part: int, parts: int) -> None:
        """All parts, one after the other."""
        for method in self.parts.values():
            method.before_part(model, step, part, parts)

    @contextmanager
    def accumulating(self, model: nn.Module) -> Iterator[None]:
        """All parts' contexts, the first part's outermost."""
        with ExitStack() as stack:
            for part in self.parts.values():
                stack.enter_context(part.accumulating(model))
            yield

    def penalty(self, model: nn.Module) -> Tensor | None:
        """The sum of the parts' penalties."""
        terms = [term for part in self.parts.values() if (term := part.penalty(model)) is not None]
        return sum(terms[1:], terms[0]) if terms else None

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """All parts, one after the other."""
        for part in self.parts.values():
            part.after_step(model, optimizer, step)

    def carry_average(self, before: nn.Module, after: nn.Module) -> None:
        """All parts, one after the other."""
        for part in self.parts.values():
            part.carry_average(before, after)

    def after_average(self, model: nn.Module, average: nn.Module) -> None:
        """All parts, one after the other."""
        for part in self.parts.values():
            part.after_average(model, average)

    def evaluated(self, model: nn.Module, occasion: Occasion) -> Iterator[tuple[str, Predictor]]:
        """What the parts say is evaluated; the model itself where none says anything."""
        own = {name: part for name, part in self.parts.items() if type(part).evaluated is not Method.evaluated}
        yield from self._tagged((name, part.evaluated(model, occasion)) for name, part in own.items())
        if not own:
            yield from super().evaluated(model, occasion)

    @staticmethod
    def _tagged(found: Iterable[tuple[str, Iterator[tuple[str, _T]]]]) -> Iterator[tuple[str, _T]]:
        taken = set()
        for name, tagged in found:
            for tag, what in tagged:
                tag = f"{name}/{tag}" if tag in taken else tag
                taken.add(tag)
                yield tag, what

    def measured(self, model: nn.Module, occasion: Occasion) -> Iterator[tuple[str, Measure]]:
        """Those of all parts, with tags as of :meth:`evaluated`."""
        yield from self._tagged((name, part.measured(model, occasion)) for name, part in self.parts.items())

    def metrics(self, model: nn.Module) -> Iterator[tuple[str, float]]:
        """Those of all parts."""
        for part in self.parts.values():
            yield from part.metrics(model)


def _cut(group: dict, other: dict, names: dict[nn.Parameter, str]) -> dict:
    """The parameters of both groups, with the options of both."""
    of_other = set(other["params"])
    both = [parameter for parameter in group["params"] if parameter in of_other]
    for option in group.keys() & other.keys() - {"params"}:
        if both and group[option] != other[option]:
            raise ValueError(
                f"expected methods that agree on {names[both[0]]}, got {option}={group[option]} and "
                f"{option}={other[option]}; leave one of them out."
            )
    return group | other | {"params": both}
