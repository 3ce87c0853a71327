"""Train the shapes model by flow matching and write the checkpoint.

Run from the repository root: python -m examples.shapes.train
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from examples.flow import checkpoint
from examples.flow.training import train
from examples.shapes.checkpoint import CHECKPOINT, untrained
from examples.shapes.data import NAMES, shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(len(NAMES), (size,), device=options.device)
        return shapes(labels), labels

    model = untrained().to(options.device)
    trained = train(model, batch, options.batch, options.steps, options.lr)
    checkpoint.save(trained, options.out)
    print(f"{options.out.name}: {options.out.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
