"""The networks of the TrAct paper's CIFAR-100 table that are not in ``experiments.models.resnet``.

One file per family; ``layers`` and ``residual`` hold what families share. Sizes, first layers and
outputs are those of weiaicunzai/pytorch-cifar100 (commit 11d8418), the networks the paper trained,
with their departures from the literature; a docstring names those that change the function.
All start from PyTorch's own initialisation and pool globally before the classifier.
"""
