"""Train a small ResNet or ViT on handwritten digits, with or without TrAct, on the CPU.

python experiments/quickstart.py method=tract          one run, seconds
python experiments/quickstart.py --local jobs=2        12 runs: 2 networks, 2 methods, 3 seeds
python analysis/tables.py --experiment quickstart      their table

The paper has no such experiment: it shows that everything works, not how good TrAct is.
"""

import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from slurm.command import main

if __name__ == "__main__":
    sys.exit(main("quickstart", __doc__, grid="quickstart"))
