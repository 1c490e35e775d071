"""Network subspaces' own experiments: lines, curves and simplexes of networks (arXiv 2102.10472).

python experiments/subspaces.py                                       one run: a line, CIFAR ResNet-20, 160 epochs
python experiments/subspaces.py method=curve                          or method=simplex method.endpoints=4
python experiments/subspaces.py --local                               figure 4 on CIFAR-10: 9 runs
python experiments/subspaces.py --local grid=subspaces_cifar10_simplexes      figure 5: 20 runs
python experiments/subspaces.py --local grid=subspaces_cifar10_averages       SWA, SWAG and averages: 4 runs
python experiments/subspaces.py --submit grid=subspaces_tiny_imagenet         12 runs; _simplexes: 20
python experiments/subspaces.py --submit grid=subspaces_imagenet              9 runs

Then python analysis/subspaces.py prints the table and draws figures 4 and 5. Each run evaluates its midpoint, and at
its end the points of its path and their ensembles. Cost: not measured on a GPU yet. Published: figures; the configs
have no numbers.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from slurm.command import main

if __name__ == "__main__":
    sys.exit(main("subspaces", __doc__, grid="subspaces_cifar10"))
