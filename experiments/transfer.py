"""Fine-tune a pre-trained ViT-S on CIFAR-10, CIFAR-100, Flowers-102 and Stanford Cars (table 4 of the TrAct paper).

python experiments/transfer.py --submit                                      8 runs, after table 3's
python experiments/transfer.py data=cifar100 start_from=imagenet_deit/NAME   one run, from a finished run
python experiments/transfer.py data=flowers102 start_from=timm:deit3_small_patch16_224.fb_in1k
python experiments/transfer.py data=imagefolder data.root=DIR start_from=FILE data.in_memory=false epochs=100

Without start_from a run starts from the fine-tuned run of experiments/imagenet_deit.py with the same seed, network
and method, 800 epochs. Flowers-102 is downloaded; Stanford Cars has to be put into data/stanford_cars by hand.
Cost, estimated from multiply-adds at 40 % of an A100's bfloat16 peak: 0.6 GPU-hours a run, if the images come fast
enough. Not measured on a GPU yet.
Published (top-1): 98.94 / 90.70 / 94.39 / 90.44 %, with TrAct 99.02 / 90.85 / 95.58 / 91.07 %. How the authors
fine-tuned beyond the numbers of epochs is not published; the recipe here is the DeiT authors' for their first model,
whose other elements are those of its training on ImageNet: conf/transfer.yaml names the source of each value.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from slurm.command import main

if __name__ == "__main__":
    sys.exit(main("transfer", __doc__, grid="table4"))
