"""The recording of a model run: the calls of its leaf modules, and its result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dit_cache_fx.capture.attributes import Attributes
from dit_cache_fx.capture.settings import Setting
from dit_cache_fx.capture.splits import Split
from dit_cache_fx.capture.world import World
from dit_cache_fx.ir.within import Within
from dit_cache_fx.values.checksum import Checksums
from dit_cache_fx.values.pytree import Skeleton
from dit_cache_fx.values.random_state import RandomState
from dit_cache_fx.values.tensor_spec import TensorSpec
from dit_cache_fx.values.wrapped import Layout, laid_out


@dataclass
class Inside:
    """The inside of a block: its call, and the calls of its parts."""

    block: nn.Module
    parts: Mapping[nn.Module, str]
    tensors: list[torch.Tensor]
    skeleton: Skeleton
    recording: Recording


@dataclass
class RecordedCall:
    """One call of a leaf module."""

    name: str
    specs: list[TensorSpec]
    skeleton: Skeleton
    layouts: list[Layout | None] = field(default_factory=list)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    mutated: tuple[int, ...] = ()  # the tensor arguments that it changed in place
    like: tuple[int | None, ...] = ()  # for each output a tensor argument of the same shape
    inside: Inside | None = None
    rewrites: bool = False  # whether it changed a container among its arguments
    changed: frozenset[int] = frozenset()  # addresses of memory that it changed
    writes: frozenset[int] = frozenset()  # the same, without returning it
    within: Within = field(default_factory=Within)  # the contexts that it was called in
    digests: Checksums = field(default_factory=list)  # of its results
    split: Split | None = None  # hooks that split its arguments
    random: RandomState | None = None  # the random state that it started from

    def outputs(self) -> list[torch.Tensor]:
        """Return its results as new tensor objects; placeholders for values not recorded."""
        return [
            self.values[i].detach() if i in self.values else laid_out(spec.placeholder(), layout)
            for i, (spec, layout) in enumerate(zip(self.specs, self.layouts, strict=True))
        ]


@dataclass
class Recording:
    """The calls of the leaf modules in order, and the model's result."""

    calls: list[RecordedCall]
    output: Any
    settings: tuple[Setting, ...] = ()  # attributes that forward sets on its modules
    suspect: bool = False  # whether blocks may depend on more than their arguments
    before: Attributes = field(default_factory=dict)  # of the modules, before the recorded run
    world: World | None = None  # other state that blocks may read, before the recorded run

    def of_each(self, names: Iterable[str]) -> dict[str, Iterator[RecordedCall]]:
        """Return the calls of each of these modules, in order."""
        return {name: iter([c for c in self.calls if c.name == name]) for name in names}

    def forget(self) -> None:
        """Drop the values: only the first answer needs them."""
        self.output, self.before, self.world = None, {}, None
        for made in self.calls:
            made.values.clear()
            made.digests.clear()
