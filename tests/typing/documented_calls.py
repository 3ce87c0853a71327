"""The calls that the documentation shows, as a user's type checker sees them.

`make check` runs mypy over this file in strict mode; nothing of it is ever run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import dit_cache_fx
from dit_cache_fx import Clock, Strategy


def applied(model: nn.Module) -> dit_cache_fx.CachedModel:
    """A strategy by name or as an object, with its options."""
    dit_cache_fx.apply(model, "taylorcache", schedule="quality", num_steps=50)
    dit_cache_fx.apply(model, strategy="deepcache", no_cache_steps=range(0, 50, 2))
    dit_cache_fx.apply(model, dit_cache_fx.TaylorCache(computed_steps=10, corrector=0.5))
    return dit_cache_fx.apply(model, "teacache", rel_l1_thresh=0.2, blocks=["layers"], timestep="t")


def used(cached: dit_cache_fx.CachedModel, x: Tensor) -> None:
    """A cached model is a module with a life cycle."""
    module: nn.Module = cached
    module(x)
    session: dit_cache_fx.Session = cached.new_session()
    with session, cached.cache_context("cond"):
        cached(x)
    report: dit_cache_fx.CacheReport = cached.cache_report()
    steps: int = report.steps_computed
    records: Sequence[dit_cache_fx.StepRecord] = report.timeline
    actions: list[str] = [record.action for record in records[:steps]]
    explanation: dit_cache_fx.Explanation = cached.explain()
    print(report, explanation, actions)
    cached.num_steps = 50
    cached.cur_timestep = 3
    cached.compile_steps(fullgraph=True)
    cached.disable()
    cached.enable()
    cached.clear_states()
    cached.reset_states()


def compiled(model: nn.Module, x: Tensor) -> None:
    """As a backend of `torch.compile`, and exported."""
    cache: dit_cache_fx.Backend = dit_cache_fx.backend("deepcache", no_cache_steps={0, 2, 4})
    torch.compile(model, backend=cache)(x)
    print(cache.cache_report())
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0, 2, 4})
    exported: dit_cache_fx.Exported = dit_cache_fx.export(cached, (x,), {})
    runner: dit_cache_fx.Runner = exported.runner()
    runner(x)


@dataclass(frozen=True, kw_only=True)
class Doubled(Strategy):
    """A strategy of the user's own."""

    def slots(self) -> int:
        return 1

    def store(
        self, cached: Sequence[Tensor], value: Tensor, run_input: Tensor | None, clock: Clock
    ) -> list[Tensor]:
        return [value]

    def reuse(self, cached: Sequence[Tensor], run_input: Tensor | None, clock: Clock) -> Tensor:
        return cached[0] * (1 + clock.distance)
