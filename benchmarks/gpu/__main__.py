"""Run `python benchmarks/gpu` from a checkout; imprompt itself need not be installed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    root = Path(__file__).resolve().parents[2]
    rooms = [str(root / room) for room in ("client", "export", "model_repository", "benchmarks", "demo")]
    if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
        del sys.path[0]  # or the modules of this package would be importable under a second name
    sys.path[:0] = rooms
    # The processes inside Triton import imprompt from here, too.
    os.environ["PYTHONPATH"] = os.pathsep.join([*rooms, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]).strip(":")

    from gpu.cli import main

    raise SystemExit(main(sys.argv[1:]))
