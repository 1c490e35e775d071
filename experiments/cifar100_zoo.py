"""Train 36 convolutional networks on CIFAR-100 (tables 1, 6 and 7 of the TrAct paper).

python experiments/cifar100_zoo.py model=densenet121 method=tract       one run of 200 epochs
python experiments/cifar100_zoo.py --submit                             540 runs
python experiments/cifar100_zoo.py --submit epochs=133                  table 7: TrAct in two thirds of the time
python experiments/cifar100_zoo.py --dry-run model=resnet18,vgg16       a part of them

Cost, estimated from multiply-adds at 30 % of an A100's TF32 peak: up to 3.3 GPU-hours (Inception-ResNet-v2) for 200
epochs, 310 for all 540 runs; small networks will not reach that speed. Not measured on a GPU yet.
Published (top-1 error, mean of 36 networks): TrAct is better on 33 of 36 in 200 epochs, and about as good as
vanilla in 133.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from slurm.command import main

if __name__ == "__main__":
    sys.exit(main("cifar100_zoo", __doc__, grid="table1"))
