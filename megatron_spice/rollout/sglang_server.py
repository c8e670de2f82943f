"""The process that serves rollouts: one SGLang HTTP server, started by `supervisor.py` as a child of a training rank.

    python -m megatron_spice.rollout.sglang_server '{"server": {...ServerArgs...}, "cpu_threads": 2, "cpu_attention": "batched"}'

`cpu_threads` null means an accelerator. `cpu_attention` "native" is SGLang's own, for comparison.

The API key comes in the environment, not among the arguments, which every user of the machine can read. SGLang starts a
process for each scheduler (the model) and one for the detokenizer. With an accelerator it spawns them, which imports this module
again in each, so what has to be true in every process of the server (who it dies with, how OpenMP waits, where the CPU stand-ins
are) is arranged at import, before torch is. Without one they are forked from the server, which has imported everything and has
no other thread yet: importing costs each process eight seconds of a core, and both half a gigabyte. Nothing else in the package
imports `sglang` except `cpu_attention.py`, `cpu_fp8.py` and `cpu_seeds.py`, which only load in here.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_spice.cluster.children import die_with_parent

KEY_VARIABLE = "MEGATRON_SPICE_ENGINE_KEY"
THREADS_VARIABLE = "MEGATRON_SPICE_ENGINE_THREADS"
ATTENTION_VARIABLE = "MEGATRON_SPICE_ENGINE_ATTENTION"
STUBS = Path(__file__).parent.parent / "cluster" / "stubs"


def prepare_cpu_process(threads: int) -> None:
    """Settings of a server process without an accelerator; before torch is imported, or OpenMP has read its own."""
    os.environ.update(
        SGLANG_USE_CPU_ENGINE="1",
        TOKENIZERS_PARALLELISM="false",
        TORCHDYNAMO_DISABLE="1",  # no compiler is needed here, and looking for one costs seconds
        # Workers that spin while they wait take the cores from the trainer and from each other; those that sleep at once
        # have to be woken for every small operation: a quarter fewer tokens a second. So they spin for 0.1 ms.
        OMP_WAIT_POLICY="PASSIVE",
        GOMP_SPINCOUNT="10000",
        OMP_NUM_THREADS=str(threads),
        OPENBLAS_NUM_THREADS="1",  # numpy's own library would start its threads when it is imported: see `fork_workers`
    )
    if str(STUBS) not in sys.path:
        sys.path.insert(0, str(STUBS))
    import triton  # noqa: F401  the stand-in; torchvision cannot be imported before it


class _WhenReady:
    """A pipe's sending end that first does something: SGLang sends once, when a scheduler is up."""

    def __init__(self, pipe: Any, first: Callable[[], None]) -> None:
        self._pipe = pipe
        self._first = first

    def send(self, message: Any) -> None:
        self._first()
        self._pipe.send(message)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


def fork_workers() -> None:
    """SGLang forks what it launches from here on, where it would spawn. Not with an accelerator: CUDA does not survive a fork."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for launch in ("_launch_scheduler_processes", "_launch_detokenizer_subprocesses"):
        HookRegistry.register(f"sglang.srt.entrypoints.engine.Engine.{launch}", forking, HookType.AROUND)
    HookRegistry.apply_hooks()


def forking(launch: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """Calls `launch` with "fork" as multiprocessing's way to start processes, if no thread but this one is there.

    Another might hold a lock that the copy would wait for forever. So it is looked at here, after all that SGLang does before.
    """
    from tqdm import tqdm

    if (num_threads := len(os.listdir("/proc/self/task"))) > 1:
        print(
            f"the server has {num_threads} threads already: its processes are not forked, and import for themselves "
            "(8 seconds of a core and half a gigabyte each)", flush=True,
        )  # fmt: skip
        return launch(*arguments, **more)
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("fork", force=True)
    tqdm.get_lock()  # of the bars that it draws as it loads: made by a spawning process it has a name in /dev/shm, left by one that is killed
    try:
        return launch(*arguments, **more)
    finally:
        multiprocessing.set_start_method(before, force=True)


def _begin_worker() -> None:
    """What a forked process has to undo or repeat; for a spawned one nothing changes."""
    multiprocessing.set_start_method("spawn", force=True)  # it has threads soon
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # SGLang has the server end its children with it by now
    if parent := multiprocessing.parent_process():
        die_with_parent(parent.pid)


def run_detokenizer(*arguments: Any, **more: Any) -> None:
    """SGLang's detokenizer process; takes the arguments of its `run_detokenizer_process`."""
    from sglang.srt.managers.detokenizer_manager import run_detokenizer_process

    _begin_worker()
    run_detokenizer_process(*arguments, **more)


def run_scheduler(
    server_args: Any, port_args: Any, gpu_id: int, tp_rank: int, pp_rank: int, dp_rank: int | None, pipe_writer: Any,
    *rest: Any, **display: Any,
) -> None:  # fmt: skip
    """SGLang's scheduler process; takes the arguments of its `run_scheduler_process`.

    It publishes its load in a file in /dev/shm that no ending of the server removes, not even an orderly one. Only load
    balancers read it, so the name goes as soon as the scheduler has mapped the file.
    """
    from sglang.srt.managers.load_snapshot import shm_path_for
    from sglang.srt.managers.scheduler import run_scheduler_process

    _begin_worker()
    if os.environ.get(ATTENTION_VARIABLE) == "batched":
        from megatron_spice.rollout import cpu_attention

        cpu_attention.register()
    if os.environ.get(THREADS_VARIABLE) and "quantization_config" in server_args.json_model_override_args:
        from megatron_spice.rollout import cpu_fp8

        cpu_fp8.register()
    if server_args.enable_deterministic_inference and server_args.device == "cpu":
        from megatron_spice.rollout import cpu_seeds

        cpu_seeds.register()
    load_file = Path(shm_path_for(port_args.instance_id))
    announcing = _WhenReady(pipe_writer, lambda: load_file.unlink(missing_ok=True))
    run_scheduler_process(server_args, port_args, gpu_id, tp_rank, pp_rank, dp_rank, announcing, *rest, **display)


def main(arguments: dict[str, Any]) -> None:
    """Serves until told to stop; does not return before."""
    threads = arguments.get("cpu_threads")
    if threads:
        os.environ[THREADS_VARIABLE] = str(threads)
        os.environ[ATTENTION_VARIABLE] = arguments.get("cpu_attention", "batched")
        if "cpu_binding" in arguments:
            os.environ["SGLANG_CPU_OMP_THREADS_BIND"] = arguments["cpu_binding"]
        prepare_cpu_process(threads)

    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs
    from sglang.srt.utils import kill_process_tree

    if threads and arguments["server"].get("enable_deterministic_inference"):
        from megatron_spice.rollout import cpu_seeds

        cpu_seeds.allow()
    if threads:
        fork_workers()
    try:
        server = ServerArgs(api_key=os.environ.pop(KEY_VARIABLE), **arguments["server"])
        launch_server(server, run_scheduler_process_func=run_scheduler, run_detokenizer_process_func=run_detokenizer)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    die_with_parent()
    main(json.loads(sys.argv[1]))
elif __name__ == "__mp_main__":  # a process that SGLang spawned
    _parent = multiprocessing.parent_process()
    die_with_parent(_parent.pid if _parent else 0)
    if os.environ.get(THREADS_VARIABLE):
        prepare_cpu_process(int(os.environ[THREADS_VARIABLE]))
