"""Requests that are answered in batches, beside the same requests alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import dit_cache_fx
from tests.toys import TOY
from tests.zoo.case import Case, flat

#: what another batch size may change, as a share of the largest value
TOLERANCE = 1e-5


def joined(each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The arguments of one call with the rows of several: tensors whose first dimension is 1."""

    def one(values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, Tensor) and first.ndim and first.shape[0] == 1:
            return torch.cat(values)
        return [item for value in values for item in value] if type(first) is list else first

    return {name: one([inputs[name] for inputs in each]) for name in each[0]}


class Serving:
    """Requests of one model; each has a session in `cached`, and one in `alone`.

    `smooth`: the sample of a request moves a little in each step; else it is drawn anew.
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: Any,
        *,
        requests: int = 4,
        case: Case = TOY,
        steps: int = 6,
        options: dict[str, Any] | None = None,
        ready: Callable[[Any], Any] = lambda cached: cached,
        smooth: bool = False,
    ) -> None:
        self.case, self.steps, self.smooth = case, steps, smooth
        self.cached, self.alone = (
            dit_cache_fx.apply(model, strategy, **(options or {})) for _ in range(2)
        )
        self.called = ready(self.cached)
        self.sessions = [self.cached.new_session() for _ in range(requests)]
        self.own = [self.alone.new_session() for _ in range(requests)]
        self.at = [0] * requests

    def inputs(self, request: int, prompt: int = 0) -> dict[str, Any]:
        """The arguments of a request's next step."""
        at = self.at[request]
        timestep = self.case.timesteps(self.steps)[at % self.steps]
        seed, prompt = 100 * request + (0 if self.smooth else at), 10 * prompt + request
        inputs = self.case.inputs(timestep, seed=seed, prompt=prompt)
        return inputs | ({"x": inputs["x"] * (1 - 0.05 * at)} if self.smooth else {})

    def tick(self, *requests: int, context: str | None = None, **batch: Any) -> None:
        """One step of these requests in one call, each compared with what it gives alone."""
        prompt = 1 if context == "uncond" else 0
        each = [self.inputs(request, prompt) for request in requests]
        with (
            self.cached.batch([self.sessions[r] for r in requests], **batch),
            self.within(self.cached, context),
        ):
            got = self.called(**joined(each))
        for row, (request, inputs) in enumerate(zip(requests, each, strict=True)):
            with self.own[request], self.within(self.alone, context):
                want = flat(self.alone(**inputs))
            assert near(row_of(got, row), want), (requests, row, self.at[request])

    def within(self, cached: Any, context: str | None) -> Any:
        return nullcontext() if context is None else cached.cache_context(context)

    def step(self, *requests: int, **options: Any) -> None:
        """A tick, and these requests go on."""
        self.tick(*requests, **options)
        for request in requests:
            self.at[request] += 1

    def staggered(self, ticks: int) -> None:
        """Each request begins a step later than the one before it; ended ones are left out."""
        for tick in range(ticks):
            live = [r for r in range(len(self.at)) if 0 <= tick - r < self.steps]
            if live:
                self.step(*live)

    def actions(self, request: int) -> list[str]:
        """What was done on each step of a request's generation."""
        with self.sessions[request]:
            return [record.action for record in self.cached.cache_report().timeline]

    def same_counts(self) -> tuple[int, int]:
        """Calls computed and reused, which are the same alone."""
        batched, alone = (c.cache_report() for c in (self.cached, self.alone))
        counts = batched.calls_computed, batched.calls_reused
        assert counts == (alone.calls_computed, alone.calls_reused)
        return counts


def row_of(output: Any, row: int) -> Tensor:
    """A row of a model's output as one vector."""
    tensors = [t[row : row + 1] for t in leaves(output)]
    return torch.cat([t.flatten() for t in tensors])


def leaves(output: Any) -> Iterator[Tensor]:
    for leaf in torch.utils._pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf


def near(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs().max() <= TOLERANCE * want.abs().max())
