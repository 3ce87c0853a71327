"""The graphs of each kind of step, beyond their text."""

from __future__ import annotations

from collections import Counter

import torch

from dit_cache_fx import DeepCache
from dit_cache_fx.lowering import Part
from tests.lowering.toy import variants_of
from tests.passes.toy import Toy


class _TextAtBothEnds(Toy):
    """The first block and the last one read the text, the one between does not."""

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        temb = self.time_embedder(timestep[:, None])[:, None]
        img, txt = self.x_embedder(x), self.text_embedder(text)
        img, _ = self.blocks[0](img, txt, temb)
        img, _ = self.blocks[1](img, img, temb)
        img, _ = self.blocks[2](img, txt, temb)
        return self.proj_out(img)


def layers(part: Part) -> Counter[str]:
    """How often each module is called."""
    calls = part.gm.graph.find_nodes(op="call_module")
    return Counter(str(call.target).removeprefix("model.") for call in calls)


def test_what_two_runs_need_is_computed_once() -> None:
    strategy = DeepCache(no_cache_steps=[0], no_cache_block_id={"blocks": {1}})
    variants = variants_of(strategy, _TextAtBothEnds())
    names = ["x_embedder", "text_embedder", "time_embedder", "proj_out"]
    names += [f"blocks.{i}" for i in range(3)]
    assert layers(variants.compute) == Counter(names)
    assert layers(variants.reuse) == Counter(["time_embedder", "blocks.1", "proj_out"])
