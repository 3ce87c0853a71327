"""Train the digits model by flow matching and write the checkpoint.

Run from the repository root: python -m examples.digits.train
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from examples.digits.checkpoint import CHECKPOINT, load, untrained
from examples.digits.classifier import DigitClassifier
from examples.digits.data import digits
from examples.flow import checkpoint
from examples.flow.model import DiT
from examples.flow.sampling import euler, guided, start, times
from examples.flow.training import train


@torch.no_grad()
def sample_accuracy(model: DiT, samples: int = 500, seed: int = 1) -> float:
    """Share of guided 50-step samples that the classifier recognises."""
    noise, labels = start(model, samples, seed)
    return DigitClassifier().accuracy(euler(guided(model, labels), noise, times(50)), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    pictures, labels = digits()

    def batch(size: int) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(pictures), (size,))
        return pictures[chosen], labels[chosen]

    model = train(untrained(), batch, options.batch, options.steps, options.lr)
    checkpoint.save(model, options.out)
    print(f"{options.out.name}: {options.out.stat().st_size / 2**20:.1f} MiB")
    print(f"guided samples classified right: {sample_accuracy(load(options.out)):.1%}")


if __name__ == "__main__":
    main()
