"""OIALR's own experiments: low-rank training in bases that stand still, beside full-rank training (arXiv 2401.08505).

python experiments/oialr.py                                      one run: the mini ViT on CIFAR-10, 300 epochs
python experiments/oialr.py method=vanilla                       the same in full rank
python experiments/oialr.py --local                              CIFAR-10: 9 runs
python experiments/oialr.py --submit grid=oialr_imagenet_vit     ViT-B/16: 12 runs
python experiments/oialr.py --submit grid=oialr_imagenet_resnet  ResNet-RS-101: 9 runs; _resnet50: 12 runs
python experiments/oialr.py recipe.source=imagenet_vit           one run of another network

Then python analysis/tables.py --experiment oialr prints the table. Cost: not measured on a GPU yet; a run on CIFAR-10
is 14,700 steps of 1,024 images, 2,500 of them in full rank. Expected: almost the accuracy of full rank with a fraction
of its trainable parameters. The published numbers are in the paper's tables and not in its code; none are quoted here.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from slurm.command import main

if __name__ == "__main__":
    sys.exit(main("oialr", __doc__, grid="oialr_cifar10_minivit"))
