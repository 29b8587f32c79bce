"""Model families: what to export for each, and which bases belong to it. One module per family, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from imprompt_export.errors import BundleError
from imprompt_serving.families import NAMES


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportFamily:
    """What the export needs to know about one family of checkpoints."""

    name: str
    title: str
    """The name of the family in messages."""
    pipelines: tuple[str, ...]
    """diffusers pipelines that a base may name; they all offer the same tasks."""
    text_encoders: tuple[tuple[str, str], ...]
    """Pipeline components: each text encoder, which also names its engine, with its tokenizer."""
    adapter_files: str = ""
    """Pattern of the public IP-Adapter files for this family; empty if there are none."""
    aesthetic_score: bool = False
    """Whether its bases set `requires_aesthetics_score` in their `model_index.json`."""
    penultimate: bool = False
    """Whether text embeddings are the hidden states before the last layer, without the final norm."""
    pooled: bool = False
    """Whether the last text encoder also produces a pooled embedding."""
    adapts_middle: bool = False
    """Whether T2I-Adapters also add to the middle block, as a `full_adapter_xl` does."""
    clips: bool = False
    """Whether the family supports motion adapters."""

    def check_base(self, index: Mapping[str, Any]) -> None:
        """Check a base by its `model_index.json`.

        Raises:
            BundleError: a text encoder is missing.
        """
        for encoder, _ in self.text_encoders:
            if not all(index.get(encoder) or (None,)):
                raise BundleError(f"base: it has no {encoder}")


def export_family(name: str) -> ExportFamily:
    """Return the family called `name`, one of `imprompt_serving.families.NAMES`."""
    found: ExportFamily = import_module(f"{__name__}.{name}").FAMILY
    return found


def all_families() -> tuple[ExportFamily, ...]:
    return tuple(map(export_family, NAMES))


def family_of(pipeline: str | None, config: Mapping[str, Any]) -> ExportFamily:
    """Return the family of a base that names the class `pipeline` in its `model_index.json`.

    Args:
        pipeline: the name of the class.
        config: the configuration of the pipeline, or the whole `model_index.json`.

    Raises:
        BundleError: no family has this pipeline.
    """
    scored = bool(config.get("requires_aesthetics_score"))
    by_pipeline = {
        supported: family
        for family in all_families()
        if family.aesthetic_score == scored
        for supported in family.pipelines
    }
    if pipeline not in by_pipeline:
        what = f"{pipeline} with requires_aesthetics_score" if scored else pipeline
        raise BundleError(f"base: {what} is not supported; expected one of {', '.join(sorted(by_pipeline))}")
    return by_pipeline[pipeline]
