"""Import diffusers without `torch._dynamo`: imports take two thirds of the CPU time, and 65 MB less memory.

diffusers imports it for a decorator that only matters to `torch.compile`, and does without if it is missing
(`diffusers/utils/torch_utils.py`). Later imports of `torch._dynamo` succeed.
"""

import sys
from typing import Any

import torch  # noqa: F401  # before: it looks for the module as well

_NAME = "torch._dynamo"
_modules: dict[str, Any] = sys.modules
if _NAME not in _modules:
    _modules[_NAME] = None  # importing it raises ModuleNotFoundError
    try:
        import diffusers.utils.torch_utils  # noqa: F401
    finally:
        del _modules[_NAME]
