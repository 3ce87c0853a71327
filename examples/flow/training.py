"""Flow matching: training a DiT on batches of pictures and labels."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from examples.flow.model import DiT

Batch = Callable[[int], tuple[Tensor, Tensor]]  # so many pictures [B, C, S, S] and labels [B]

CLASS_DROPOUT = 0.12
EMA_DECAY = 0.999


def flow_loss(model: DiT, pictures: Tensor, labels: Tensor) -> Tensor:
    """Squared error of the velocity on the line from pictures (t=0) to noise (t=1)."""
    noise = torch.randn_like(pictures)
    t = torch.rand(len(pictures), device=pictures.device)
    x = torch.lerp(pictures, noise, t[:, None, None, None])
    dropped = torch.rand(len(labels), device=labels.device) < CLASS_DROPOUT
    return F.mse_loss(model(x, t, labels.masked_fill(dropped, model.classes)), noise - pictures)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the current ones."""
    for slow, fast in zip(ema.parameters(), model.parameters(), strict=True):
        slow.lerp_(fast, 1 - decay)


def train(model: DiT, batch: Batch, size: int, steps: int, lr: float) -> DiT:
    """The averaged model after `steps` updates of `size` pictures."""
    ema = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps, pct_start=0.05, cycle_momentum=False
    )
    progress = tqdm(range(steps), desc="training", mininterval=5)
    smooth_loss = torch.ones((), device=next(model.parameters()).device)
    for step in progress:
        loss = flow_loss(model, *batch(size))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        update_ema(ema, model, min(EMA_DECAY, (1 + step) / (10 + step)))
        smooth_loss.lerp_(loss.detach(), 0.01)
        if step % 100 == 0:
            progress.set_postfix(loss=f"{smooth_loss.item():.4f}", refresh=False)
    return ema.eval()
