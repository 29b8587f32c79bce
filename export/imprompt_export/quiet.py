"""Silence the libraries that load and trace checkpoints during an export."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let transformers, diffusers, and huggingface_hub only log errors; hide progress bars and Python's warnings."""
    from transformers.utils import logging as transformers_logging  # isort: skip - before diffusers, which it warns about

    transformers_level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    diffusers_level, hub_level = diffusers_logging.get_verbosity(), hub_logging.get_verbosity()
    bars = not are_progress_bars_disabled()
    diffusers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    for library in (transformers_logging, diffusers_logging):
        library.disable_progress_bar()
    disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(transformers_level)
        diffusers_logging.set_verbosity(diffusers_level)
        hub_logging.set_verbosity(hub_level)
        for library in (transformers_logging, diffusers_logging):
            library.enable_progress_bar()
        if bars:
            enable_progress_bars()
