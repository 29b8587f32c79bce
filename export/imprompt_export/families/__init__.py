"""Model families: what is exported of each, and which bases belong to it. One light module each, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from imprompt_export.errors import BundleError
from imprompt_serving.families import NAMES


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportFamily:
    """How the checkpoints of one family become graphs, and what goes with them."""

    name: str
    title: str
    """What messages call it."""
    pipelines: tuple[str, ...]
    """Pipelines of diffusers that a base may name; the tasks are the server's own, whichever it names."""
    text_encoders: tuple[tuple[str, str], ...]
    """Components of the pipeline: each text encoder, after which its engine is named, and its tokenizer."""
    adapter_files: str
    """The IP-Adapter files that are made for it, as a pattern."""
    penultimate: bool = False
    """Whether text embeddings are hidden states of the last layer but one, without the final norm."""
    pooled: bool = False
    """Whether the last text encoder gives a pooled embedding too."""
    adapts_middle: bool = False
    """Whether T2I-Adapters add to the middle block too, as a `full_adapter_xl` does."""
    clips: bool = False
    """Whether motion adapters go with it."""

    def check_base(self, index: Mapping[str, Any]) -> None:
        """Refuse a base by its `model_index.json`.

        Raises:
            BundleError: a text encoder is missing.
        """
        for encoder, _ in self.text_encoders:
            if not all(index.get(encoder) or (None,)):
                raise BundleError(f"base: it has no {encoder}")


def export_family(name: str) -> ExportFamily:
    """The family called `name`, one of `imprompt_serving.families.NAMES`."""
    found: ExportFamily = import_module(f"{__name__}.{name}").FAMILY
    return found


def all_families() -> tuple[ExportFamily, ...]:
    return tuple(map(export_family, NAMES))


def family_of(pipeline: str | None) -> ExportFamily:
    """The family of a base whose `model_index.json` names the class `pipeline`.

    Raises:
        BundleError: no family has it.
    """
    by_pipeline = {served: family for family in all_families() for served in family.pipelines}
    if pipeline not in by_pipeline:
        raise BundleError(f"base: {pipeline} is not served; folders of {', '.join(sorted(by_pipeline))} are")
    return by_pipeline[pipeline]
