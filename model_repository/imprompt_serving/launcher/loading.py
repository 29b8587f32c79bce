"""What a server is still loading while it starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from imprompt_serving.heartbeat import Pulse, model_of

SHOWN = 3
"""Number of models to name in a message."""


class Loading:
    """Follows the models of a repository by their heartbeats. Models of other origin have none."""

    def __init__(self, repository: Path) -> None:
        # The export marks the models of a bundle with this file. Triton's native backends have no model.py.
        self._models = {
            file.parents[1].name for file in repository.glob("*/1/owner") if file.with_name("model.py").is_file()
        }

    def message(self, pulses: Mapping[str, Pulse]) -> str:
        """Say how many models are loaded, and which are not; empty if there is nothing to say."""
        loaded = {model_of(name) for name, pulse in pulses.items() if pulse.loaded}
        missing = sorted(self._models - loaded)
        if not missing:
            return ""
        names = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        return f"{len(self._models) - len(missing)} of {len(self._models)} models loaded; loading {names}"
