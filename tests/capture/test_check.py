"""What a capture is checked with: two runs of a model whose blocks are stood in for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dit_cache_fx.capture.check import compare
from dit_cache_fx.capture.record import record
from tests.toys import ToyDiT, make, toy_inputs


def test_results_of_two_blocks_are_told_apart() -> None:
    """A run that takes the result of another block gives something else."""
    model = make(ToyDiT)
    blocks = {block: f"blocks.{i}" for i, block in enumerate(model.blocks)}
    inputs = toy_inputs(500.0)

    def taking(place: int) -> Callable[[], Tensor]:
        def run() -> Tensor:
            c, results = model.condition(inputs["timestep"], inputs["text"]), [inputs["x"]]
            for block in model.blocks:
                results.append(block(results[-1], c))
            return results[place]

        return run

    with torch.no_grad():
        recording = record(taking(-1), blocks, set(blocks))
        assert compare(taking(2), taking(2), blocks, recording) is None
        difference = compare(taking(2), taking(3), blocks, recording)
    assert difference is not None
    assert difference.startswith("output, tensor 0: ")
