"""An SGLang server as a child process: started, watched, stopped, started anew. `SglangEngine` is the `Engine` of real runs.

A separate process, not a library in the trainer: it may crash, leak or be killed without taking training state with it,
and it has its own torch threads. It listens on the loopback interface only and wants a key that is made for each start.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_spice.cluster.children import Child
from megatron_spice.cluster.ports import LOOPBACK, ReservedPort
from megatron_spice.cluster.topology import Topology
from megatron_spice.cluster.whereabouts import moved
from megatron_spice.config.schema import Precision, RolloutConfig
from megatron_spice.game.records import Completion, Sampling
from megatron_spice.rollout import leftovers
from megatron_spice.rollout.client import EngineClient
from megatron_spice.rollout.engine import MEMORY, EngineError
from megatron_spice.rollout.placement import server_settings
from megatron_spice.rollout.pulse import Pulse
from megatron_spice.rollout.sglang_server import KEY_VARIABLE

if TYPE_CHECKING:
    import torch

_LOG_LINES = 25
_SETTLES = 1.0  # seconds in which a server ends that was ended with its scheduler
SCRATCH = "spice-engine-"
# What torchrun tells a training rank about its group; an engine that read it would join, or wait for, the trainers.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_RANK_PREFIXES = ("LOCAL_", "TORCHELASTIC_", "GROUP_", "ROLE_")
# What slurm/spice.sh sets for how training ranks use cores and memory; an engine has threads and memory of its own.
_TRAINING_VARIABLES = ("GLIBC_TUNABLES",)
_TRAINING_PREFIXES = ("OMP_", "GOMP_")


class SglangEngine:
    """One engine of this rank.

    Args:
        model: Hugging Face folder: config and tokenizer, and weights if `load_format` is "auto".
        log_path: the server's output, added to at each start.
        quantization: the `quantization_config` of an engine with FP8 weights (`config/engine_weights.py`).
        is_ending: whether the run was asked to end, when nothing is started again.
    """

    def __init__(
        self,
        config: RolloutConfig,
        topology: Topology,
        precision: Precision,
        model: Path,
        log_path: Path,
        *,
        load_format: str = "dummy",
        quantization: dict[str, Any] | None = None,
        is_ending: Callable[[], bool] = lambda: False,
    ) -> None:
        self.log_path = log_path
        self._config = config
        self._topology = topology
        self._precision: Precision = precision
        self._model = model
        self._load_format = load_format
        self._quantization = quantization
        self._is_ending = is_ending
        self._num_starts = 0
        self._child: Child | None = None
        self._ports: list[ReservedPort] = []
        self._scratch: str | None = None
        self._named_memory: set[Path] = set()
        self._client: EngineClient | None = None
        self._pulse: Pulse | None = None

    # ---- life ---------------------------------------------------------------------------------------------------

    def launch(self) -> None:
        """Starts the server and returns at once. From the main thread: the child dies with the thread that starts it."""
        self.close()
        self._num_starts += 1
        self._ports = [ReservedPort(), ReservedPort()]
        _sweep_scratch()
        self._scratch = tempfile.mkdtemp(prefix=f"{SCRATCH}{os.getpid()}-")
        port, rendezvous_port = (reserved.number for reserved in self._ports)
        settings = server_settings(
            self._config, self._topology, self._precision, self._model,
            port=port, rendezvous_port=rendezvous_port, load_format=self._load_format,
            quantization=self._quantization,
        )  # fmt: skip
        key = secrets.token_urlsafe(32)
        self._child = Child(
            [sys.executable, "-m", "megatron_spice.rollout.sglang_server", json.dumps(settings)],
            log_path=self.log_path,
            environment=_server_environment(key, self._scratch),
        )
        self._pulse = Pulse(self._child.pid, self._config.hang_timeout)
        self._client = EngineClient(
            f"http://{LOOPBACK}:{port}",
            key,
            request_timeout=self._config.request_timeout,
            tensor_parallel_size=self._config.tensor_parallel_size,
            compare_first_update=self._config.verify_sync,
            sends_seeds=self._config.deterministic,
            diagnose=self._diagnosis,
            check=self._check_life,
        )

    def wait_ready(self) -> None:
        """Returns when the server takes requests. One that somebody ends by SIGTERM meanwhile is started once more, unless the
        run is to end.

        Raises:
            EngineError: it died, or `rollout.start_timeout` passed; with the end of its log.
        """
        try:
            self._running().wait_ready(self._config.start_timeout, self._check_start)
        except EngineError:
            # It never sends itself this signal. Slurm can, when a node comes back that an earlier attempt of the job was lost with:
            # what is left of that attempt is ended by the job's number, which the new one has too.
            if not self._is_terminated() or self._is_ending() or threading.current_thread() is not threading.main_thread():
                raise
            print(f"rollout: the engine was ended by SIGTERM while it started, and is started once more ({self.log_path})", flush=True)
            self.launch()
            self._running().wait_ready(self._config.start_timeout, self._check_start)
        self._named_memory = leftovers.named_memory(self._child.pid)

    def check(self) -> None:
        """Raises EngineError with the end of the log if the server or its scheduler is not running, or hangs."""
        self._check_life()
        if self._pulse.is_hung(has_work=self._client.num_running > 0):
            raise EngineError(
                f"engine {self._client.url} hangs: it has {self._client.num_running} requests and used no processor time for "
                f"{self._config.hang_timeout:g} s (rollout.hang_timeout)\n{self._diagnosis()}"
            )
        if self._client.num_running:
            moved()

    def _check_life(self) -> None:
        if self._child is None or self._client is None or self._pulse is None:
            raise EngineError("the engine was not launched")
        if self._child.exit_code() is not None:
            raise EngineError(self._diagnosis())
        if (ended := self._pulse.ended()) is not None:
            raise EngineError(f"engine {self._client.url}: its scheduler (process {ended}) has ended\n{self._diagnosis()}")

    def _is_terminated(self) -> bool:
        """Whether SIGTERM has ended the server; one whose scheduler was seen to have ended may take a moment."""
        deadline = time.monotonic() + _SETTLES
        while self._child is not None and self._child.exit_code() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        return self._child is not None and self._child.exit_code() == -signal.SIGTERM

    def _check_start(self) -> None:
        """`check`, and that a server in place of another is still wanted: whoever ended that by a signal may have sent this rank one
        as well, a moment later, and waits for less than an engine takes to start."""
        self.check()
        if self._num_starts > 1 and self._is_ending():
            raise EngineError("an engine in place of one that has ended is not waited for: the run was asked to end")

    def kill(self) -> None:
        """See `Engine.kill`: no time to end in good order, of which a stopped process would use all."""
        if self._child is not None:
            self._named_memory |= leftovers.named_memory(self._child.pid)
            self._child.stop(grace=0.0)
        self.close()

    def close(self) -> None:
        """Ends the server and all it started and removes its scratch files; the log stays. May be called twice."""
        if self._child is not None:
            self._child.stop()
            leftovers.remove(self._named_memory)
            self._named_memory = set()
        for port in self._ports:
            port.release()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        # The client stays until `launch`: it may have connections to let go of.
        self._child, self._ports, self._scratch, self._pulse = None, [], None, None

    @property
    def pid(self) -> int | None:
        """The server's process id and process group, None before `launch`."""
        return self._child.pid if self._child else None

    @property
    def client(self) -> EngineClient:
        """The connection to the running server."""
        return self._running()

    def _running(self) -> EngineClient:
        if self._client is None or self._child is None:
            raise EngineError("the engine was not launched")
        return self._client

    def _diagnosis(self) -> str:
        """What an error message should say about the server: whether it runs, and the end of its log."""
        if self._child is None:
            return ""
        code = self._child.exit_code()
        state = "still runs" if code is None else f"has ended with exit code {code}"
        tail = self._child.log_tail(_LOG_LINES)
        return f"The engine {state}; the end of its log ({self.log_path}):\n{tail}"

    # ---- the verbs of `Engine`, by the client -------------------------------------------------------------------

    async def generate(self, prompt_ids: list[int], num_samples: int, sampling: Sampling) -> list[Completion]:
        """See `EngineClient.generate`."""
        return await self._running().generate(prompt_ids, num_samples, sampling)

    async def abort(self) -> None:
        """See `EngineClient.abort`."""
        await self._running().abort()

    async def close_requests(self) -> None:
        """See `EngineClient.close_requests`."""
        if self._client is not None:
            await self._client.close_requests()

    def sleep(self, kinds: Sequence[str] = MEMORY) -> None:
        """See `EngineClient.sleep`."""
        self._running().sleep(kinds)

    def wake(self, kinds: Sequence[str] = MEMORY) -> None:
        """See `EngineClient.wake`."""
        self._running().wake(kinds)

    def begin_update(self) -> None:
        """See `EngineClient.begin_update`."""
        self._running().begin_update()

    def update_bucket(self, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """See `EngineClient.update_bucket`."""
        self._running().update_bucket(named_tensors)

    def end_update(self, version: str) -> None:
        """See `EngineClient.end_update`."""
        self._running().end_update(version)

    def weight_version(self) -> str:
        """See `EngineClient.weight_version`."""
        return self._running().weight_version()

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """See `EngineClient.score`."""
        return self._running().score(token_ids)


def _sweep_scratch() -> None:
    """Removes the scratch folders of ranks that were killed before they could."""
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH}*-*"):
        owner = folder.name.removeprefix(SCRATCH).split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _server_environment(key: str, scratch: str) -> dict[str, str]:
    """This process's environment without what concerns training ranks, with the key, the package and a scratch folder."""
    left_out, prefixes = _RANK_VARIABLES + _TRAINING_VARIABLES, _RANK_PREFIXES + _TRAINING_PREFIXES
    kept = {name: value for name, value in os.environ.items() if name not in left_out and not name.startswith(prefixes)}
    package_root = str(Path(__file__).resolve().parents[2])
    path = [package_root, *filter(None, kept.get("PYTHONPATH", "").split(os.pathsep))]
    return kept | {KEY_VARIABLE: key, "TMPDIR": scratch, "PYTHONPATH": os.pathsep.join(path)}
