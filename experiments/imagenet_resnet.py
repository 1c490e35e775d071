"""Train ResNet-18, -34 and -50 on ImageNet (table 2, figures 5, 11 and 12 of the TrAct paper).

python experiments/imagenet_resnet.py data.root=DIR method=tract epochs=60      one run, here
python experiments/imagenet_resnet.py data.root=DIR --submit                    36 runs
python experiments/imagenet_resnet.py data.root=DIR micro_batch=64              the same on a small GPU
python experiments/imagenet_resnet.py data.root=DIR --submit runtime.gpus=8     each run on 8 GPUs

DIR holds train/SYNSET/*.JPEG and val/SYNSET/*.JPEG (without data.root: data/imagenet).
Cost, estimated from multiply-adds at 30 % of an A100's bfloat16 peak: 3.7, 7.5 and 8.4 GPU-hours for 90 epochs of
ResNet-18, -34 and -50, 160 for all 36 runs, if the images come fast enough. Not measured on a GPU yet.
Published (ResNet-50, top-1): 71.96 / 74.98 / 75.70 % in 30 / 60 / 90 epochs, with TrAct 73.48 / 75.68 / 76.20 %.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from slurm.command import main

if __name__ == "__main__":
    sys.exit(main("imagenet_resnet", __doc__, grid="table2"))
