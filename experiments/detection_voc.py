"""Train Faster R-CNN with VGG-16 on PASCAL VOC 2007 (table 5 of the TrAct paper).

python experiments/detection_voc.py method=tract            one run, here
python experiments/detection_voc.py --submit                4 runs
python experiments/detection_voc.py start_from=FILE         from a VGG-16 file, without network

VOC 2007 is downloaded (or unpacked by hand in data/: both archives make VOCdevkit/), VGG-16's weights by timm.
The number of a run is test/map: mAP in percent by the protocol of VOC 2007 (11 recalls, overlap 0.5).
recipe.source=simple_faster_rcnn (the default) or py_faster_rcnn says whose recipe it is: docs/reproducing.md.
Cost, estimated from multiply-adds at 40 % of an A100's TF32 peak: 0.32 GPU-hours a run for training and 0.12 for
evaluation after each epoch, double for py_faster_rcnn (140,000 images instead of 70,154); more, as steps of one image
leave a GPU waiting. Not measured on a GPU.
Published (mAP, 2 seeds): 0.659 ± 0.005, with TrAct 0.671 ± 0.004. How the authors trained beyond "all layers" is not
published.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from slurm.command import main

if __name__ == "__main__":
    sys.exit(main("detection_voc", __doc__, grid="table5"))
