"""Selections by a mask, and the same ones by the places that it selects."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from dit_cache_fx._torch import trace_functional
from dit_cache_fx.ir.graph_module import attributes_of, graph_module
from dit_cache_fx.ir.nodes import descendants, spec_of
from dit_cache_fx.lowering.masks import depends_on_data, masks_apart

H = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[True, False, True, True], [False, False, False, True], [True] * 4])
COLUMN = torch.tensor([[1], [0]])

SELECTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one dimension": lambda h, mask: h[:, mask[:, 0]],
    "two dimensions": lambda h, mask: h[:, mask],
    "the last dimensions": lambda h, mask: h.permute(0, 3, 1, 2)[..., mask],
    "bytes": lambda h, mask: torch.ops.aten.index.Tensor(h, [None, mask.byte()]),
    "beside a number": lambda h, mask: h[:, mask[:, 0], torch.tensor([1])],
    "beside places": lambda h, mask: h[:, mask[:, 0], torch.tensor([1, 3])],
    "beside a column": lambda h, mask: h[:, mask[:, 0], COLUMN.clone()],
    "behind a column": lambda h, mask: h[COLUMN.clone(), mask[:, 0]],
    "apart from a column": lambda h, mask: h.transpose(1, 2)[COLUMN.clone(), :, mask[:, 0]],
    "masked_select": lambda h, mask: torch.masked_select(h, mask[..., None]),
    "masked_select of less": lambda h, mask: torch.masked_select(h[:1], mask[..., None]),
}


def traced(selection: Callable[[Tensor, Tensor], Tensor]) -> fx.GraphModule:
    gm = trace_functional(lambda *given: [selection(*given)], [H, MASK])
    return graph_module(nn.Module(), attributes_of(gm, gm.graph), gm.graph, "Selection")


def behind(gm: fx.GraphModule) -> set[fx.Node]:
    return descendants(gm.graph.find_nodes(op="placeholder")[:1])


@pytest.mark.parametrize("name", [*SELECTIONS])
def test_the_places_select_the_same(name: str) -> None:
    gm = traced(SELECTIONS[name])
    apart = masks_apart(gm, behind(gm))
    assert any(map(depends_on_data, behind(gm)))
    assert not any(map(depends_on_data, behind(apart)))
    for mask in (MASK, MASK.roll(1, dims=0)):
        assert torch.equal(apart(H, mask)[0], gm(H, mask)[0])


@pytest.mark.parametrize("name", [*SELECTIONS])
def test_sizes_are_those_of_the_capture(name: str) -> None:
    gm = traced(SELECTIONS[name])
    apart = masks_apart(gm, behind(gm))
    seen: dict[str, torch.Size] = {}

    class Noted(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                seen[n.name] = result.shape
            return result

    Noted(apart).run(H, MASK)
    specs = {n.name: spec.shape for n in apart.graph.nodes if (spec := spec_of(n)) is not None}
    assert {name: seen[name] for name in specs} == specs
    assert any("nonzero" in name for name in specs)


def test_a_mask_that_depends_on_a_block_stays() -> None:
    gm = traced(lambda h, _: h[h > 0])
    assert masks_apart(gm, behind(gm)) is gm


def test_selections_before_the_blocks_stay() -> None:
    gm = traced(lambda h, mask: h[:, mask])
    assert masks_apart(gm, set()) is gm


def test_a_mask_that_selects_of_itself() -> None:
    gm = traced(lambda _, mask: mask[mask])
    assert any(map(depends_on_data, gm.graph.nodes))


def test_indices_select_a_known_size() -> None:
    gm = traced(lambda h, _: h[:, torch.tensor([0, 2])])
    assert not any(map(depends_on_data, gm.graph.nodes))
