"""`enable_parallelism` of diffusers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_cache_fx
from tests.distributed.models import RULED, SCHEDULED, Run, apart, generate
from tests.distributed.pair import Pair

CONTEXT: dict[str, dict[str, int]] = {"ulysses": {"ulysses_degree": 2}, "ring": {"ring_degree": 2}}


def as_one(
    family: str, config: dict[str, int], strategy: str, options: dict[str, Any], after: bool = False
) -> Run:
    """A generation on the two processes, compared with one on a process alone."""
    from diffusers import ContextParallelConfig

    from tests.distributed.diffusers_models import calls, made

    one = generate(dit_cache_fx.apply(made(family), strategy, **options), calls(family))
    model: Any = made(family)
    if after:
        two = dit_cache_fx.apply(model, strategy, **options)
    with one_accelerator():
        model.enable_parallelism(config=ContextParallelConfig(**config))
    if not after:
        two = dit_cache_fx.apply(model, strategy, **options)
    run = generate(two, calls(family))
    assert run.actions == one.actions, (run.actions, one.actions)
    assert apart(run.outputs, one.outputs) < 1e-5, (apart(run.outputs, one.outputs), run.actions)
    return run._replace(bytes_held=run.bytes_held / one.bytes_held)


class one_accelerator:
    """diffusers asks how many accelerators there are; gloo on the CPU has none."""

    def __enter__(self) -> None:
        self._before = torch.accelerator.device_count
        torch.accelerator.device_count = lambda: 1

    def __exit__(self, *error: object) -> None:
        torch.accelerator.device_count = self._before


CASES = [*SCHEDULED.items(), *RULED.items()]


@pytest.mark.parametrize(("strategy", "options"), CASES, ids=lambda v: str(v)[:20])
@pytest.mark.parametrize("family", ["flux", "wan", "qwen", "ltx"])
def test_as_one(pair: Pair, family: str, strategy: str, options: dict[str, Any]) -> None:
    first, second = pair.run(as_one, family, CONTEXT["ulysses"], strategy, options)
    assert first.actions == second.actions
