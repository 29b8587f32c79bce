"""Train stages in order, resuming from checkpoints: `python -m imprompt_demo.train --out DIR [--stage vae,clip,...]`.

With `torchrun --nproc-per-node 2 -m imprompt_demo.train ... --threads 1`, two processes share each stage.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist

from .family import Family
from .start import start

STAGES = ("vae", "clip", "unet", "plain", "plus", "controlnet", "lcm", "motion", "things", "publish")


def main() -> None:
    """Parse the command line and run the stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and weights")
    parser.add_argument("--start", type=Path, help="bundle whose weights the stages train further, instead of new ones")
    parser.add_argument("--stage", default=",".join(STAGES), help="stages to train in this order, separated by commas")
    parser.add_argument("--steps", type=int, help="number of steps, overriding the stage's plan")
    parser.add_argument("--threads", type=int, default=2, help="torch threads per process")
    args = parser.parse_args()
    stages = args.stage.split(",")
    if args.start and {"vae", "clip"} & set(stages):
        parser.error("argument --start: a bundle does not hold all that the stages vae and clip train; name others")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    if args.start:
        start(args.start, args.out)
    family = Family(args.out)
    for stage in stages:
        family.train(stage, args.steps)


if __name__ == "__main__":
    main()
