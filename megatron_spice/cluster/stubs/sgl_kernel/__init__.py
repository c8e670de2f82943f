"""SGLang's kernel package by name only, for machines without an accelerator.

The real package is a CUDA (or AMX) binary. SGLang imports names from it at module level even on a CPU, where it then
takes torch's own operators because it finds no AMX. Every name therefore resolves to a function that raises when it is
called: a wrong turn in the dispatch shows at once and says which kernel was wanted.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable
from typing import Any

_OPTIONAL = f"{__name__}.kvcacheio"  # the one submodule that is imported without a fallback


def _kernel(module: str, name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def unavailable(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{module}.{name} is a compiled kernel, and this machine runs without SGLang's kernels")

    unavailable.__name__ = name
    return unavailable


def __getattr__(name: str) -> Callable[..., Any]:
    return _kernel(__name__, name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name == _OPTIONAL:  # other submodules are looked for with a fallback: they must stay missing
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = lambda name: _kernel(spec.name, name)  # type: ignore[method-assign]
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


sys.meta_path.insert(0, _Finder())
