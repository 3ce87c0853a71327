"""What a calibration remembers of its model, so that a plan is not used for another one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class ModelSignature:
    """A model's class, its block lists with their lengths, and its width.

    The width is the size that most dimensions of its parameters have. LoRA, quantised weights and
    another dtype or device change none of these.
    """

    model: str
    blocks: tuple[tuple[str, int], ...]
    width: int

    @staticmethod
    def of(model: nn.Module, blocks: Mapping[str, int]) -> ModelSignature:
        """The signature of a model with these block lists: name -> number of blocks."""
        lists = tuple(sorted(blocks.items()))
        return ModelSignature(type(model).__name__, lists, width_of(_shapes(model)))

    def unlike(self, model: nn.Module) -> list[str]:
        """What of a model differs, each in words."""
        found = dict(_lists(model, [name for name, _ in self.blocks]))
        kind = _differs("class", self.model, type(model).__name__)
        return [*kind, *self.unlike_graph(found, _shapes(model))]

    def unlike_graph(
        self, blocks: Mapping[str, int], shapes: Iterable[Sequence[int]] = ()
    ) -> list[str]:
        """What of a graph's block lists and parameters differs. No shapes: the width is unknown."""
        told = [d for name, count in self.blocks for d in _blocks_differ(name, count, blocks)]
        width = width_of(shapes)
        return told + (_differs("width", self.width, width) if width else [])

    def to_json(self) -> dict[str, Any]:
        """As a dict of JSON values."""
        return {"model": self.model, "blocks": dict(self.blocks), "width": self.width}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ModelSignature:
        """From what `to_json` gave."""
        blocks = {str(name): int(count) for name, count in data["blocks"].items()}
        return ModelSignature(str(data["model"]), tuple(sorted(blocks.items())), int(data["width"]))


def width_of(shapes: Iterable[Sequence[int]]) -> int:
    """The most frequent size of a dimension, the largest of several; 0 where there are none."""
    counts = Counter(size for shape in shapes for size in shape if size > 1)
    return max(counts, key=lambda size: (counts[size], size), default=0)


def _shapes(model: nn.Module) -> list[Sequence[int]]:
    return [parameter.shape for parameter in model.parameters()]


def _lists(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Which of the named lists are there, and how long they are."""
    for name in names:
        try:
            yield name, len([*model.get_submodule(name).children()])
        except AttributeError:
            continue


def _blocks_differ(name: str, count: int, blocks: Mapping[str, int]) -> list[str]:
    """A list may be inside another module here: its name then ends as the calibrated one does."""
    found = [n for own, n in blocks.items() if own == name or f".{own}".endswith(f".{name}")]
    if not found:
        return [f"there is no block list {name!r} of {count} blocks"]
    return [] if count in found else _differs(f"blocks in {name!r}", count, found[0])


def _differs(what: str, calibrated: object, here: object) -> list[str]:
    same = calibrated == here
    return [] if same else [f"{what}: {here} here, {calibrated} where it was calibrated"]
