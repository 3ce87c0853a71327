"""Real pipelines that share one cached transformer, their calls in turn, in bfloat16.

Each runs in a thread of its own, and a lock hands over after each step. Each must give, bit by bit,
what it gives alone.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

import dit_cache_fx
from tests.pipelines.families import FLUX, QWEN_IMAGE, SD3, WAN
from tests.pipelines.family import Family, run

COMPUTED = {0, 2, 3}


class Turns:
    """Lets threads run one after the other, step by step."""

    def __init__(self, number: int) -> None:
        self._waiting = [threading.Semaphore(0) for _ in range(number)]
        self._left = [True] * number
        self._waiting[0].release()

    def begin(self, number: int) -> None:
        self._waiting[number].acquire()

    def hand_over(self, number: int) -> None:
        """Let the next one run, and wait for the turn to come back."""
        self._next(number)
        self._waiting[number].acquire()

    def end(self, number: int) -> None:
        self._left[number] = False
        self._next(number)

    def _next(self, number: int) -> None:
        order = [(number + 1 + i) % len(self._left) for i in range(len(self._left))]
        following = next((i for i in order if self._left[i]), None)
        if following is not None:
            self._waiting[following].release()


def pipes(family: Family, number: int) -> list[DiffusionPipeline]:
    """Pipelines with one bfloat16 transformer between them."""
    made = [family.build() for _ in range(number)]
    model = made[0].transformer.to(torch.bfloat16)
    for pipe in made:
        pipe.to(torch.bfloat16)
        pipe.transformer = model
    return made


def arguments(family: Family, prompt: int) -> dict[str, Any]:
    given = family.arguments(prompt=prompt)
    return {
        name: value.to(torch.bfloat16) if isinstance(value, Tensor) else value
        for name, value in given.items()
    }


def alone(family: Family, model: nn.Module, prompt: int) -> Tensor:
    (pipe,) = pipes(family, 1)
    pipe.transformer = dit_cache_fx.apply(model, "taylorcache", no_cache_steps=COMPUTED)
    return run(family, pipe, seed=prompt, **arguments(family, prompt))


@pytest.mark.parametrize(
    ("family", "sessions"),
    [
        pytest.param(
            f, s, marks=() if s or f is FLUX else pytest.mark.exhaustive, id=f"{f.name}-{w}"
        )
        for f in (FLUX, SD3, WAN, QWEN_IMAGE)
        for s, w in ((True, "sessions"), (False, "threads' own"))
    ],
)
def test_two_prompts_in_turn_in_bfloat16(family: Family, sessions: bool) -> None:
    two = pipes(family, 2)
    model = two[0].transformer
    want = [alone(family, model, prompt) for prompt in range(2)]
    cached = dit_cache_fx.apply(model, "taylorcache", no_cache_steps=COMPUTED)
    turns, got = Turns(2), dict[int, Tensor]()

    def request(number: int) -> None:
        pipe = two[number]
        pipe.transformer = cached

        def step_ended(_: Any, step: int, timestep: Tensor, given: Any) -> dict[str, Any]:
            turns.hand_over(number)
            return {}

        turns.begin(number)
        try:
            with cached.new_session() if sessions else nullcontext():
                got[number] = run(
                    family,
                    pipe,
                    seed=number,
                    callback_on_step_end=step_ended,
                    **arguments(family, number),
                )
        finally:
            turns.end(number)

    threads = [threading.Thread(target=request, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[number], want[number]) for number in range(2))
    assert cached.cache_report().calls_reused > 0
