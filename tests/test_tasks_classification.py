"""Losses and mixing of images against their definitions."""

import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy

from experiments.tasks.losses import binary_cross_entropy, cross_entropy
from experiments.tasks.mixing import Mixing


def _batch(count=12, classes=7, size=16):
    return torch.rand(count, 3, size, size), torch.arange(count) % classes


def test_cross_entropy_is_a_sum_over_images_for_labels_and_probabilities():
    scores, labels = torch.randn(12, 7), torch.arange(12) % 7
    soft = F.one_hot(labels, 7).float()
    mean = F.cross_entropy(scores, labels, label_smoothing=0.1)
    torch.testing.assert_close(cross_entropy(scores, labels, 0.1), 12 * mean)
    torch.testing.assert_close(cross_entropy(scores, soft, 0.1), 12 * mean)
    mixed = 0.3 * soft + 0.7 * soft.flip(0)
    torch.testing.assert_close(cross_entropy(scores, mixed, 0.0), 12 * SoftTargetCrossEntropy()(scores, mixed))


def test_binary_cross_entropy_counts_both_classes_of_a_mixed_image_as_present():
    scores, soft = torch.randn(12, 7), F.one_hot(torch.arange(12) % 7, 7).float()
    mixed = 0.3 * soft + 0.7 * soft.roll(1, 0)
    loss = binary_cross_entropy(scores, mixed)
    torch.testing.assert_close(loss, 12 * BinaryCrossEntropy(smoothing=0, target_threshold=0.0)(scores, mixed))
    chance = torch.sigmoid(scores)
    by_hand = -torch.where(mixed > 0, chance.log(), (1 - chance).log()).mean(1).sum()
    torch.testing.assert_close(loss, by_hand)
    assert binary_cross_entropy(scores, torch.arange(12) % 7) == binary_cross_entropy(scores, soft)


def test_mixup_blends_and_cutmix_pastes_with_the_labels_in_the_same_proportion():
    """Of an odd group the image in the middle stays as it is."""
    for count in (12, 7):
        images, labels = _batch(count)
        flipped, hard = images.flip(0), F.one_hot(labels, 7).float()
        mixed, soft = Mixing(0.8, 0.0, 7, seed=1)(images.clone(), labels, 0, {0: count})
        share = soft[0, 0].item()  # image 0 has class 0, its partner another
        assert 0 < share < 1
        torch.testing.assert_close(mixed, share * images + (1 - share) * flipped)
        torch.testing.assert_close(soft, share * hard + (1 - share) * hard.flip(0))
        for step in range(5):
            pasted, soft = Mixing(0.0, 1.0, 7, seed=1)(images.clone(), labels, step, {0: count})
            own = (pasted == images).all(1)
            assert ((pasted == flipped).all(1) | own).all(), "each pixel is one of the two"
            assert own[0].double().mean().item() == pytest.approx(soft[0, 0].item(), abs=1e-6)


def test_with_both_each_group_gets_one_of_them_and_seed_step_and_group_decide():
    images, labels = _batch(6, size=64)
    mix, pasted, seen = Mixing(0.8, 1.0, 7, seed=3), 0, set()
    for step in range(100):
        mixed, soft = mix(images.clone(), labels, step, {4: 4, 2: 2})
        again, _ = mix(images[4:].clone(), labels[4:], step, {2: 2})
        assert torch.equal(again, mixed[4:])
        for own, before in ((mixed[:4], images[:4]), (mixed[4:], images[4:])):
            pasted += bool(((own == before) | (own == before.flip(0))).all())
        seen |= {soft[0].max().item(), soft[4].max().item()}
    assert 70 < pasted < 130
    assert len(seen) > 150
    assert not torch.equal(
        Mixing(0.8, 1.0, 7, seed=4)(images.clone(), labels, 0, {0: 6})[0], mix(images, labels, 0, {0: 6})[0]
    )
