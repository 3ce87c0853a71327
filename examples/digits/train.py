"""Train the digits model by flow matching and write the checkpoint.

Run from the repository root: python -m examples.digits.train
"""

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from examples.digits import checkpoint
from examples.digits.classifier import DigitClassifier
from examples.digits.data import digits
from examples.digits.model import NULL_CLASS, DigitsDiT
from examples.digits.sampling import euler, guided, start

CLASS_DROPOUT = 0.12
EMA_DECAY = 0.999


def flow_loss(model: nn.Module, pictures: Tensor, labels: Tensor) -> Tensor:
    """Squared error of the velocity on the line from pictures [B, 1, 8, 8] (t=0) to noise (t=1)."""
    noise = torch.randn_like(pictures)
    t = torch.rand(len(pictures))
    x = torch.lerp(pictures, noise, t[:, None, None, None])
    dropped = torch.rand(len(labels)) < CLASS_DROPOUT
    return F.mse_loss(model(x, t, labels.masked_fill(dropped, NULL_CLASS)), noise - pictures)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the current ones."""
    for slow, fast in zip(ema.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def train(steps: int, batch: int, lr: float, seed: int) -> nn.Module:
    """The averaged model after `steps` updates."""
    torch.manual_seed(seed)
    pictures, labels = digits()
    model = DigitsDiT()
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    smooth_loss = 1.0
    progress = tqdm(range(steps), desc="training", mininterval=5)
    for step in progress:
        chosen = torch.randint(len(pictures), (batch,))
        loss = flow_loss(model, pictures[chosen], labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        update_ema(ema, model, min(EMA_DECAY, (1 + step) / (10 + step)))
        smooth_loss += 0.01 * (loss.item() - smooth_loss)
        progress.set_postfix(loss=f"{smooth_loss:.4f}", refresh=False)
    return ema.eval()


@torch.no_grad()
def sample_accuracy(model: nn.Module, samples: int = 500, seed: int = 1) -> float:
    """Share of guided 50-step samples that the classifier recognises."""
    noise, labels = start(samples, seed)
    return DigitClassifier().accuracy(euler(guided(model, labels), noise, 50), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=checkpoint.CHECKPOINT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = train(options.steps, options.batch, options.lr, options.seed)
    checkpoint.save(model.state_dict(), options.out)
    accuracy = sample_accuracy(checkpoint.load(options.out))
    print(f"{options.out.name}: {options.out.stat().st_size / 2**20:.1f} MiB")
    print(f"guided samples classified right: {accuracy:.1%}")


if __name__ == "__main__":
    main()
