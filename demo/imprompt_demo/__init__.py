"""A small picture world, the scripts that train a family of tiny diffusion models on it, and the trained bundle.

`imprompt_demo.world` makes pictures, `imprompt_demo.metrics` measures them, `bundle_path()` is the checkpoint set.
"""

import os
from pathlib import Path


def bundle_path() -> Path:
    """The folder that holds `bundle.toml` and `checkpoints/`."""
    return Path(__file__).parent / "bundle"


def main(arguments: list[str]) -> int:
    """`imprompt demo`. What it needs beyond this package is loaded here, so that the world can do without."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read at import, which itself has warnings to give
    from imprompt_demo.demo import run

    return run(arguments)
