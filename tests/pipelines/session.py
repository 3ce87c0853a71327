"""A pipeline with a cached transformer, beside the same one whose blocks are reused by hand."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import dit_cache_fx
from tests.pipelines.blocks import blocks_of, counted, reused_by_hand
from tests.pipelines.family import STEPS, Family, run

COMPUTED = frozenset({0, 2, 3})  # of five: what was held is read right after a first step


class Session:
    """One pipeline, kept over several generations; its cached transformer is `cached`."""

    def __init__(
        self,
        family: Family,
        strategy: str = "deepcache",
        computed: Collection[int] = COMPUTED,
        pipe: DiffusionPipeline | None = None,
        **options: Any,
    ) -> None:
        self.family = family
        self.pipe = pipe or family.build()
        self.model = self.pipe.transformer
        self.computed = computed
        self.cached = dit_cache_fx.apply(self.model, strategy, no_cache_steps=computed, **options)

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return len(blocks_of(self.model, self.family.blocks))

    @contextmanager
    def uncached(self) -> Iterator[None]:
        """Within the context the pipeline has its own transformer."""
        self.pipe.transformer = self.model
        try:
            yield
        finally:
            self.pipe.transformer = self.cached

    def plain(self, **call: Any) -> Tensor:
        """What the pipeline gives without a cache."""
        with self.uncached():
            return run(self.family, self.pipe, **call)

    def by_hand(self, calls: Collection[int] | None = None, **call: Any) -> Tensor:
        """What it has to give with DeepCache; `calls`: those computed, where not as scheduled."""
        passes = self.passes(**call)
        if calls is None:
            calls = {passes * step + branch for step in self.computed for branch in range(passes)}
        with self.uncached(), reused_by_hand(self.model, self.family.blocks, calls, passes):
            return run(self.family, self.pipe, **call)

    def cache(self, **call: Any) -> Tensor:
        """What it gives with the cache."""
        self.pipe.transformer = self.cached
        return run(self.family, self.pipe, **call)

    def counts(self) -> Any:
        """A context in which the block calls are counted."""
        return counted(self.model, self.family.blocks)

    def passes(self, guided: bool = True, **call: Any) -> int:
        """Calls of the transformer in a step."""
        return self.family.passes if guided else 1

    def expected_calls(self, steps: int = STEPS, **call: Any) -> int:
        """The block calls that the schedule says."""
        computed = len([step for step in self.computed if step < steps])
        return computed * self.passes(**call) * self.depth

    def check(self, what: object, **call: Any) -> None:
        """A generation equals the one by hand, and runs its blocks as often as it should."""
        with self.counts() as count:
            got = self.cache(**call)
        assert torch.equal(got, self.by_hand(**call)), what
        assert count.calls == self.expected_calls(**call), what

    def check_nothing_stale(self, what: object, **call: Any) -> None:
        """The same, but the second step may be computed too: where what was held is in doubt."""
        with self.counts() as count:
            got = self.cache(**call)
        passes = self.passes(**call)
        newest = self.cached.cache_report().timeline[-STEPS * passes :]
        calls = {i for i, record in enumerate(newest) if record.action == "computed"}
        assert {i // passes for i in calls} - {1} == self.computed, what
        assert torch.equal(got, self.by_hand(calls, **call)), what
        assert count.calls == len(calls) * self.depth, what


@cache
def session_of(family: Family) -> Session:
    """One session for many tests: a user's cache has seen other generations too."""
    return Session(family)
