"""Watching a transformer's blocks, and reusing their results by hand.

Both put a function into a block's place as its `forward` and take it out again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from tests.reference import copied

Forward = Callable[..., Any]


class Count:
    """How often blocks ran."""

    def __init__(self) -> None:
        self.calls = 0


@contextmanager
def counted(model: nn.Module, lists: Sequence[str]) -> Iterator[Count]:
    """Within the context the calls of the blocks in `lists` are counted."""
    count = Count()

    def counting(forward: Forward) -> Forward:
        def call(*args: Any, **kwargs: Any) -> Any:
            count.calls += 1
            return forward(*args, **kwargs)

        return call

    with replaced_forwards(blocks_of(model, lists), counting):
        yield count


@contextmanager
def reused_by_hand(
    model: nn.Module, lists: Sequence[str], computed: Collection[int], passes: int
) -> Iterator[None]:
    """Within the context, for one generation, the blocks return what they stored.

    This is what DeepCache has to give. `computed`: the calls of the model, counted from 0, in which
    they run. `passes`: the calls in a step, each with a store of its own.
    """

    def storing(forward: Forward) -> Forward:
        stored: dict[int, Any] = {}
        calls = itertools.count()

        def block(*args: Any, **kwargs: Any) -> Any:
            call = next(calls)
            if call in computed:
                stored[call % passes] = copied(forward(*args, **kwargs))
            return copied(stored[call % passes])

        return block

    with replaced_forwards(blocks_of(model, lists), storing):
        yield


def blocks_of(model: nn.Module, lists: Sequence[str]) -> list[nn.Module]:
    """The blocks of several lists."""
    return [block for name in lists for block in model.get_submodule(name)]


@contextmanager
def replaced_forwards(
    modules: Sequence[nn.Module], wrapped: Callable[[Forward], Forward]
) -> Iterator[None]:
    """Within the context each module's forward is what `wrapped` makes of it."""
    before = [vars(module).get("forward") for module in modules]
    for module in modules:
        module.forward = wrapped(module.forward)
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            del module.forward
            if own is not None:
                module.forward = own
