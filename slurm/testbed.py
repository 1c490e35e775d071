"""A real Slurm on this machine, for tests and for trying things by hand.

python slurm/testbed.py up        start it; says what to type next
python slurm/testbed.py status    its nodes and jobs
python slurm/testbed.py down      stop it and everything that runs in it

It has several nodes, each a slurmd under a loopback address of its own, and GPUs that are no
GPUs but harmless devices: jobs get CUDA_VISIBLE_DEVICES as on a cluster. It needs no root, and
writes into one folder only. ``up`` starts with an empty queue, and job ids begin at 1 again.

Three partitions over all nodes: jobs in ``high`` preempt those in ``low`` (the default), which
have ten seconds to leave, and those in ``abrupt``, which have none. A job that gives no --time
ends after five minutes.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import pwd
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any, NamedTuple, NoReturn, TypeVar

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from runfolder.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, UserError
from runfolder.files import read_json, write_json
from runfolder.folder import typed

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
_SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")
_OUTER = ("SLURM_", "SLURMD_", "SBATCH_", "SALLOC_", "SRUN_", "SQUEUE_", "SINFO_", "SCONTROL_")
_DEVICES = ("null", "zero", "full", "random", "urandom")  # Slurm wants a character device per GPU
_MEMBERS = ("munged", "slurm", "srun", "sbatch", "salloc")  # how the names of Slurm's programs begin
_PORTS = range(12000, 32000)  # below those that Linux gives to outgoing connections
_LONGEST_ROOT = 65  # a step's socket has up to 42 characters more, and a socket's path at most 107
_PATIENCE = 30.0  # seconds for anything that is started or stopped
_GRACE = 0.3  # seconds between SIGTERM and SIGKILL
_PARENT_DIED = 1  # PR_SET_PDEATHSIG of prctl(2)
_ANY = TypeVar("_ANY")

_CONF = """\
ClusterName=testbed
SlurmctldHost=localhost
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits for cred_expire + 1 s (121 s if this is below 5). With less than KillWait + 2 s it could
# come back to a node on which it is still ending, which drains the node.
AuthInfo=socket={root}/munge/socket,cred_expire={expire}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/%n
SlurmctldPidFile={root}/state/slurmctld.pid
SlurmdPidFile={root}/%n/slurmd.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
# More CPUs and memory than there are.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# Jobs start within a second.
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0
JobRequeue={requeue}
KillWait={kill_wait}
MaxArraySize={array_size}
MaxJobCount={job_count}
MinJobAge=3600
SlurmdTimeout={slurmd_timeout}
# With 2 a node that was set down by hand would come back at once.
ReturnToService=1
{user_signal}
{gres}
{extra}
{nodes}
PartitionName=DEFAULT Nodes={names} DefaultTime=5 MaxTime=INFINITE
PartitionName=low PriorityTier=1 PreemptMode=REQUEUE GraceTime=10 Default=YES
PartitionName=abrupt PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=high PriorityTier=10 PreemptMode=OFF
"""


class MissingSlurmError(UserError):
    """Slurm is not installed here."""


class ClusterError(Exception):
    """The cluster, or a command in it, did not do what it should."""


class Job(NamedTuple):
    """A line of the queue."""

    id: str  # "7", or "7_1" for a task of an array
    state: str
    restarts: int
    node: str  # "" while it has none


def missing() -> str | None:
    """What there must be and is not, in one sentence; None if all is there."""
    path = _search_path()
    absent = [name for name in _PROGRAMS if shutil.which(name, path=path) is None]
    if not absent:
        return None
    return (
        f"expected Slurm and munge, found no {', '.join(absent)}; on Debian or Ubuntu: apt-get install slurm-wlm munge"
    )


class Testbed:
    """A Slurm cluster of this machine alone; a context manager that starts and stops it.

    The daemons end with the process that started them, however it ends; jobs of a cluster whose
    owner was killed run on, until `down()` or `up()` with the same root.

    Args:
        root: folder for everything it writes; made if there is none.
        nodes: how many; their names are 127.0.0.10, 127.0.0.11, ...
        cpus: of each node; may be more than there are.
        gpus: of each node, at most five.
        user_signal: whether a job that is preempted gets the signal it asked for
            (preempt_send_user_signal), or just SIGTERM, as is Slurm's default.
        max_array_size: how many tasks an array may have.
        kill_wait: seconds between a job's SIGTERM and SIGKILL.
        slurmd_timeout: seconds of silence after which a node counts as dead.
        job_requeue: whether jobs are requeued where sbatch is not told.
        extra_lines: more lines for slurm.conf.
        detached: leave the cluster running when this process ends.

    Raises:
        UserError: a value is out of range.
    """

    __test__ = False  # not a test, whatever pytest thinks of the name

    def __init__(
        self,
        root: Path | str,
        *,
        nodes: int = 3,
        cpus: int = 4,
        gpus: int = 2,
        user_signal: bool = True,
        max_array_size: int = 1001,
        kill_wait: int = 3,
        slurmd_timeout: int = 10,
        job_requeue: bool = True,
        extra_lines: Iterable[str] = (),
        detached: bool = False,
    ):
        _check("nodes", nodes, 1, 200)
        _check("GPUs per node", gpus, 0, len(_DEVICES))
        self.root = Path(root).resolve()
        self.nodes = tuple(f"127.0.0.{10 + index}" for index in range(nodes))
        self.cpus, self.gpus = cpus, gpus
        self.user_signal, self.job_requeue = user_signal, job_requeue
        self.max_array_size, self.kill_wait, self.slurmd_timeout = max_array_size, kill_wait, slurmd_timeout
        self.extra_lines = tuple(extra_lines)
        self.detached = detached
        self._children: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Testbed:
        return self.up()

    def __exit__(self, *_: object) -> None:
        self.down()

    @property
    def conf(self) -> Path:
        """The configuration file, to which SLURM_CONF points."""
        return self.root / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment for this cluster, without what an outer Slurm job left in it."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(_OUTER)}
        return kept | {"SLURM_CONF": str(self.conf), "PATH": _search_path()}

    def up(self) -> Testbed:
        """Start a cluster with an empty queue and wait until all nodes are idle.

        Returns:
            Itself.

        Raises:
            MissingSlurmError: Slurm is not installed.
            UserError: it runs already, or the folder is of no use.
            ClusterError: a daemon did not start; the message has the ends of the logs.
        """
        if sentence := missing():
            raise MissingSlurmError(sentence)
        if self.is_up():
            raise UserError(
                f"expected no cluster in {self.root}, found one that runs; stop it by "
                f"'python slurm/testbed.py down --root {self.root}', or choose another root."
            )
        if not self.detached and threading.current_thread() is not threading.main_thread():
            raise UserError("expected up() in the main thread, got another, with which the daemons would end.")
        self._prepare()
        try:
            folder = self.root / "munge"
            files = [f"--{name}-file={folder / name}" for name in ("key", "pid", "seed", "log")]
            # --force: the folders above may be closed to other users, which munged would call an error.
            self._start("munged", "munged", "--foreground", "--force", f"--socket={folder / 'socket'}", *files)
            self._until("munged", lambda: (folder / "socket").is_socket(), "a socket of munged")
            self.start_slurmctld()
            for node in self.nodes:
                self.start_slurmd(node)
            self._until("slurmctld", self._idle, "all nodes to be idle")
        except BaseException:
            self.down()
            raise
        return self

    def down(self) -> None:
        """Stop everything: daemons, steps, jobs and waiting commands of Slurm. Does nothing if nothing runs.

        Other programs that know SLURM_CONF, such as a launcher or an editor, are left alone.

        Raises:
            ClusterError: a process survived.
        """
        _send([pid for name, pid in self._daemons().items() if name != "munged"], SIGKILL)  # nothing starts any more
        self._end_members()
        for child in self._children.values():
            child.wait()
        self._children.clear()
        if self._record.exists():
            write_json(self._record, {}, durable=False)

    def is_up(self) -> bool:
        """Whether any of its daemons runs."""
        return bool(self._daemons())

    def run(self, *command: str | Path, check: bool = True, cwd: Path | None = None, timeout: float = 60.0) -> str:
        """Run a command in the cluster's environment, such as ``run("squeue", "-h")``.

        Args:
            command: the program and its arguments.
            check: whether an exit code other than 0 is an error.
            cwd: where; the root if not given, so that what jobs write by default stays there.
            timeout: seconds.

        Returns:
            What it wrote to standard output, without white space at the end.

        Raises:
            ClusterError: the exit code was not 0, or it took too long.
        """
        words = [str(word) for word in command]
        try:
            done = subprocess.run(
                words,
                env=self.environment,
                cwd=cwd or self.root,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            raise ClusterError(f"expected '{' '.join(words)}' to end within {timeout:g} s, and it did not.") from None
        if check and done.returncode:
            said = (done.stderr or done.stdout).strip()
            raise ClusterError(f"expected exit code 0 from '{' '.join(words)}', got {done.returncode}: {said}")
        return done.stdout.rstrip()

    def queue(self) -> list[Job]:
        """All jobs, also those that ended, array tasks one by one."""
        widths = {"JobArrayID": 32, "State": 32, "RestartCnt": 16, "NodeList": 255}
        lines = self.run(
            "squeue", "-r", "-h", "-t", "all", "-O", ",".join(f"{name}:{width}" for name, width in widths.items())
        ).splitlines()
        rows = [(line[:32].strip(), line[32:64].strip(), int(line[64:80]), line[80:].strip()) for line in lines]
        return [Job(*row) for row in rows]

    def processes(self) -> list[int]:
        """Ids of all processes that know this cluster's SLURM_CONF, without the daemons and this one."""
        daemons = {_program(pid) for pid in self._daemons().values()}  # some have helpers, forks of themselves
        return [pid for pid in self._found() if _program(pid) not in daemons]

    def stop_slurmctld(self, signal: int = SIGKILL) -> None:
        """End the controller by a signal and wait until it is gone."""
        self._stop("slurmctld", signal)

    def start_slurmctld(self) -> None:
        """Start the controller and wait until it answers."""
        self._start("slurmctld", "slurmctld", "-D")
        self._until("slurmctld", lambda: self._listens("slurmctld") and self._answers(), "slurmctld to answer")

    def stop_slurmd(self, node: str, signal: int = SIGKILL) -> None:
        """End a node's daemon by a signal and wait until it is gone; the node's jobs run on."""
        self._stop(_slurmd(node), signal)

    def start_slurmd(self, node: str) -> None:
        """Start a node's daemon and wait until it listens."""
        name = _slurmd(node)
        self._start(name, "slurmd", "-D", "-N", node)
        self._until(name, lambda: self._listens(name), f"the slurmd of {node} to listen")

    def wait_for(self, condition: Callable[[], _ANY], seconds: float, what: str) -> _ANY:
        """Ask until the answer is true.

        Args:
            condition: what to ask.
            seconds: for how long.
            what: what is waited for, for the message.

        Returns:
            The first true answer.

        Raises:
            AssertionError: there was none; the message has the queue and the ends of the logs.
        """
        end = time.monotonic() + seconds
        while not (answer := condition()):
            if time.monotonic() > end:
                queue = self.run("squeue", "-r", "-t", "all", check=False)
                raise AssertionError(f"expected {what} within {seconds:g} s\n{queue}\n{self.logs()}")
            time.sleep(0.05)
        return answer

    def logs(self, lines: int = 8) -> str:
        """The last lines of each daemon's log."""
        parts = []
        for output in sorted((self.root / "log").glob("*.out")):
            said = _text(output.with_suffix(".log")) or _text(output)  # .out: what was said before there was a log
            if said:
                parts += [f"{output.stem}:", *(f"  {line}" for line in said.splitlines()[-lines:])]
        return "\n".join(parts) or "no logs"

    @property
    def _record(self) -> Path:
        """The file with the daemons' process ids, for other processes."""
        return self.root / "daemons.json"

    def _prepare(self) -> None:
        """Make the folder as for a new cluster; what is left of an earlier one ends and goes."""
        self._check_root()
        self.down()
        folders = [self.root / name for name in ("munge", "state", "log", *self.nodes)]
        for old in [*folders, *self.root.glob("127.0.0.*")]:
            shutil.rmtree(old, ignore_errors=True)
        write_json(self._record, {}, durable=False)
        for folder in folders:
            folder.mkdir(mode=0o755)
        key = os.open(self.root / "munge" / "key", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(key, "wb") as file:
            file.write(os.urandom(1024))
        self.conf.write_text(self._configuration())
        devices = [f"Name=gpu File=/dev/{name}\n" for name in _DEVICES[: self.gpus]]
        (self.root / "gres.conf").write_text("".join(devices))

    def _check_root(self) -> None:
        """Make the root if there is none; refuse one that Slurm cannot use or that holds other things."""
        root = str(self.root)
        if not re.fullmatch(r"[\w./+@-]+", root, re.ASCII):
            raise UserError(f"expected a root of letters, digits and ./_+@- for slurm.conf, got {root!r}.")
        if len(root) > _LONGEST_ROOT:
            raise UserError(
                f"expected a root of at most {_LONGEST_ROOT} characters, since sockets lie below it, "
                f"got {len(root)} in {root}; choose a shorter one."
            )
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"expected a root that can be made, got {root} ({error.strerror}).") from None
        if self.root.stat().st_uid != os.getuid():
            raise UserError(f"expected a root that belongs to {_user()}, got {root}, which does not; choose another.")
        taken = [name for name in ("munge", "state", "log", "slurm.conf", "gres.conf") if (self.root / name).exists()]
        if taken and not self._record.exists():
            raise UserError(
                f"expected an empty root or an earlier testbed's, got {root} with {', '.join(taken)} in it; "
                "choose another."
            )

    def _configuration(self) -> str:
        """slurm.conf."""
        controller, *ports = _free_ports(1 + len(self.nodes))
        gpus = f" Gres=gpu:{self.gpus}" if self.gpus else ""
        hardware = f"CPUs={self.cpus} RealMemory=8000{gpus}"
        nodes = [
            f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} {hardware}"
            for node, port in zip(self.nodes, ports, strict=True)
        ]
        return _CONF.format(
            root=self.root,
            user=_user(),
            port=controller,
            expire=max(5, self.kill_wait + 3),
            kill_wait=self.kill_wait,
            requeue=int(self.job_requeue),
            array_size=self.max_array_size,
            job_count=max(10000, 2 * self.max_array_size),
            slurmd_timeout=self.slurmd_timeout,
            user_signal="SlurmctldParameters=preempt_send_user_signal" if self.user_signal else "",
            gres="GresTypes=gpu" if self.gpus else "",
            extra="\n".join(self.extra_lines),
            nodes="\n".join(nodes),
            names=",".join(self.nodes),
        )

    def _start(self, name: str, *command: str) -> None:
        """Start a daemon that is not running and note its process id."""
        if name in self._daemons():
            raise ClusterError(f"expected {name} to be stopped, found it running; stop it first.")
        with open(self.root / "log" / f"{name}.out", "ab") as output:
            self._children[name] = child = subprocess.Popen(
                command,
                env=self.environment,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for the parent, who will stop them
                preexec_fn=None if self.detached else _with_parent(os.getpid()),
            )
        write_json(self._record, read_json(self._record) | {name: child.pid}, durable=False)

    def _stop(self, name: str, signal: int) -> None:
        pid = self._daemons().get(name)
        if pid is None:
            raise ClusterError(f"expected {name} to be running, found it stopped; start it first.")
        os.kill(pid, signal)
        end = time.monotonic() + _PATIENCE
        while self._knows(pid) or self._listens(name):  # its port is closed after its environment is gone
            if time.monotonic() > end:
                raise ClusterError(f"expected {name} to end of signal {signal}, found it after {_PATIENCE:g} s.")
            time.sleep(0.01)
        if name in self._children:
            self._children.pop(name).wait()

    def _until(self, name: str, condition: Callable[[], bool], what: str) -> None:
        """Wait for what a daemon should do, but not when it is gone."""
        end = time.monotonic() + _PATIENCE
        while not condition():
            gone = self._children[name].poll() is not None
            if gone or time.monotonic() > end:
                why = f"{name} ended" if gone else f"not within {_PATIENCE:g} s"
                raise ClusterError(
                    f"expected {what}, got: {why}; the logs in {self.root / 'log'} end with\n{self.logs()}"
                )
            time.sleep(0.02)

    def _daemons(self) -> dict[str, int]:
        """Name and process id of each daemon that runs."""
        return {name: pid for name, pid in read_json(self._record).items() if self._knows(pid)}

    def _members(self) -> list[int]:
        """All processes that are Slurm's own programs or belong to a job."""
        found = self._found().items()
        return [pid for pid, has in found if b"\0SLURM_JOB_ID=" in has or _program(pid).startswith(_MEMBERS)]

    def _found(self) -> dict[int, bytes]:
        """Id and environment of all processes that know this cluster, but this one."""
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
        return {pid: has for pid in pids if pid != os.getpid() and self._mark in (has := _environ(pid))}

    def _knows(self, pid: int) -> bool:
        """Whether a process is alive and knows this cluster; a later one that got its id does not."""
        return self._mark in _environ(pid)

    @property
    def _mark(self) -> bytes:
        """What the environment of every process of this cluster has, and inherits."""
        return f"\0SLURM_CONF={self.conf}\0".encode()

    def _end_members(self) -> None:
        """SIGTERM to every member, after the grace SIGKILL to those that are left, until there is none."""
        _send(self._members(), SIGTERM)
        start, looks = time.monotonic(), 0
        while looks < 2:  # a process that is just executing another program has no environment for a moment
            left, waited = self._members(), time.monotonic() - start
            if left and waited > _PATIENCE:
                raise ClusterError(f"expected processes {left} to end of SIGKILL, found them after {_PATIENCE:g} s.")
            if waited > _GRACE:
                _send(left, SIGKILL)
            looks = 0 if left else looks + 1
            time.sleep(0.01)

    def _listens(self, name: str) -> bool:
        """Whether somebody listens at a daemon's port. Connecting would leave an error in its log."""
        node = name.removeprefix("slurmd-")
        pattern = r"SlurmctldPort=(\d+)" if name == "slurmctld" else rf"NodeName={re.escape(node)} .*Port=(\d+)"
        port = int(re.search(pattern, self.conf.read_text()).group(1))
        rows = [line.split() for table in ("tcp", "tcp6") for line in _text(Path("/proc/net", table)).splitlines()[1:]]
        return any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows)

    def _answers(self) -> bool:
        return "is UP" in self.run("scontrol", "ping", check=False)

    def _idle(self) -> bool:
        states = {
            tuple(line.split()) for line in self.run("sinfo", "-h", "-N", "-o", "%N %T", check=False).splitlines()
        }
        return states == {(node, "idle") for node in self.nodes}


