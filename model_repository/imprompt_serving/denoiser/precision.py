"""The types of tensors that engines pass to each other inside the denoiser."""

from __future__ import annotations

import torch

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.float32,
    "fp8": torch.float16,
}
"""The type that the networks of a step compute in (except quantized layers), by the precision of the bundle."""
