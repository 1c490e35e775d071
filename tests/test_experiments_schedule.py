import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, SequentialLR

from experiments.config import build, compose_config
from experiments.training.schedule import Constant, Cosine, EpochCosine, MultiStep


def _torch_rates(make, steps, rate=0.1):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def _our_rates(schedule, per_epoch, steps, rate=0.1):
    return [rate * schedule.factor(step, per_epoch, steps) for step in range(steps)]


PER_EPOCH, EPOCHS = 13, 9
STEPS = PER_EPOCH * EPOCHS


def _after_warmup(optimizer, warmup, scheduler):
    # LinearLR cannot start at factor 0, so that step is compared by itself below.
    start = LinearLR(optimizer, start_factor=1e-12, end_factor=1.0, total_iters=warmup)
    return SequentialLR(optimizer, [start, scheduler], [warmup])


CASES = {
    "cosine": (Cosine(0.0, 0.0), lambda o: CosineAnnealingLR(o, STEPS)),
    "cosine to a tenth": (Cosine(0.0, 0.1), lambda o: CosineAnnealingLR(o, STEPS, eta_min=0.01)),
    "cosine after warm-up": (
        Cosine(2.0, 0.0),
        lambda o: _after_warmup(o, 2 * PER_EPOCH, CosineAnnealingLR(o, STEPS - 2 * PER_EPOCH)),
    ),
    "steps": (
        MultiStep([4, 7], 0.2, 0.0),
        lambda o: MultiStepLR(o, [4 * PER_EPOCH, 7 * PER_EPOCH], gamma=0.2),
    ),
    "constant after warm-up": (
        Constant(1.0),
        lambda o: LinearLR(o, start_factor=1e-12, end_factor=1.0, total_iters=PER_EPOCH),
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_schedules_equal_torchs_stepped_every_iteration(case):
    schedule, make = CASES[case]
    expected = torch.tensor(_torch_rates(make, STEPS), dtype=torch.float64)
    got = torch.tensor(_our_rates(schedule, PER_EPOCH, STEPS), dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


# weiaicunzai/pytorch-cifar100 @ 11d8418: 391 iterations; epochs numbered from 1; epoch 1 warms up with
# 0.1 i / 391, then 0.1 to epoch 59, 0.02 to 119, 0.004 to 159, 0.0008 to 200.
def _published(epoch, i):
    if epoch == 1:
        return 0.1 * i / 391
    return 0.1 if epoch < 60 else 0.02 if epoch < 120 else 0.004 if epoch < 160 else 0.0008


def test_the_steps_of_pytorch_cifar100():
    schedule = build(compose_config("cifar_resnet", {"schedule": "multistep"}).schedule)
    for epoch in range(1, 201):
        for i in range(391):
            rate = 0.1 * schedule.factor((epoch - 1) * 391 + i, 391, 200 * 391)
            assert math.isclose(rate, _published(epoch, i), rel_tol=1e-12), (epoch, i)


def test_milestones_in_proportion_to_the_epochs():
    """pytorch-cifar100's schedule shortened to 133 epochs, ImageNet's thirds for 30, 60 and 90."""
    shortened = MultiStep([59, 119, 159], 0.2, 1.0, 200.0)
    drops = [
        e
        for e in range(1, 133)
        if shortened.factor(e * 391, 391, 133 * 391) < shortened.factor(e * 391 - 1, 391, 133 * 391)
    ]
    assert drops == [39, 79, 106]
    whole = MultiStep([59, 119, 159], 0.2, 1.0)
    scaled = MultiStep([59, 119, 159], 0.2, 1.0, 200.0)
    assert _our_rates(whole, 5, 1000) == _our_rates(scaled, 5, 1000)
    for epochs in (30, 60, 90):
        thirds = MultiStep([30, 60], 0.1, 0.0, 90.0)
        rates = [thirds.factor(e * 10, 10, epochs * 10) for e in range(epochs)]
        third = epochs // 3
        assert rates == pytest.approx([1.0] * third + [0.1] * third + [0.01] * third)


# Rates by epoch of DeiT-III's ViT-S and ViT-B pre-training, replayed with the original's scheduler.
DEIT = {
    (4e-3, 800): {0: 1e-6, 1: 1e-6, 2: 8.008e-4, 4: 2.4004e-3, 5: 3.2002e-3, 6: 3.9996154e-3,
                  400: 2.0128343e-3, 799: 1.006153e-5},
    (3e-3, 800): {0: 1e-6, 1: 1e-6, 2: 6.008e-4, 4: 1.8004e-3, 5: 2.4002e-3, 6: 2.9997118e-3,
                  400: 1.5108708e-3, 799: 1.0046109e-5},
    (4e-3, 400): {0: 1e-6, 1: 1e-6, 2: 8.008e-4, 6: 3.9984619e-3, 200: 2.0206685e-3, 399: 1.0246118e-5},
    (3e-3, 400): {0: 1e-6, 1: 1e-6, 2: 6.008e-4, 6: 2.9988474e-3, 200: 1.5167416e-3, 399: 1.0184434e-5},
}  # fmt: skip


@pytest.mark.parametrize(("lr", "epochs"), DEIT)
def test_the_rates_of_deit(lr, epochs):
    schedule, steps = EpochCosine(lr, 5.0, 1e-6, 1e-5), 625
    for epoch, rate in DEIT[lr, epochs].items():
        for step in (0, steps - 1):
            assert lr * schedule.factor(epoch * steps + step, steps, epochs * steps) == pytest.approx(rate, rel=1e-7)


@pytest.mark.parametrize("schedule", [Cosine(2.0, 0.0), MultiStep([1], 0.1, 2.0), Constant(2.0)])
def test_warm_up_rises_in_equal_steps_from_zero_to_one(schedule):
    factors = [schedule.factor(step, 10, 100) for step in range(21)]
    assert factors[:20] == pytest.approx([step / 20 for step in range(20)])
    assert factors[20] == pytest.approx(0.1 if isinstance(schedule, MultiStep) else 1.0)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_short_runs_keep_the_ends_of_the_cosine(steps):
    schedule = Cosine(0.0, 0.25)
    assert schedule.factor(0, 10, steps) == 1.0
    assert schedule.factor(steps, 10, steps) == pytest.approx(0.25)


def test_milestones_in_any_order():
    assert _our_rates(MultiStep([7, 4], 0.2, 0.0), 5, 50) == _our_rates(MultiStep([4, 7], 0.2, 0.0), 5, 50)
