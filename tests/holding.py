"""Another live process that trains a run, as far as its lease tells."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

_HOLD = """
import sys, time
from runfolder.folder import RunFolder
from runfolder.lease import take
take(RunFolder(sys.argv[1]), beats_every=10.0)
print("held", flush=True)
time.sleep(120)
"""


@contextmanager
def held_elsewhere(folder):
    """Hold the run folder in a process of its own; gives the process."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", _HOLD, str(folder)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        assert holder.stdout.readline() == "held\n"
        yield holder
    finally:
        holder.kill()
        holder.wait()
