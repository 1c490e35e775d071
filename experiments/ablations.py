"""The ablations of the TrAct paper (figures 6 to 9): grids of the recipes cifar_vit and cifar_resnet.

python experiments/ablations.py --local                          figure 7: PatchNorm and DualPatchNorm, 20 runs
python experiments/ablations.py --local grid=figure8             inputs in [0, 1] and [0, 255]: 90 runs
python experiments/ablations.py --local grid=figure9             first layer SGD, the rest Adam: 140 runs
python experiments/ablations.py --local grid=figure6             the effect of lambda: 50 runs
python experiments/ablations.py method=patchnorm                 one run of cifar_vit

The runs lie in the folders of the two recipes, so those that are in figures 3, 4 or 6 as
well are trained once: 10 of figure 7 and 80 of figure 9.

Cost: published are 1,091 s per 100 epochs of the ViT without TrAct and 1,197 s with it
(section 4.6); not measured on a GPU yet. Published results are curves and bars without
numbers; analysis/tables.py --experiment cifar_vit (or cifar_resnet) gives ours.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from experiments.grid import load_grid
from runfolder.errors import UserError
from slurm.command import main as run_script

DEFAULT = "figure7"


def main(arguments: list[str]) -> int:
    """Hand the command line to the recipe that its grid belongs to; returns the exit code."""
    named = [word.removeprefix("grid=") for word in arguments if word.startswith("grid=")]
    try:
        experiment = load_grid(named[0] if named else DEFAULT)["experiment"]
    except UserError:
        experiment = load_grid(DEFAULT)["experiment"]  # whose command line says what is wrong
    return run_script(experiment, __doc__, DEFAULT, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
