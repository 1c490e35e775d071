"""The laws that every rank of a process group checks; a failed assertion ends its process with an error."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests import reference
from tests.tract_layers import LAYERS, error
from tract import NonFiniteError, accumulate, apply_tract, second_moment, unwrap
from tract.proxprop import ProxProp
from tract.subspaces import Line, apply_subspace
from tract.subspaces.layers import set_coefficients

STEMS = ("linear", "linear few rows", "conv2d groups", "conv2d few rows", "conv1d same")
SPLITS = {"equal": (3, 3, 3, 3), "unequal": (5, 1, 2, 4)}


def main(rank, world, init_file, law):
    """Join the process group and check one law."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=world)
    globals()[law](rank, world)
    dist.barrier()
    dist.destroy_process_group()


def _problem(stem, sizes, rank, **options):
    """Plain model, DDP models without and with TrAct, and this rank's inputs; equal models on all ranks."""
    torch.manual_seed(0)
    kind, arguments, layer_options, shape = LAYERS[stem]
    plain = nn.Sequential(kind(*arguments, **layer_options), nn.Tanh()).double()
    wrapped = copy.deepcopy(plain)
    apply_tract(wrapped, 0.1, **options)
    batches = torch.randn(sum(sizes), *shape[1:]).double().split(sizes)
    return (
        plain,
        DistributedDataParallel(copy.deepcopy(plain)),
        DistributedDataParallel(wrapped),
        batches[rank],
        batches,
    )


def _gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def _assert_gradients(actual, plain_gradients, moment):
    """The first gradient is preconditioned, all others are those of plain DDP."""
    first, *others = plain_gradients
    assert error(actual[0], reference.preconditioned(first, moment, 0.1)) < 1e-10
    assert all(torch.equal(a, b) for a, b in zip(actual[1:], others, strict=True))


def global_second_moment(rank, world):
    """DDP gradient = plain DDP gradient times the inverse over the union of all ranks' rows."""
    for stem in STEMS:
        for split in SPLITS.values():
            plain, ddp, wrapped, x, batches = _problem(stem, split[:world], rank)
            moment = reference.second_moment(plain[0], torch.cat(batches[:world]))
            _assert_gradients(_gradients(wrapped, x), _gradients(ddp, x), moment)


def local_second_moment(rank, world):
    """With statistics="local" each rank applies the inverse of its own rows, and DDP averages the products."""
    for stem in STEMS:
        plain, _, wrapped, x, batches = _problem(stem, SPLITS["unequal"][:world], rank, statistics="local")
        own = [
            reference.preconditioned(_gradients(plain, batch)[0], reference.second_moment(plain[0], batch), 0.1)
            for batch in batches
        ]
        assert error(_gradients(wrapped, x)[0], sum(own) / world) < 1e-10


def _accumulated(model, parts, context):
    model.zero_grad()
    with context:
        for i, part in enumerate(parts):
            with nullcontext() if i == len(parts) - 1 else model.no_sync():
                model(part).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


def global_accumulation(rank, world):
    """All micro-batches of all ranks count as one batch, also where their numbers differ."""
    for stem in STEMS:
        sizes = (4, 6, 2, 3)[:world]
        plain, ddp, wrapped, x, batches = _problem(stem, sizes, rank)
        moment = reference.second_moment(plain[0], torch.cat(batches))
        parts = x.split(1 + rank)
        actual = _accumulated(wrapped, parts, accumulate(wrapped))
        _assert_gradients(actual, _accumulated(ddp, parts, nullcontext()), moment)


