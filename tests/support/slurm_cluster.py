"""A real Slurm on this machine: munged, slurmctld and two slurmd, all in one folder and on loopback, for the length of a block.

Both nodes are this machine; their names resolve to nothing, as a batch script may find on a cluster too. Where Slurm is not
installed or may not be started, `why_not` says so.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from must_have import may_lack

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY")
"""States of a job that comes to no other by itself."""
PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "scontrol", "squeue", "scancel")
SBIN = "/usr/sbin"


def why_not() -> str | None:
    """What keeps a cluster from being started here; nothing where that is to be a failure."""
    if not may_lack("slurm"):
        return None
    missing = [name for name in PROGRAMS if _program(name) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)} not found; Debian: slurmctld slurmd slurm-client munge)"
    return None if os.geteuid() == 0 else "only root may start slurmd"


@dataclass
class Cluster:
    """A running cluster. `environment` is what its clients need besides their own."""

    folder: Path
    environment: dict[str, str]
    nodes: tuple[str, ...] = ("n1", "n2")
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)

    def client(self, *command: str, **options: object) -> str:
        """Standard output of a Slurm command.

        Raises:
            subprocess.CalledProcessError: it failed; its standard error is in the message.
        """
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=60, check=False, **options
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr or done.stdout}")
        return done.stdout

    def job(self, number: int | str) -> dict[str, str]:
        """What the controller knows of a job: JobState, Restarts, Reason, ExitCode, ..."""
        text = self.client("scontrol", "--oneliner", "show", "job", str(number))
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, number: int | str, *states: str, seconds: float = 120.0) -> dict[str, str]:
        """The job once it is in one of the states.

        Raises:
            TimeoutError: it is not, after so long; the message has its last state.
        """
        deadline = time.monotonic() + seconds
        while (job := self.job(number))["JobState"] not in states:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {number} is {job['JobState']} ({job.get('Reason')}) after {seconds:.0f} s, not {states}")
            time.sleep(0.2)
        return job

    def ends_of_logs(self, characters: int) -> list[str]:
        """The end of each daemon's log, with its name."""
        return [f"{path.name}: {path.read_text(errors='replace')[-characters:]}" for path in sorted(self.folder.glob("*.log"))]

    def start_node(self, name: str) -> None:
        """Starts a node's slurmd."""
        self._start(f"slurmd-{name}", "slurmd", "-D", "-N", name)

    def kill(self, daemon: str) -> None:
        """SIGKILL to `slurmctld`, `munged` or `slurmd-NODE`."""
        process = self.daemons.pop(daemon)
        process.kill()
        process.wait(10)

    def _start(self, name: str, program: str, *arguments: str) -> None:
        log = open(self.folder / f"{name}.log", "ab")  # noqa: SIM115 (the daemon's)
        self.daemons[name] = subprocess.Popen(
            [_program(program) or program, *arguments], env={**os.environ, **self.environment}, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
        log.close()

    def clear(self) -> None:
        """No jobs, and both nodes idle: the next test finds what the first did, also where this one failed.

        Raises:
            TimeoutError: they are not, after half a minute.
        """
        self._end_jobs()
        for name in self.nodes:
            if f"slurmd-{name}" not in self.daemons:
                self.start_node(name)
        _until(lambda: _idle(self) == set(self.nodes), self, "idle nodes")

    def _end_jobs(self) -> None:
        deadline = time.monotonic() + 10
        with suppress(RuntimeError):  # the controller is not up (any more)
            while (jobs := self.client("squeue", "--noheader", "--format=%A").split()) and time.monotonic() < deadline:
                for options in (("--full", "--signal=KILL"), ()):
                    with suppress(RuntimeError):  # one has ended meanwhile
                        self.client("scancel", *options, *jobs)
                time.sleep(0.3)

    def stop(self) -> None:
        """Ends all jobs, whose steps would outlive the daemons, and all daemons."""
        self._end_jobs()
        for name in reversed(list(self.daemons)):
            self.daemons[name].send_signal(signal.SIGTERM)
        for process in self.daemons.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


@contextmanager
def cluster(folder: Path, cpus: int = 4) -> Iterator[Cluster]:
    """Two nodes `n1` and `n2` with `cpus` each, idle and ready.

    Raises:
        TimeoutError: they were not within half a minute; the message has the ends of the daemons' logs.
    """
    (folder / "munge").mkdir(parents=True)
    (folder / "munge").chmod(0o755)
    key, munge = folder / "munge" / "key", folder / "munge" / "socket"
    subprocess.run([_program("mungekey") or "mungekey", "--create", f"--keyfile={key}"], check=True, timeout=30)
    with ExitStack() as stack:
        controller, *slurmd = _free_ports(3)
        (folder / "slurm.conf").write_text(_configuration(folder, munge, controller, slurmd, cpus))
        made = Cluster(folder, {"SLURM_CONF": str(folder / "slurm.conf")})
        stack.callback(made.stop)
        made._start(
            "munged", "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}", f"--pid-file={folder}/munge/pid",
            f"--log-file={folder}/munge/log", f"--seed-file={folder}/munge/seed",
        )  # fmt: skip
        _until(lambda: munge.exists(), made, "munged's socket")
        made._start("slurmctld", "slurmctld", "-D")
        for name in made.nodes:
            made.start_node(name)
        _until(lambda: _idle(made) == set(made.nodes), made, "idle nodes")
        yield made


@contextmanager
def cluster_or_skip(folder: Path) -> Iterator[Cluster]:
    """A cluster for a test; where its daemons do not come up (a sandbox that forbids what they need) the test skips and says so."""
    with ExitStack() as stack:
        try:
            made = stack.enter_context(cluster(folder))
        except (TimeoutError, OSError, subprocess.CalledProcessError) as error:
            if not may_lack("slurm"):
                raise
            pytest.skip(f"Slurm is installed but does not start here: {error}")
        yield made


def _idle(made: Cluster) -> set[str]:
    try:
        return set(made.client("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N").split())
    except RuntimeError:  # the controller is not up yet
        return set()


def _until(condition, made: Cluster, what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {what} after {seconds:.0f} s; logs: {made.ends_of_logs(1500)}")
        time.sleep(0.1)


def _configuration(folder: Path, munge: Path, controller: int, slurmd: list[int], cpus: int) -> str:
    """Jobs are not numbered from 1, for slurm/spice.sh takes a port by the number, and there may be another cluster on this machine.
    cred_expire is also how long a requeued job has to wait, 2 minutes by default. KillWait is enough for any save on a busy machine, so
    that one that is missing was not made; a job that has ended waits for nothing. Jobs of `urgent` preempt those of `main`, and those of
    `graceful`, whose steps are told to end first, and whose scripts are not."""
    return f"""\
ClusterName=test
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmUser=root
SlurmctldPort={controller}
FirstJobId={controller}
AuthType=auth/munge
AuthInfo=socket={munge},cred_expire=6
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2
ReturnToService=2
SwitchType=switch/none
MpiDefault=none
KillWait=120
InactiveLimit=0
SlurmdTimeout=10
JobRequeue=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=n1 NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={slurmd[0]} CPUs={cpus}
NodeName=n2 NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={slurmd[1]} CPUs={cpus}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1
PartitionName=graceful Nodes=n1,n2 MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=1 GraceTime=90
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP OverSubscribe=NO PriorityTier=10
"""


def _free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago; the daemons cannot be given open sockets."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _program(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + os.pathsep + SBIN)
