"""Losses and mixing of images against their definitions."""

import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy

from experiments.training.losses import binary_cross_entropy, cross_entropy
from experiments.training.mix import mixing


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
    images, labels = _batch()
    rolled, hard = images.roll(1, 0), F.one_hot(labels, 7).float()
    torch.manual_seed(1)
    mixed, soft = mixing(0.8, 0.0, 7)(images, labels)
    share = soft[0, 0].item()  # image 0 has class 0, its partner (image 11) class 4
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * rolled)
    torch.testing.assert_close(soft, share * hard + (1 - share) * hard.roll(1, 0))
    for seed in range(5):
        torch.manual_seed(seed)
        pasted, soft = mixing(0.0, 1.0, 7)(images, labels)
        own = (pasted == images).all(1)
        assert ((pasted == rolled).all(1) | own).all(), "each pixel is one of the two"
        assert own.double().mean().item() == pytest.approx(soft[0, 0].item(), abs=1e-6)


def test_with_both_each_batch_gets_one_of_them_and_the_seed_decides():
    images, labels = _batch()
    mix, pasted = mixing(0.8, 1.0, 7), 0
    for seed in range(200):
        torch.manual_seed(seed)
        mixed, _ = mix(images, labels)
        torch.manual_seed(seed)
        assert torch.equal(mix(images, labels)[0], mixed)
        pasted += bool(((mixed == images) | (mixed == images.roll(1, 0))).all())
    assert 70 < pasted < 130
    assert mixing(0.0, 0.0, 7) is None
