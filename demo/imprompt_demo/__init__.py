"""A procedural picture world, scripts that train a set of tiny diffusion models on it, and the trained bundle.

`imprompt_demo.world` renders pictures, `imprompt_demo.metrics` measures them, and `bundle_path()` locates the trained
checkpoints.
"""

import os
from pathlib import Path


def bundle_path() -> Path:
    """Return the folder with `bundle.toml` and `checkpoints/`."""
    return Path(__file__).parent / "bundle"


def main(arguments: list[str]) -> int:
    """Run `imprompt demo`. The imports are local so that `world` works without the export and server extras."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # must be set before the import, which already warns
    from imprompt_demo.demo import run

    return run(arguments)
