"""What the residual of a run is set against, in a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import dit_cache_fx
from tests.toys import STEPS_OF_SIX, TEXT, TOY, ToyDiT, actions, generation, make


class _TextInFront(ToyDiT):
    """The last block runs on text and picture, and the answer is for the rows of both."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        return self.head(self.joined(self.embed(x), timestep, text))

    def joined(self, h: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        c = self.time(timestep)
        return self.blocks[1](torch.cat([self.text_in(text), self.blocks[0](h, c)], dim=1), c)


@torch.no_grad()
def test_a_residual_of_joined_rows_has_the_stream_in_its_own_rows() -> None:
    model = make(_TextInFront, depth=2)
    cached = dit_cache_fx.apply(model, "teacache", no_cache_steps=STEPS_OF_SIX)
    for computes, inputs in generation(TOY, STEPS_OF_SIX):
        h = model.embed(inputs["x"])
        start = pad(h, (0, 0, TEXT, 0))
        if computes:
            residual = model.joined(h, inputs["timestep"], inputs["text"]) - start
            want = model(**inputs)
        else:
            want = model.head(start + residual)
        assert torch.equal(cached(**inputs), want)
    assert actions(cached) == "CrCCrr"