def points_of_a_line(rank, world):
    """Micro-batches at points of their own: each endpoint's plain DDP gradient times the inverse over all rows."""
    for stem in STEMS:
        sizes = (4, 6, 2, 3)[:world]
        _, _, wrapped, x, batches = _problem(stem, sizes, rank)
        model = wrapped.module
        apply_subspace(model, Line(), [copy.deepcopy(model)])
        plain = unwrap(copy.deepcopy(model))
        moment = reference.second_moment(model[0], torch.cat(batches))
        found = {}
        for network, context in ((plain, nullcontext()), (model, accumulate(model))):
            ddp = DistributedDataParallel(network)
            with context:
                for part, shares in zip(x.tensor_split(2), ((0.7, 0.3), (0.2, 0.8)), strict=True):
                    set_coefficients(network, shares)
                    with ddp.no_sync() if shares[0] == 0.7 else nullcontext():
                        ddp(part).square().mean().backward()
            found[network] = {name: p.grad for name, p in network.named_parameters()}
        for name, gradient in found[plain].items():
            expected = reference.preconditioned(gradient, moment, 0.1) if "weight" in name else gradient
            assert error(found[model][name], expected) < 1e-10


def local_accumulation(rank, world):
    """With statistics="local" each rank applies the inverse of its own micro-batches; the products are averaged."""
    for stem in STEMS:
        sizes = (4, 6, 2, 3)[:world]
        plain, _, wrapped, x, batches = _problem(stem, sizes, rank, statistics="local")
        own = [
            reference.preconditioned(
                sum(_gradients(plain, part)[0] for part in batch.split(2)),
                reference.second_moment(plain[0], batch),
                0.1,
            )
            for batch in batches
        ]
        actual = _accumulated(wrapped, x.split(2), accumulate(wrapped))
        assert error(actual[0], sum(own) / world) < 1e-10


def long_rows(rank, world):
    """Rows that are too long for an exchange of X^T X give the same gradient, whether few or many in all."""
    second_moment.SHARED_ROW_LENGTH = 5
    for stem in STEMS:
        for sizes in ((1, 2, 1, 1), (5, 1, 2, 4), (12, 1, 1, 3)):
            plain, ddp, wrapped, x, batches = _problem(stem, sizes[:world], rank)
            moment = reference.second_moment(plain[0], torch.cat(batches[:world]))
            _assert_gradients(_gradients(wrapped, x), _gradients(ddp, x), moment)
            parts = x.split(2)
            _, ddp, wrapped, *_ = _problem(stem, sizes[:world], rank)
            actual = _accumulated(wrapped, parts, accumulate(wrapped))
            _assert_gradients(actual, _accumulated(ddp, parts, nullcontext()), moment)


