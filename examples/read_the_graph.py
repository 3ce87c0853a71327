"""What the passes do to a small Diffusion Transformer: its graph before and after.

Run: python examples/read_the_graph.py [deepcache | teacache | taylorcache]
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

from dit_cache_fx.capture import CallSignature, Subject, capture, flatten_call
from dit_cache_fx.ir.graph_text import lines
from dit_cache_fx.ir.program import Program
from dit_cache_fx.passes import run_passes
from dit_cache_fx.strategies import make_strategy

DIM = 32


class Block(nn.Module):
    """Mixes image and text tokens; both streams go on to the next block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(DIM, elementwise_affine=False)
        self.attention = nn.MultiheadAttention(DIM, num_heads=2, batch_first=True)
        self.scale = nn.Linear(DIM, DIM)

    def forward(self, img: Tensor, txt: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([img, txt], dim=1)
        x = self.norm(both) * (1 + self.scale(time)[:, None])
        both = both + self.attention(x, x, x, need_weights=False)[0]
        return both[:, : img.shape[1]], both[:, img.shape[1] :]


class SmallDiT(nn.Module):
    """Image tokens [B, N, 4] and text tokens [B, M, 8] -> image tokens [B, N, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.img_in = nn.Linear(4, DIM)
        self.txt_in = nn.Linear(8, DIM)
        self.time_in = nn.Linear(1, DIM)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.out = nn.Linear(DIM, 4)

    def forward(self, img: Tensor, txt: Tensor, timestep: Tensor) -> Tensor:
        time = self.time_in(timestep[:, None])
        x, y = self.img_in(img), self.txt_in(txt)
        for block in self.blocks:
            x, y = block(x, y, time)
        out: Tensor = self.out(x + time[:, None])
        return out


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "deepcache"
    strategy = make_strategy(name, {"no_cache_steps": range(0, 50, 5)})
    torch.manual_seed(0)
    model = SmallDiT().eval()
    inputs = (torch.randn(1, 16, 4), torch.randn(1, 6, 8), torch.tensor([0.9]))

    # what the first call of `dit_cache_fx.apply(model, strategy)` does
    subject = Subject(model, CallSignature(model.forward), None, strategy)
    call = flatten_call(subject.signature.bind(inputs, {}), "timestep")
    program = capture(subject, call, "timestep").program
    print(*lines(program.gm, "captured"), "", sep="\n")

    def observe(name: str, program: Program) -> None:
        print(f"pass {name:15} leaves {len(program.graph.nodes)} nodes")

    run_passes(program, strategy, observe)
    print("", *lines(program.gm, "cached"), sep="\n")


if __name__ == "__main__":
    main()
