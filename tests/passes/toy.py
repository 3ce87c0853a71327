"""A small DiT for golden graphs, and the helpers that print them."""

from __future__ import annotations

import re

import torch
from torch import fx, nn

from dit_cache_fx.capture import (
    CallSignature,
    Subject,
    capture,
    flatten_call,
)
from dit_cache_fx.ir.program import Program
from dit_cache_fx.passes import PASSES
from dit_cache_fx.strategies import Strategy


class Block(nn.Module):
    """Returns (img, txt), as the double blocks of this field do."""

    def __init__(self) -> None:
        super().__init__()
        self.img = nn.Linear(8, 8)
        self.txt = nn.Linear(8, 8)

    def forward(
        self, img: torch.Tensor, txt: torch.Tensor, temb: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        joint = (self.img(img) + temb).mean(1, keepdim=True) + txt.mean(1, keepdim=True)
        return img + joint, txt + self.txt(joint)


class Toy(nn.Module):
    """Patch embedding, text embedding and positions before the blocks; a final layer after."""

    def __init__(self, num_blocks: int = 3) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(4, 8)
        self.text_embedder = nn.Linear(6, 8)
        self.time_embedder = nn.Linear(1, 8)
        self.positions = nn.Parameter(torch.randn(16, 8))
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.proj_out = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        temb = self.time_embedder(timestep[:, None])[:, None]
        img = self.x_embedder(x) + self.positions
        txt = self.text_embedder(text)
        for block in self.blocks:
            img, txt = block(img, txt, temb)
        joined = torch.cat([img, txt], dim=1)
        out: torch.Tensor = self.proj_out(joined[:, : x.shape[1]] + temb)
        return out


def inputs() -> dict[str, torch.Tensor]:
    """Arguments of `Toy.forward`."""
    generator = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(2, 16, 4, generator=generator),
        "timestep": torch.full((2,), 500.0),
        "text": torch.randn(2, 5, 6, generator=generator),
    }


def captured(strategy: Strategy, model: nn.Module | None = None) -> Program:
    """The program of a `Toy`, before any pass."""
    torch.manual_seed(0)
    model = (model or Toy()).eval()
    signature = CallSignature(model.forward)
    call = flatten_call(signature.bind((), inputs()), "timestep")
    subject = Subject(model, signature, None, strategy)
    return capture(subject, call, "timestep").program


def passed(strategy: Strategy, until: str, model: nn.Module | None = None) -> Program:
    """The program after all passes up to the one called `until`."""
    program = captured(strategy, model)
    for apply_pass in PASSES:
        apply_pass(program, strategy)
        if apply_pass.__name__ == until:
            break
    return program


def code(gm: fx.GraphModule) -> str:
    """The graph as Python, without the statements that free its variables."""
    text = re.sub(r";  [\w = ]+ = None", "", gm.code)
    return text.strip() + "\n"