def rows_of_an_image(rank, world):
    """Rows of 150,528 numbers, whose second moment would take 181 GB, have the gradient of one rank with all rows."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(224 * 224 * 3, 2))
    x, sizes = torch.randn(5, 224 * 224 * 3), (2, 3)
    wrapped = copy.deepcopy(plain)
    apply_tract(wrapped, 0.1)
    mine, ddp = x.split(sizes)[rank], DistributedDataParallel(wrapped)
    gradient = (plain(x).detach() / 5).T @ torch.linalg.solve(x @ x.T / 5 + 0.1 * torch.eye(5), x)  # push-through
    for parts, context in ((mine.split(5), nullcontext()), (mine.split(1), accumulate(wrapped))):
        ddp.zero_grad()
        with context:
            for i, part in enumerate(parts):
                with nullcontext() if i == len(parts) - 1 else ddp.no_sync():
                    (ddp(part).square().sum() / 5 * world / 2).backward()  # DDP averages what is to be a sum
        assert error(wrapped[0].weight.grad, gradient) < 1e-5


def sharded(rank, world):
    """fully_shard: gradients of the shards are those of plain DDP times the global inverse, with accumulation too."""
    for stem in STEMS:
        sizes = (4, 6, 2, 3)[:world]
        plain, ddp, wrapped, x, batches = _problem(stem, sizes, rank)
        moment = reference.second_moment(plain[0], torch.cat(batches))
        model = fully_shard(copy.deepcopy(wrapped.module))
        assert isinstance(model[0].weight, DTensor)

        def whole(model=model):
            return [p.grad.full_tensor() for p in model.parameters()]

        model(x).square().mean().backward()
        first, *others = _gradients(ddp, x)
        assert error(whole()[0], reference.preconditioned(first, moment, 0.1)) < 1e-10
        assert all(error(a, b) < 1e-12 for a, b in zip(whole()[1:], others, strict=True))
        model.zero_grad()
        parts = x.split([1, len(x) - 1])  # fully_shard gathers the weights in each forward pass of all ranks
        with accumulate(model):
            model.zero_grad()
            for i, part in enumerate(parts):
                model.set_requires_gradient_sync(i == len(parts) - 1)
                model(part).square().mean().backward()
        first, *others = _accumulated(ddp, parts, nullcontext())
        assert error(whole()[0], reference.preconditioned(first, moment, 0.1)) < 1e-10
        assert all(error(a, b) < 1e-12 for a, b in zip(whole()[1:], others, strict=True))


def non_finite_input_of_one_rank(rank, world):
    """The global second moment is bad everywhere, so every rank raises and none waits for the others."""
    for stem in STEMS:
        _, _, wrapped, x, _ = _problem(stem, (3,) * world, rank)
        with pytest.raises(NonFiniteError, match="layer 0: expected finite inputs"):
            wrapped(x / 0 if rank == 1 else x)


def proximal_steps(rank, world):
    """The increment of all ranks' and micro-batches' rows together, as one process has it."""
    for stem in STEMS:
        sizes = (4, 6, 2, 3)[:world]
        plain, _, _, x, batches = _problem(stem, sizes, rank)
        for mode in ("prox_exact", "prox_cg3"):
            alone = nn.Sequential(ProxProp(copy.deepcopy(plain[0]), 0.3, mode, statistics="local"), nn.Tanh())
            ddp = DistributedDataParallel(nn.Sequential(ProxProp(copy.deepcopy(plain[0]), 0.3, mode), nn.Tanh()))
            alone(torch.cat(batches)).square().sum().backward()
            expected = [p.grad for p in alone.parameters()]
            for parts, context in (((x,), nullcontext), (x.split(1 + rank), lambda ddp=ddp: accumulate(ddp))):
                ddp.zero_grad()
                with context():
                    for i, part in enumerate(parts):
                        with nullcontext() if i == len(parts) - 1 else ddp.no_sync():
                            (ddp(part).square().sum() * world).backward()  # DDP averages what is to be a sum
                found = [p.grad for p in ddp.parameters()]
                assert all(error(a, b) < 1e-9 for a, b in zip(found, expected, strict=True))


def proximal_steps_of_long_rows(rank, world):
    """The same where A^T A is too large for an exchange, whether rows are few or many in all."""
    second_moment.SHARED_ROW_LENGTH = 5
    proximal_steps(rank, world)


def proximal_steps_of_each_rank(rank, world):
    """With statistics="local" each rank takes its own step, and DDP averages them."""
    for mode in ("prox_exact", "prox_cg3"):
        plain, _, _, x, batches = _problem("linear", (5, 3, 2, 4)[:world], rank)
        own = []
        for batch in batches[:world]:
            alone = ProxProp(copy.deepcopy(plain[0]), 0.3, mode, statistics="local")
            alone(batch).square().sum().backward()
            own.append(alone.weight.grad)
        layer = ProxProp(copy.deepcopy(plain[0]), 0.3, mode, statistics="local")
        ddp = DistributedDataParallel(nn.Sequential(layer))
        for parts, context in (((x,), nullcontext), (x.split(2), lambda ddp=ddp: accumulate(ddp))):
            ddp.zero_grad()
            with context():
                for i, part in enumerate(parts):
                    with nullcontext() if i == len(parts) - 1 else ddp.no_sync():
                        ddp(part).square().sum().backward()
            assert error(layer.weight.grad, sum(own) / world) < 1e-9


def failing_law(rank, world):
    """One rank fails: the test that starts it must notice."""
    assert rank != world - 1
