"""The CPU platform: lets unmodified Megatron-Core run where there is no accelerator.

Megatron-Core 0.16 asks `torch.cuda` for its device, streams, events and random state even where none of them matters to
the numbers. On a machine without CUDA those few names are redirected, once, as `megatron.core` is first imported:

    torch.cuda.current_device()         -> the CPU device; set_device, synchronize, empty_cache do nothing
    torch.cuda.Stream, Event, stream()  -> objects that do nothing: CPU work is already in order
    torch.cuda.get_rng_state and kin    -> the CPU generator's
    device="cuda" in any torch call     -> device="cpu"; Tensor.cuda() is the tensor itself
    Tensor.type()                       -> "torch.cuda.*Tensor": the distributed optimizer compares the name
    Megatron's own pair of functions for CUDA's random state, which ask the driver -> the CPU generator's
    Megatron's sums and gathers over data-parallel ranks -> nothing in a group of one, where gloo would copy buffers onto
    themselves
    Megatron's experts: a name that only Transformer Engine brings -> None; split sizes become numbers on CPU too

On CUDA nothing is touched. The stand-ins for Triton and SGLang's kernels are in `stubs/`; only packages that cannot be
imported without them see those.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

STUBS = Path(__file__).parent / "stubs"

_redirect: Any = None


def wants_cuda(device: str = "auto") -> bool:
    """Whether this run uses CUDA: `device` is "auto", "cpu" or "cuda".

    Raises:
        RuntimeError: "cuda" was asked for and this torch finds no CUDA device.
    """
    if device == "cpu":
        return False
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise RuntimeError("cluster.device=cuda, but torch finds no CUDA device; use cluster.device=auto or cpu")
    return available


def prepare(device: str = "auto") -> str:
    """Makes `megatron.core` importable on this machine and returns "cuda" or "cpu". Call it before importing Megatron."""
    global _redirect
    if wants_cuda(device):
        return "cuda"
    if _redirect is None:
        if "megatron.core" in sys.modules:
            raise RuntimeError("megatron.core was imported before cluster.platform.prepare()")
        # Megatron fuses small functions with torch.compile, which trips over redirected names and, on CPU, costs a run of
        # the C++ compiler in every process.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        _quieten()
        _add_stubs()
        _redirect = _redirect_cuda()
        _redirect_megatron_rng()
        _redirect_megatron_experts()
        _redirect_megatron_collectives()
    return "cpu"


def _quieten() -> None:
    """Megatron says at each import, in each process, that Transformer Engine and Apex are missing; `doctor` says it once."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(megatron\.core|megatron_spice\.cluster\.platform)")


def _add_stubs() -> None:
    """Puts the stand-ins on the path of this process and of its children."""
    stubs = str(STUBS)
    if stubs not in sys.path:
        sys.path.insert(0, stubs)
    inherited = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    if stubs not in inherited:
        os.environ["PYTHONPATH"] = os.pathsep.join([stubs, *inherited])


class _Nothing:
    """A stream or an event on a device that finishes each call before it returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = None

    def _done(self, *args: Any, **kwargs: Any) -> None:
        return None

    record = wait = synchronize = wait_stream = wait_event = _done

    def record_event(self, event: Any = None) -> Any:
        return event or _Nothing()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *exc: Any) -> bool:
        return False


class _Stream(_Nothing):
    pass


class _Event(_Nothing):
    pass


def _redirect_cuda() -> Any:
    """Replaces the names listed above and enters the mode that rewrites devices. Returns the mode, which must stay alive."""
    import torch

    cpu = torch.device("cpu")

    def is_cuda(device: Any) -> bool:
        return isinstance(device, (str, torch.device)) and str(device).startswith("cuda")

    class CudaMeansCpu(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if is_cuda(kwargs.get("device")):
                kwargs["device"] = cpu
            if func is torch.Tensor.cuda:
                return args[0]
            if func is torch.Tensor.type and len(args) == 1 and not kwargs:
                return func(*args).replace("torch.", "torch.cuda.")
            if func is torch.Tensor.to and len(args) > 1 and is_cuda(args[1]):
                args = (args[0], cpu, *args[2:])
            return func(*args, **kwargs)

    cuda = torch.cuda
    # Each name gets a function of its own: torch.compile refuses to import when two of these are one object.
    cuda.current_device = lambda: cpu
    cuda.set_device = lambda device: None
    cuda.synchronize = lambda device=None: None
    cuda.empty_cache = lambda: None
    cuda.Stream, cuda.Event = _Stream, _Event
    cuda.current_stream = lambda device=None: _Stream()
    cuda.default_stream = lambda device=None: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device=None: torch.get_rng_state()
        module.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.default_generators = [torch.default_generator]

    mode = CudaMeansCpu()
    mode.__enter__()
    return mode


def _redirect_megatron_rng() -> None:
    """Megatron keeps its own pair of functions for CUDA's random state; they talk to the driver directly."""
    import megatron.core.tensor_parallel.random as megatron_random
    import torch

    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)


def _redirect_megatron_experts() -> None:
    """The router asks for Transformer Engine's product by name before it looks whether it is there; the all-to-all
    dispatcher makes numbers of its split sizes only when they lie on CUDA."""
    import torch
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def as_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    token_dispatcher.maybe_move_tensor_to_cpu = as_numbers


def _redirect_megatron_collectives() -> None:
    """Gradients and weights are divided over data-parallel ranks and gathered again. One rank has them where they are."""
    from megatron.core.distributed import param_and_grad_buffer as buffers

    def unless_alone(collective: Any) -> Any:
        def call(output: Any, input: Any, **settings: Any) -> Any:
            if settings["group"].size() == 1 and output.data_ptr() == input.data_ptr():
                return None
            return collective(output, input, **settings)

        return call

    buffers.dist_reduce_scatter_func = unless_alone(buffers.dist_reduce_scatter_func)
    buffers.dist_all_gather_func = unless_alone(buffers.dist_all_gather_func)
