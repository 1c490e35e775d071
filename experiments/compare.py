"""One comparison of all methods on one small network, for a budget in images and for one in seconds.

python experiments/compare.py --local grid=compare_resnet_tune                          1. rates, by images
python experiments/compare.py --local grid=compare_resnet_tune recipe.budget=seconds    2. rates, by seconds
python experiments/compare.py --local                                                   3. the comparison: 60 runs
python analysis/compare.py                                                              its table and plot

The same with grid=compare_vit_tune and grid=compare_vit (80 runs), and with data=cifar10 in all of them. --submit
and --dry-run take the same words. A step that lacks runs of the one before says which.

Rules. (1) Each method has a learning rate of its own for each budget: the best of the same four, by accuracy on
training images that are held out, two seeds each, none of which is a seed of the comparison. Nothing else is tuned:
lambda, tau, beta and eps are those of each method's publication. (2) The comparison trains on all training images and
reads the test images once the rate is fixed; the last epoch counts. (3) By images, every method sees as many. By
seconds, it makes as many steps as fit: recipe.seconds over its own seconds per step, those of the fastest of its
tuning runs by images. So runs do not depend on a clock, and the table has what they used. Evaluation is not counted,
nor what precedes the first step (whitening reads images there). Measure where nothing else runs, with jobs=1. (4) For
each seed, all methods have the same images in the same order with the same augmentation, and the same initial weights
but for what a method itself sets. (5) Tuning is not free: the table has its runs and seconds. (6) PatchNorm and
DualPatchNorm exist for networks that cut images into patches; the ResNet goes without.

Cost: 48 + 48 + 60 runs of seconds each for the ResNet, 64 + 64 + 80 for the ViT. Nothing published to compare with.
"""

import logging
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from slurm.command import main

if __name__ == "__main__":
    chosen = logging.getLogger("experiments.tuning")  # which says the rates and what they were chosen from
    chosen.setLevel(logging.INFO)
    chosen.addHandler(logging.StreamHandler(sys.stdout))
    sys.exit(main("compare", __doc__, grid="compare_resnet"))
