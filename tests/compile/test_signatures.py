"""Blocks that look at a signature, as diffusers' attention does, in several branches of a graph."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

import dit_cache_fx
from tests.compile.compiling import Counting, breaks, compiled, no_recompile
from tests.toys import STEPS_OF_SIX, TOY, ByHand, ToyDiT, follows, generation, make

pytestmark = pytest.mark.usefixtures("no_grad")


class Processor:
    """One for all blocks."""

    def __call__(self, linear: nn.Module, h: Tensor, scale: float = 2.0) -> Tensor:
        return torch.tanh(linear(h)) * scale


class InspectingBlock(nn.Module):
    """Gives its processor what the signature has."""

    def __init__(self, processor: Processor) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.processor = processor

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        known = set(inspect.signature(self.processor.__call__).parameters.keys())
        given = {"scale": 1.5} if "scale" in known else {}
        return h + self.processor(self.linear, h * (1 + c[:, None]), **given)


class InspectingDiT(ToyDiT):
    processor = Processor()

    def block(self) -> nn.Module:
        return InspectingBlock(self.processor)


@pytest.mark.parametrize("never", [None, 1])
def test_two_runs_of_blocks_are_in_one_graph(never: int | None) -> None:
    """The block in the middle always runs: those around it are in branches of their own."""
    model = make(InspectingDiT)
    ids = {} if never is None else {"blocks": {never}}
    cached = dit_cache_fx.apply(
        model, "deepcache", no_cache_steps=STEPS_OF_SIX, no_cache_block_id=ids
    )
    backend = Counting()
    by_hand = ByHand(model, ["blocks"], never=[] if never is None else [f"blocks.{never}"])
    with no_recompile():
        follows(compiled(cached, backend), by_hand, generation(TOY, STEPS_OF_SIX))
    assert (backend.count, breaks()) == (1, 0)
