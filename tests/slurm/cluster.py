"""A SLURM of two nodes on this machine: munged, slurmctld and two slurmd in a folder of their own, by Debian's packages.

Nothing of the machine's own SLURM or munge is touched: keys, sockets, state and ports are the folder's. The daemons run as the
user who starts them.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
SEARCHED = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

# FirstJobId: the ranks' port is made of the job's number, and there may be another cluster on this machine.
# cred_expire: a requeued job is not started again before the credentials of its last start have run out, 120 s by default.
CONFIG = """
ClusterName=distilltest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
JobRequeue=1
FirstJobId={first}
KillWait=30
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1 RealMemory=4000
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """What of SLURM and munge is not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCHED) is None]


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on."""
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in taken:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in taken]


def wait_until(condition: Callable[[], Any], seconds: float, what: str | Callable[[], str], every: float = 0.2) -> Any:
    """What ``condition`` gives once that is true. Raises TimeoutError, naming ``what``, after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        if found := condition():
            return found
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} s: {what() if callable(what) else what}")
        time.sleep(every)


class Cluster:
    """Two nodes, ``n1`` and ``n2``, of one CPU each. A context: whatever happens, its daemons and jobs end with it.

    Args:
        folder: where everything of it lies; a path that is short (sockets) and empty.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.daemons: list[subprocess.Popen] = []
        self.environment = os.environ | {"PATH": SEARCHED, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in [name for name in self.environment if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF"]:
            del self.environment[name]

    def __enter__(self) -> Cluster:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the daemons and waits for both nodes. Raises RuntimeError with the ends of their logs if they do not come."""
        words = [sys.executable, __file__, str(self.folder)]
        self.keeper = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)
        for name in ("state", "spool.n1", "spool.n2"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        host, first = socket.gethostname().split(".")[0], 1 + secrets.randbelow(9000)
        settings = {"host": host, "user": getpass.getuser(), "ports": free_ports(3), "first": first}
        (self.folder / "slurm.conf").write_text(CONFIG.format(folder=self.folder, **settings))
        files = [f"--{name}-file={self.folder}/munged.{name}" for name in ("pid", "log", "seed")]
        self.daemon("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.socket", *files)
        try:
            wait_until((self.folder / "munge.socket").exists, 20, "munged answers")
            self.daemon("slurmctld", "-D")
            for node in ("n1", "n2"):
                self.daemon("slurmd", "-D", "-N", node)
            wait_until(self.ready, 60, "both nodes are idle")
        except TimeoutError as error:
            ends = [f"{log.name}: {log.read_text()[-800:]}" for log in sorted(self.folder.glob("*.log"))]
            raise RuntimeError("\n".join([f"SLURM did not start: {error}", *ends])) from error

    def daemon(self, program: str, *words: str) -> None:
        """Starts a daemon in the foreground, in a session of its own, its output in ``FOLDER/out.log``."""
        found = shutil.which(program, path=SEARCHED)
        command = [str(found), *words]
        with open(self.folder / "out.log", "ab") as log:
            daemon = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self.daemons.append(daemon)

    def ready(self) -> bool:
        """Whether both nodes wait for work."""
        found = self.call("sinfo", "-h", "-N", "-o", "%T", check=False).stdout.split()
        return found == ["idle", "idle"]

    def stop(self) -> None:
        """Ends jobs, steps and daemons."""
        if len(self.daemons) > 1:
            self.call("scancel", "--user", getpass.getuser(), check=False)
            try:
                wait_until(lambda: not self.call("squeue", "-h", check=False).stdout.strip(), 20, "jobs have ended")
            except TimeoutError:
                pass  # the keeper kills what is left
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                pass  # the keeper kills it
        self.keeper.communicate(timeout=30)

    def call(self, *words: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        """Runs a command of SLURM. Raises RuntimeError with what it says if it fails and ``check``."""
        done = subprocess.run(words, env=self.environment | environment, capture_output=True, text=True, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr or done.stdout}")
        return done

    def submit(self, *words: str, cwd: Path, **environment: str) -> str:
        """The number of a job that ``sbatch`` takes, submitted from ``cwd``."""
        return self.call("env", f"--chdir={cwd}", "sbatch", "--parsable", *words, **environment).stdout.strip()

    def field(self, job: str, name: str) -> str:
        """A field of ``scontrol show job``, such as JobState, Restarts or ExitCode; empty if there is none."""
        text = self.call("scontrol", "-o", "show", "job", job, check=False).stdout
        return next((word.partition("=")[2] for word in text.split() if word.startswith(f"{name}=")), "")

    def steps(self, job: str) -> list[str]:
        """The steps of a job that run now, without the one of its script."""
        found = self.call("squeue", "-h", "--steps", "-j", job, "-o", "%i", check=False).stdout.split()
        return [step for step in found if not step.endswith(".batch")]

    def wait(self, job: str, *states: str, seconds: float) -> str:
        """Waits until a job has one of these states, and gives it."""
        return wait_until(
            lambda: (now := self.field(job, "JobState")) in states and now,
            seconds,
            lambda: f"job {job} is {' or '.join(states)}; it is {self.field(job, 'JobState')}",
            every=0.5,
        )


def processes_of(folder: Path) -> list[int]:
    """Processes whose environment names a cluster: daemons, steps that outlived them, and what they started."""
    mark, found = f"SLURM_CONF={folder}/slurm.conf\0".encode(), []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if mark in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                pass  # it has ended, or is another user's
    return found


def keep(folder: Path) -> None:
    """Waits for the end of the process that started the cluster, however it ends, and kills what is left of the cluster."""
    sys.stdin.read()
    for _ in range(20):
        for process in processes_of(folder):
            try:
                os.kill(process, signal.SIGKILL)
            except OSError:
                pass  # it has ended
        time.sleep(0.1)


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
