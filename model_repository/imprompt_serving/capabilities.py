"""What a bundle can do, as clients read it (`Client.describe`)."""

from __future__ import annotations

from typing import Any

from imprompt_serving.families import get_family
from imprompt_serving.parameters import ROWS
from imprompt_serving.scheduler_names import SCHEDULERS
from imprompt_serving.specs import Bundle


def capabilities(bundle: Bundle) -> dict[str, Any]:
    """Describe adapters, schedulers, defaults, and limits as plain JSON values."""
    shapes = bundle.shapes
    return {
        "name": bundle.name,
        "family": bundle.family,
        "backend": bundle.backend,
        "precision": bundle.precision,
        "ip_adapters": [
            {
                "name": adapter.name,
                "kind": adapter.kind,
                "image_tokens": adapter.num_tokens,
                "image_embeds": list(adapter.embed_shape),
                "takes_images": adapter.image_encoder is not None or bundle.finds_faces(adapter),
                "finds_faces": bundle.finds_faces(adapter),
            }
            for adapter in bundle.adapters
        ],
        "controlnets": list(bundle.net_names),
        "loras": list(bundle.loras),
        "video": bundle.motion is not None,
        "schedulers": list(SCHEDULERS),
        "defaults": {
            "height": bundle.default_height,
            "width": bundle.default_width,
            "scheduler": bundle.scheduler,
            "guidance_scale": get_family(bundle.family).default_guidance_scale(bundle.plain_task, controlled=False),
            **{row.name: row.default for row in ROWS if row.set_by_bundles and row.default is not None},
            **bundle.defaults,
        },
        "limits": {
            "height": [shapes.height.min, shapes.height.max],
            "width": [shapes.width.min, shapes.width.max],
            "rows": shapes.rows.max,
            **({"frames": [shapes.frames.min, shapes.frames.max]} if bundle.motion else {}),
            "image_tokens": shapes.image_tokens[-1],
        },
    }
