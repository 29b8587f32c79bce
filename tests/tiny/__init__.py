"""Tiny random checkpoints in the public file layouts, test pictures, and diffusers as the oracle.

| module | creates |
|---|---|
| `base` | complete diffusers pipeline folders (SD1.5, SD2.1, SDXL, inpainting, LCM-distilled) |
| `adapters` | image encoders and IP-Adapter files of every kind |
| `control` | ControlNets, T2I-Adapters, motion adapters, LoRA files |
| `embeddings` | textual inversion embeddings |
| `single_file` | bases, VAEs, and ControlNets as single files in the layout of Stability's own code |
| `images` | pictures, masks, control images, face embeddings |
| `oracle` | diffusers pipelines from these folders, and distances between pictures |

Widths are about a sixteenth of the real ones, so that their ratios are preserved. Everything is determined by a seed;
the global random state is neither used nor changed.
"""
