"""A Triton that can be imported but never compiles, for machines without an accelerator.

SGLang imports Triton at module level and decorates kernels with it, although on a CPU none of them is launched: its
dispatch picks the plain torch implementation first. So what has to work is `import`, attribute access, decoration and
annotation, not execution. Here every submodule exists (a finder makes them on demand), every capitalised attribute is
an empty class, every other attribute is a submodule that can also be called as a decorator, and decorating returns the
function unchanged. Launching such a "kernel" fails, as it should. Asking for the active driver raises, which is how
torch and SGLang find out that there is no device to compile for.

Never put this on the path of a process that has CUDA: `cluster/platform.py` decides.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

from torch import library

__version__ = "3.0.0"
__all__ = ["autotune", "cdiv", "heuristics", "jit", "next_power_of_2"]


def _declare_torchvision_operators() -> None:
    """Declares the two operators that torchvision registers fakes for.

    The torchvision on PyPI is linked to CUDA; beside a CPU torch its extension does not load and the import ends with
    "operator torchvision::nms does not exist". Declared, the import works; nothing here calls them.
    """
    for name in ("nms", "qnms"):
        try:
            library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:  # a torchvision that fits this torch has declared it
            return


def _decorator(*args: Any, **kwargs: Any) -> Any:
    """`@jit` and `@jit(...)` alike: gives the decorated object back."""
    if len(args) == 1 and not kwargs and callable(args[0]):
        return args[0]
    return lambda decorated: decorated


class _Placeholder:
    """What a capitalised name is: can be constructed, subclassed and subscripted, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass

    def __class_getitem__(cls, item: Any) -> Any:
        return cls


class _Anything(types.ModuleType):
    """A module in which every public name exists."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "driver":
            raise RuntimeError("this machine has no Triton driver: the triton imported here is a stand-in for CPU")
        made = type(name, (_Placeholder,), {}) if name[0].isupper() else _submodule(f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _decorator(*args, **kwargs)

    def __getitem__(self, item: Any) -> Any:
        return self


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Makes `triton.anything` importable."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.startswith(f"{__name__}."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Anything(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


_finder = _Finder()


def _submodule(name: str) -> types.ModuleType:
    if name not in sys.modules:
        module = _Anything(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, _finder, is_package=True)
        sys.modules[name] = module
    return sys.modules[name]


def cdiv(numerator: int, denominator: int) -> int:
    """Integer division, rounded up: host code computes launch grids with it."""
    return -(-numerator // denominator)


def next_power_of_2(value: int) -> int:
    """The smallest power of two that is not below `value`."""
    return 1 << max(value - 1, 0).bit_length()


jit = autotune = heuristics = _decorator

_declare_torchvision_operators()
sys.meta_path.insert(0, _finder)
sys.modules[__name__].__class__ = _Anything
