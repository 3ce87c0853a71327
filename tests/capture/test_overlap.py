"""Blocks that change memory in place which the model reads again through another view."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dit_cache_fx
from dit_cache_fx import CaptureError
from tests.toys import Block, ToyDiT, make, toy_inputs


class _Damps(Block):
    """Changes its conditioning in place."""

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        h = super().forward(h, c)
        c.mul_(0.5)
        return h


class _Grows(Block):
    """Changes its stream in place, and returns it."""

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return h.add_(super().forward(h, c))


#: what the model's own code does around its blocks
Trunk = Callable[[Any, Tensor, Tensor], Tensor]


class _Model(ToyDiT):
    def __init__(self, block: type[Block], trunk: Trunk) -> None:
        self._block = block
        super().__init__()
        self._trunk = trunk

    def block(self) -> Block:
        return self._block()

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        return self._trunk(self, h, c)


def _new_view_each(model: Any, h: Tensor, c: Tensor) -> Tensor:
    for block in model.blocks:
        h = block(h, c[:])
    return h


def _reshaped(model: Any, h: Tensor, c: Tensor) -> Tensor:
    for block in model.blocks:
        h = block(h, c[None].flatten(0, 1))
    return h


def _rows_of_its_result(model: Any, h: Tensor, c: Tensor) -> Tensor:
    rows = h[:, 1:3]
    for block in model.blocks:
        h = block(h, c)
    return h + rows.mean(dim=1, keepdim=True)


def _tokens(model: Any, h: Tensor, c: Tensor) -> Tensor:
    image, text = h.split([4, h.shape[1] - 4], dim=1)
    for block in model.blocks:
        image = block(image, c)
    return torch.cat([image, text], dim=1)


def _every_other(model: Any, h: Tensor, c: Tensor) -> Tensor:
    image, text = h[:, ::2], h[:, 1::2]
    for block in model.blocks:
        image = block(image, c)
    return torch.cat([image, text], dim=1)


def _doubled(model: Any, h: Tensor, c: Tensor) -> Tensor:
    once, again = h[:, :4].chunk(2, dim=1)[0], h[:, 1:3]
    for block in model.blocks:
        once = block(once, c)
    return torch.cat([once, again], dim=1)


@pytest.mark.parametrize(
    ("block", "trunk"),
    [
        (_Damps, _new_view_each),
        (_Damps, _reshaped),
        (_Grows, _rows_of_its_result),
        (_Grows, _doubled),
    ],
    ids=["a view for each block", "a reshaped one", "some rows read behind", "one row in common"],
)
def test_memory_that_is_read_after_a_block_changed_it_is_refused(
    block: type[Block], trunk: Trunk
) -> None:
    cached = dit_cache_fx.apply(
        make(_Model, block=block, trunk=trunk), "deepcache", no_cache_steps={0}
    )
    with (
        torch.no_grad(),
        pytest.raises(CaptureError, match=r"'blocks.0' changes one of its inputs"),
    ):
        cached(**toy_inputs(900.0))


@pytest.mark.parametrize("trunk", [_tokens, _every_other], ids=["rows apart", "rows in turn"])
def test_memory_beside_it_may_be_read(trunk: Trunk) -> None:
    model = make(_Model, block=_Grows, trunk=trunk)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=range(4))
    with torch.no_grad():
        for step in range(4):
            given = toy_inputs(900.0 - 100 * step, seed=step)
            assert torch.equal(cached(**given), model(**given))
