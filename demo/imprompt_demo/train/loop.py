"""The training loop of all stages: AdamW, warm-up and cosine decay, averaged weights, resumable.

Processes started by torchrun share the work: each draws its own batch, and gradients are averaged at every step.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Hyperparameters of one stage.

    `batch` is per process, `rate` is the learning rate, and `average` is the decay of the exponential moving average of
    the weights.
    """

    steps: int
    batch: int
    rate: float
    average: float = 0.998
    weight_decay: float = 0.01
    warmup: int = 50
    save_every: int = 200


def fit(
    name: str, folder: Path, model: nn.Module, plan: Plan, loss: Callable[[int, torch.Generator], Tensor], seed: int = 0
) -> nn.Module:
    """Minimize `loss(step, generator)` over the parameters of `model` that require gradients.

    Checkpoints are saved to `folder/<name>.pt`, from which a second call resumes, and losses to `folder/<name>.jsonl`.
    Returns the model in evaluation mode with the averaged weights.
    """
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    mean = {key: value.detach().clone() for key, value in trained.items()}
    optimizer = torch.optim.AdamW(
        trained.values(), lr=plan.rate, betas=(0.9, 0.99), weight_decay=plan.weight_decay, fused=True
    )
    file, step, seconds = folder / f"{name}.pt", 0, 0.0
    if file.exists():
        state = torch.load(file, weights_only=True)
        step, seconds, mean = state["step"], state["seconds"], state["mean"]
        model.load_state_dict(state["trained"], strict=False)
        if "optimizer" in state and step < plan.steps:
            optimizer.load_state_dict(state["optimizer"])
            optimizer.param_groups[0]["fused"] = True
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model.train()
    losses: list[float] = []
    started = time.monotonic() - seconds
    while step < plan.steps:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step * ranks + rank)
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * _schedule(step, plan)
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(step, generator)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        if ranks > 1:
            _average([parameter.grad for parameter in trained.values() if parameter.grad is not None], ranks)
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        step += 1
        decay = min(plan.average, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(mean.values()), list(trained.values()), 1 - decay)
        losses.append(value.item())
        if rank == 0 and (step % 50 == 0 or step == plan.steps):
            seconds = time.monotonic() - started
            line = {"step": step, "of": plan.steps, "loss": sum(losses) / len(losses), "seconds": round(seconds, 1)}
            losses = []
            with (folder / f"{name}.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(name, line, flush=True)
        if rank == 0 and (step % plan.save_every == 0 or step == plan.steps):
            state = {"step": step, "seconds": seconds, "mean": mean}
            state |= {"trained": {key: value.detach() for key, value in trained.items()}}
            state |= {"optimizer": optimizer.state_dict()}
            torch.save(state, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
    model.load_state_dict(mean, strict=False)
    return model.eval()


def _average(gradients: list[Tensor], ranks: int) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    parts = (flat / ranks).split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def load_mean(name: str, folder: Path, model: Model) -> Model:
    """Load the averaged weights of a stage into `model`, even if that stage is still training."""
    state = torch.load(folder / f"{name}.pt", weights_only=True)
    model.load_state_dict(state["mean"], strict=False)
    return model.eval()


def _schedule(step: int, plan: Plan) -> float:
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    done = (step - plan.warmup) / max(1, plan.steps - plan.warmup)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
