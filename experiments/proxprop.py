"""ProxProp's own experiments: an MLP and a ConvNet on CIFAR-10 with proximal steps (arXiv 1706.04638).

python experiments/proxprop.py                                        one run: the ConvNet, cg1, Adam, 50 epochs
python experiments/proxprop.py method.mode=prox_cg3                   three iterations of conjugate gradients
python experiments/proxprop.py --local                                figure 2: the ConvNet, 5 runs
python experiments/proxprop.py --local grid=proxprop_mlp              figure 1: the MLP, 6 runs
python experiments/proxprop.py method=vanilla                         plain back-propagation
python experiments/proxprop.py data=imagefolder data.root=DIR         any folder of images of 32 x 32 pixels

Then python analysis/proxprop.py draws the paper's seven plots. Cost: 50 epochs are 4,500 steps of 500 images; not
measured on a GPU yet. Published: plots only, and three hours on a Titan X for all runs.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from slurm.command import main

if __name__ == "__main__":
    sys.exit(main("proxprop", __doc__, grid="proxprop_convnet"))
