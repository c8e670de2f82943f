from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from megatron_spice.cluster.children import Child
from megatron_spice.cluster.ports import ReservedPort

ENVIRONMENT = dict(os.environ, PYTHONPATH=str(Path(__file__).parents[2]))
# A child with a child of its own; both ids go to stdout.
FAMILY = """
import os, subprocess, sys, time
from megatron_spice.cluster.children import die_with_parent
die_with_parent()
grandchild = subprocess.Popen([sys.executable, "-c", "import time; from megatron_spice.cluster.children import "
    f"die_with_parent; die_with_parent({os.getpid()}); time.sleep(60)"])
print("ready", grandchild.pid, flush=True)
time.sleep(60)
"""
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(60)"


def runs(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(condition, seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


def start(code: str, log: Path, **settings: float) -> Child:
    child = Child([sys.executable, "-c", code], log_path=log, environment=ENVIRONMENT, **settings)
    assert until(lambda: "ready" in child.log_tail()), child.log_tail()
    return child


def test_stop_ends_the_child_and_its_children(tmp_path: Path) -> None:
    child = start(FAMILY, tmp_path / "logs" / "child.log")
    grandchild = int(child.log_tail().split()[1])
    assert runs(child.pid) and runs(grandchild) and child.exit_code() is None
    child.stop()
    child.stop()
    assert not runs(child.pid) and not runs(grandchild) and child.exit_code() == -signal.SIGTERM


def test_a_child_that_ignores_the_orderly_request_is_killed_after_the_grace(tmp_path: Path) -> None:
    child = start(STUBBORN, tmp_path / "child.log", grace=0.3)
    began = time.monotonic()
    child.stop()
    assert child.exit_code() == -signal.SIGKILL and 0.3 <= time.monotonic() - began < 5


def test_killing_the_parent_ends_the_whole_family(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    parent = subprocess.Popen(
        [sys.executable, "-c", f"""
import os, sys, time
from pathlib import Path
from megatron_spice.cluster.children import Child
child = Child([sys.executable, "-c", {FAMILY!r}], log_path=Path({str(log)!r}), environment=dict(os.environ))
print(child.pid, flush=True)
time.sleep(60)
"""],
        stdout=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert until(lambda: log.exists() and "ready" in log.read_text())
    grandchild = int(log.read_text().split()[1])
    parent.kill()
    parent.wait()
    assert until(lambda: not runs(child) and not runs(grandchild))


def test_a_child_whose_parent_died_before_it_could_ask_ends_itself() -> None:
    code = "from megatron_spice.cluster.children import die_with_parent; die_with_parent(1 << 22); print('lives')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=ENVIRONMENT, timeout=30)
    assert done.returncode == 1 and done.stdout == b""


def test_the_log_is_for_its_owner_only_and_is_added_to(tmp_path: Path) -> None:
    log = tmp_path / "child.log"
    for _ in range(2):
        child = start("print('ready')", log)
        assert until(lambda: child.exit_code() == 0)
    assert log.stat().st_mode & 0o777 == 0o600 and log.read_text() == "ready\nready\n"


def test_a_reserved_port_can_be_served_on_but_is_given_to_nobody() -> None:
    with ReservedPort() as port:
        others = [socket.create_server(("127.0.0.1", 0)) for _ in range(50)]
        assert port.number not in [other.getsockname()[1] for other in others]
        with socket.create_server(("127.0.0.1", port.number)) as server:
            socket.create_connection(server.getsockname()).close()
        for other in others:
            other.close()


def test_a_log_that_cannot_be_written_neither_stops_the_child_nor_hides_its_last_words(tmp_path: Path) -> None:
    (tmp_path / "child.log").symlink_to("/dev/full")
    code = "import sys; print('x' * 300000); print('ready', flush=True); sys.exit('last words')"
    child = Child([sys.executable, "-c", code], log_path=tmp_path / "child.log", environment=ENVIRONMENT)
    assert until(lambda: child.exit_code() == 1)
    assert child.log_tail(2) == "ready\nlast words"
    child.stop()


def test_logs_leave_no_open_file(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for number in range(3):
        start("print('ready', flush=True); import time; time.sleep(60)", tmp_path / f"{number}.log").stop()
    assert len(os.listdir("/proc/self/fd")) == before
    assert (tmp_path / "2.log").read_text() == "ready\n"