def _check(what: str, number: int, least: int, most: int) -> None:
    if not least <= number <= most:
        raise UserError(f"expected {least} to {most} {what}, got {number}.")


def _slurmd(node: str) -> str:
    return f"slurmd-{node}"


def _search_path() -> str:
    """PATH and the folders of daemons, which ordinary users may not have in it."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *_SBIN])


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # as in some containers
        return str(os.getuid())


def _free_ports(count: int) -> list[int]:
    """Ports at which nobody listens. Drawn, so that two clusters that start at once hardly get the same."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            ports.append(port)
        if len(ports) == count:
            break
    return ports


def _with_parent(parent: int) -> Callable[[], None]:
    """What a child does to end with its parent, however that ends."""
    prctl = ctypes.CDLL(None).prctl

    def arrange() -> None:
        prctl(_PARENT_DIED, SIGKILL)
        if os.getppid() != parent:  # it ended before
            os._exit(1)

    return arrange


def _send(pids: Iterable[int], signal: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal)


def _environ(pid: int) -> bytes:
    """A process's environment between two zero bytes; b"" of one that is gone, or is another user's."""
    try:
        return b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def _program(pid: int) -> str:
    """The name of the file that a process executes."""
    with suppress(OSError):
        return os.path.basename(os.readlink(f"/proc/{pid}/exe"))
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows the commands.")


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    default = Path(tempfile.gettempdir()) / f"slurm-testbed-{_user()}"
    commands = parser.add_subparsers(dest="command", required=True, metavar="up | status | down")
    for name in ("up", "status", "down"):
        command = commands.add_parser(name, allow_abbrev=False)
        command.add_argument("--root", metavar="DIR", type=typed, default=default, help=f"its folder ({default})")
        if name == "up":
            command.add_argument("--nodes", type=int, default=3, help="how many nodes (3)")
            command.add_argument("--gpus", type=int, default=2, help="how many GPUs each (2)")
    options = parser.parse_args(arguments)
    options.again = "" if options.root == default else f" --root {options.root.resolve()}"
    return options


