"""Another live process that trains a run, as far as its lock tells."""

import subprocess
import sys
from contextlib import contextmanager

_HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(120)
"""


@contextmanager
def held_elsewhere(folder):
    """Hold the run folder's lock in a process of its own."""
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, str(folder / "lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        yield
    finally:
        holder.kill()
        holder.wait()
