"""Train the CIFAR ViT of the TrAct paper (figures 4 and 6).

python experiments/cifar_vit.py method=tract epochs=100          one run
python experiments/cifar_vit.py --local                          figure 4: 80 runs
python experiments/cifar_vit.py --local grid=figure6             the effect of lambda: 50 runs

Cost: 1,091 s per 100 epochs without TrAct and 1,197 s with it were published (section 4.6);
not measured here yet. Published (curves only): TrAct at 200 epochs is about vanilla at 400,
lambda 0.1 is best.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from slurm.command import main

if __name__ == "__main__":
    sys.exit(main("cifar_vit", __doc__, grid="figure4"))
