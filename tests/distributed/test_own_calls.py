"""Each process gets requests of its own: prompts and samples of other sizes than the others'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import dit_cache_fx
from tests.distributed.models import RULED, SCHEDULED, Dit
from tests.distributed.pair import Pair
from tests.distributed.test_engines import ENGINES

STEPS = 5


class Prompted(Dit):
    """A model whose prompts have any length. `reads`: how it looks at their mask."""

    def __init__(self, reads: str = "") -> None:
        super().__init__()
        self.text = torch.nn.Linear(4, 4)
        self._reads = reads

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        if self._reads == "value" and not mask.all():
            text = text * mask[..., None]
        if self._reads == "long prompts" and text.shape[1] > 3 and not mask.all():
            text = text * mask[..., None]
        if self._reads == "sizes":
            text = text[:, mask[0]]
        return super().forward(x + self.text(text).mean(1, keepdim=True), timestep)


class Asked(NamedTuple):
    """A request of one process: tokens, length of the prompt, how much of it counts by step."""

    tokens: int
    prompt: int
    counts: Sequence[int]

    def sample(self, step: int) -> Tensor:
        torch.manual_seed(self.tokens)
        first, last = torch.randn(1, self.tokens, 4), torch.randn(1, self.tokens, 4)
        return first + (last - first) * step / STEPS

    def call(self, step: int) -> dict[str, Tensor]:
        torch.manual_seed(self.prompt + dist.get_rank())
        counts = self.counts[min(step, len(self.counts) - 1)]
        return {
            "x": self.sample(step) + dist.get_rank(),
            "timestep": torch.tensor([1 - step / STEPS]),
            "text": torch.randn(1, self.prompt, 4),
            "mask": (torch.arange(self.prompt) < counts)[None],
        }


#: by request, what each process gets
Requests = Sequence[tuple[Asked, Asked]]

SHORT, LONG, WIDE = Asked(8, 3, [3]), Asked(8, 6, [6]), Asked(12, 3, [3])
#: at first alike, so that one of them alone meets something new later
LENGTHS = [(SHORT, SHORT), (SHORT, LONG), (LONG, LONG), (WIDE, SHORT), (SHORT, SHORT)]
#: in the second process alone the mask changes
MASKS = [(SHORT, LONG), (SHORT, LONG._replace(counts=[6, 6, 4])), (SHORT, LONG)]


def prompted(reads: str) -> Prompted:
    torch.manual_seed(1)
    return Prompted(reads).eval()


def asked(engine: str, strategy: str, options: dict[str, Any], reads: str, all_: Requests) -> Any:
    """Requests in turn; each computed step gives what the model gives. Returns the actions."""
    alone, model = prompted(reads), ENGINES[engine](prompted(reads))
    group = dist.group.WORLD if engine == "ddp" else None
    cached = dit_cache_fx.apply(model, strategy, **options, process_group=group)
    actions = []
    for request in all_:
        for step in range(STEPS):
            given = request[dist.get_rank()].call(step)
            got = cached(**given)
            record = cached.cache_report().timeline[-1]
            actions.append(f"{record.step} {record.action}")
            if record.action == "computed":
                assert torch.equal(got, alone(**given))
    return actions


@pytest.mark.parametrize(
    ("engine", "strategy", "options", "reads", "requests_"),
    [
        ("fsdp", "deepcache", SCHEDULED["deepcache"], "", LENGTHS),
        ("fsdp", "teacache", RULED["teacache"], "", LENGTHS),
        ("ddp", "taylorcache", RULED["taylorcache"], "", LENGTHS),
        ("fsdp", "deepcache", SCHEDULED["deepcache"], "value", MASKS),
        ("fsdp", "teacache", RULED["teacache"], "sizes", MASKS),
        ("fsdp", "deepcache", SCHEDULED["deepcache"], "long prompts", MASKS),
    ],
    ids=lambda v: str(v)[:12],
)
def test_all_do_the_same(
    pair: Pair,
    engine: str,
    strategy: str,
    options: dict[str, Any],
    reads: str,
    requests_: Requests,
) -> None:
    first, second = pair.run(asked, engine, strategy, options, reads, requests_, limit=60)
    assert first == second
    assert sum("computed" in action for action in first) < len(first)
    assert [a for a in first if a.startswith("0 ")] == ["0 computed"] * len(requests_)
