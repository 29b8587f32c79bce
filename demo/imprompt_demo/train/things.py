"""The classifier of things, used only to evaluate pictures."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..metrics import thing_network
from ..world import THINGS
from .data import Pictures
from .loop import Plan, fit

PLAN = Plan(steps=1500, batch=64, rate=2e-3, average=0.99)


def train(folder: Path, data: Pictures, plan: Plan = PLAN) -> nn.Sequential:
    """Train on pictures with altered colors, translation, blur and noise, so that only the shape matters."""
    torch.manual_seed(9)
    model = thing_network()
    labels = torch.tensor([list(THINGS).index(layout.thing) for layout in data.layouts])

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(labels), (plan.batch,), generator=generator)
        pictures = data.batch(rows)[:, torch.randperm(3, generator=generator)]
        shift = torch.randint(-4, 5, (2,), generator=generator).tolist()
        pictures = F.pad(pictures, (4,) * 4, mode="replicate")[:, :, 4 + shift[0] :, 4 + shift[1] :][:, :, :64, :64]
        if step % 2:
            pictures = F.avg_pool2d(pictures, 3, stride=1, padding=1, count_include_pad=False)
        tint = 0.4 * torch.randn(plan.batch, 3, 1, 1, generator=generator)
        pictures = pictures + tint + 0.15 * torch.randn(pictures.shape, generator=generator)
        return F.cross_entropy(model(pictures).float(), labels[rows])

    fit("things", folder, model, plan, loss, seed=9)
    return model
