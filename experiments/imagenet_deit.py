"""Pre-train and fine-tune DeiT-III vision transformers on ImageNet (table 3 of the TrAct paper).

python experiments/imagenet_deit.py data.root=DIR --submit                          6 pre-trainings, 6 fine-tunings
python experiments/imagenet_deit.py data.root=DIR --submit model=deit3_small        those of ViT-S
python experiments/imagenet_deit.py data.root=DIR method=tract recipe.pretrain_epochs=800 method.lambda_=0.2
python experiments/imagenet_deit.py data.root=DIR stage=finetune start_from=FILE    fine-tune any checkpoint

A fine-tuning run starts by itself from the pre-training run of the same choices: --local trains that first, --submit
makes its job wait for it. What is given on the command line counts for both stages.
Cost, estimated from multiply-adds at 40 % of an A100's bfloat16 peak: 31 and 63 GPU-hours for ViT-S (400 and 800
epochs), 88 for ViT-B (400), 4 and 15 for fine-tuning, 410 for all. The paper reports 134 h for ViT-S (800) and 98 h
for ViT-B on its own. Not measured on a GPU yet.
Published (top-1): ViT-S 81.23 % (TrAct 81.50) in 400 epochs and 81.97 (82.18) in 800, ViT-B 83.34 (83.58) in 400.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from slurm.command import main

if __name__ == "__main__":
    sys.exit(main("imagenet_deit", __doc__, grid="table3"))
