"""Lowered forms of the toy of `tests.passes`, and one whose text is selected by a mask."""

from __future__ import annotations

import torch
from torch import nn

from dit_cache_fx.capture import CallSignature, Subject, capture, flatten_call
from dit_cache_fx.capture.normal_form import Guards
from dit_cache_fx.lowering import OneGraph, Variants, lower_one_graph, lower_variants
from dit_cache_fx.strategies import Strategy
from tests.passes.toy import Toy, inputs, passed

LAST = "dead_code"


class Masked(Toy):
    """Packs the text tokens with a positive first channel to the front, before the blocks."""

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        valid = text[0, :, 0] > 0
        packed = torch.cat([text[:, valid], text[:, ~valid]], dim=1)
        return super().forward(x, timestep, packed)


class MaskedBehind(Toy):
    """Also reads the packed text behind the blocks, and selects of their result."""

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        valid = text[0, :, 0] > 0
        packed = torch.cat([text[:, valid], text[:, ~valid]], dim=1)
        out = super().forward(x, timestep, packed)
        return out * packed.mean() + out[:, : len(valid)][:, valid].mean(dim=1, keepdim=True)


class ByIndex(Toy):
    """Reorders the text by numbers: no size depends on data."""

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        order = text[0, :, 0].argsort()
        return super().forward(x, timestep, text[:, order])


class EndsWithBlocks(Toy):
    """Returns the last block's own result, which is held as well."""

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        temb = self.time_embedder(timestep[:, None])[:, None]
        img, txt = self.x_embedder(x), self.text_embedder(text)
        for block in self.blocks:
            img, txt = block(img, txt, temb)
        return img


class Reads(Toy):
    """Asks, counts and lists what is in the text."""

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        first = text[0, :, 0]
        scale = 2.0 if (first > 0).any() else 1.0
        signs: list[float] = first.sign().tolist()
        positive = int((first > 0).sum().item())
        return scale * super().forward(x * sum(signs), timestep, text) + positive


def guards_of(strategy: Strategy, model: nn.Module) -> Guards | None:
    """What the capture of a toy has read."""
    torch.manual_seed(0)
    signature = CallSignature(model.eval().forward)
    call = flatten_call(signature.bind((), inputs()), "timestep")
    return capture(Subject(model, signature, None, strategy), call, "timestep").guards


def variants_of(strategy: Strategy, model: nn.Module | None = None) -> Variants:
    """The toy as one graph for each kind of step."""
    return lower_variants(passed(strategy, LAST, model))


def one_graph_of(
    strategy: Strategy, model: nn.Module | None = None, carry: bool = False
) -> OneGraph:
    """The toy as one graph."""
    program = passed(strategy, LAST, model)
    return lower_one_graph(program, lower_variants(program), strategy, carry)
