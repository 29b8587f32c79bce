"""Tiny random checkpoints in the public layouts, test pictures, and diffusers as the oracle.

| module | makes |
|---|---|
| `base` | whole diffusers pipeline folders (SD1.5, SDXL, inpainting, LCM-distilled) |
| `adapters` | image encoders and IP-Adapter files of every kind |
| `control` | ControlNets, T2I-Adapters, motion adapters, LoRA files |
| `images` | pictures, masks, control images, face embeddings |
| `oracle` | diffusers pipelines over these folders, picture distances |

Widths are about a sixteenth of the real ones, so that shapes keep their real relations. Everything follows from a
seed; the global random state is neither used nor changed.
"""
