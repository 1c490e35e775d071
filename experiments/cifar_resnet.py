"""Train the CIFAR ResNet-18 of the TrAct paper (figures 3 and 10).

python experiments/cifar_resnet.py method=tract                  one run of 100 epochs
python experiments/cifar_resnet.py --local                       figure 3: 160 runs
python experiments/cifar_resnet.py --local grid=figure10         the same on CIFAR-100
python experiments/cifar_resnet.py data=imagefolder data.root=DIR   any folder of images

Cost: 100 epochs are 39,000 steps of 128 images; not measured on a GPU yet.
Published (curves only): with SGD, TrAct at 100 epochs beats vanilla at 800; with Adam,
TrAct at 100 is about vanilla at 400.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from slurm.command import main

if __name__ == "__main__":
    sys.exit(main("cifar_resnet", __doc__, grid="figure3"))