def _up(options: argparse.Namespace) -> None:
    bed = Testbed(options.root, nodes=options.nodes, gpus=options.gpus, detached=True).up()
    print(f"A Slurm of {options.nodes} nodes with {options.gpus} GPUs each is up. Type next:")
    print(f"  export SLURM_CONF={bed.conf}")
    print("  sinfo")
    print("  python experiments/quickstart.py --submit")
    print(f"  python slurm/testbed.py down{options.again}")


def _status(options: argparse.Namespace) -> None:
    bed = _running(options)
    print(f"export SLURM_CONF={bed.conf}\n{bed.run('sinfo')}\n{bed.run('squeue', '-r')}")


def _down(options: argparse.Namespace) -> None:
    bed = _running(options)
    bed.down()
    print(f"The Slurm in {bed.root} is down.")


def _running(options: argparse.Namespace) -> Testbed:
    bed = Testbed(options.root, detached=True)
    if not bed.is_up() and not bed._members():
        raise UserError(
            f"expected a cluster in {bed.root}, found none; start it by 'python slurm/testbed.py up{options.again}'."
        )
    return bed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line.

    Args:
        arguments: without the program's name; those of the process if not given.

    Returns:
        Exit code: 0 done, 1 the cluster failed, 2 bad input.
    """
    commands: dict[str, Callable[[Any], None]] = {"up": _up, "status": _status, "down": _down}
    try:
        options = _arguments(arguments)
        commands[options.command](options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except ClusterError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
