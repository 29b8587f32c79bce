"""The two CLIP towers: train them contrastively on pictures and their full descriptions."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from .data import Pictures
from .loop import Plan, fit
from .words import LENGTH, full_caption, save_tokenizer

PLAN = Plan(steps=340, batch=128, rate=1e-3, weight_decay=0.05, average=0.99)
WIDTH = 128


class Towers(nn.Module):
    """Text and vision towers with a shared embedding space."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        shape = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": 4}
        self.tokenizer = tokenizer
        self.text = CLIPTextModelWithProjection(
            CLIPTextConfig(
                **shape,
                num_hidden_layers=3,
                projection_dim=WIDTH,
                vocab_size=len(tokenizer),
                max_position_embeddings=LENGTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        self.vision = CLIPVisionModelWithProjection(
            CLIPVisionConfig(**shape, num_hidden_layers=4, projection_dim=WIDTH, image_size=64, patch_size=8)
        )
        self.log_scale = nn.Parameter(torch.tensor(2.5))

    def tokens(self, captions: list[str]) -> Tensor:
        """Tokenize captions to ids [B, 32]."""
        return self.tokenizer(
            captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
        ).input_ids

    def text_embeds(self, captions: list[str]) -> Tensor:
        """Embed captions as unit vectors [B, 128]."""
        return F.normalize(self.text(self.tokens(captions)).text_embeds.float(), dim=-1)


def build(folder: Path) -> Towers:
    """Build the untrained towers, and write the tokenizer's files to `folder/tokenizer`."""
    torch.manual_seed(2)
    return Towers(save_tokenizer(folder / "tokenizer"))


def train(folder: Path, data: Pictures, plan: Plan = PLAN) -> Towers:
    """Train with CLIP's symmetric contrastive objective (https://arxiv.org/abs/2103.00020)."""
    model = build(folder)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(data.looks), (plan.batch,), generator=generator)
        rng = random.Random(generator.initial_seed())
        captions = [full_caption(data.looks[i], data.layouts[i], rng) for i in rows.tolist()]
        pictures = F.normalize(model.vision(data.batch(rows)).image_embeds.float(), dim=-1)
        logits = model.log_scale.exp().clamp(max=60) * pictures @ model.text_embeds(captions).T
        target = torch.arange(plan.batch)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    fit("clip", folder, model, plan, loss, seed=2)
    return model


@torch.no_grad()
def image_features(model: Towers, data: Pictures) -> tuple[Tensor, Tensor]:
    """Compute projected embeddings [N, 128] and penultimate hidden states [N, 65, 128] of all pictures, in float16."""
    embeds, hidden = [], []
    for rows in torch.arange(len(data.looks)).split(500):
        out = model.vision(data.batch(rows), output_hidden_states=True)
        embeds.append(out.image_embeds.half())
        hidden.append(out.hidden_states[-2].half())
    return torch.cat(embeds), torch.cat(hidden)
