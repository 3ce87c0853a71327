"""A signature of the calibrated model, so that its plan is not used for another one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class ModelSignature:
    """A model's class, its block lists with their lengths, and its width.

    The width is the most frequent dimension of its parameters. LoRA, quantised weights and another
    dtype or device change none of these.
    """

    model: str
    blocks: tuple[tuple[str, int], ...]
    width: int

    @staticmethod
    def of(model: nn.Module, blocks: Mapping[str, int]) -> ModelSignature:
        """Return the signature of a model with these block lists: name -> number of blocks."""
        lists = tuple(sorted(blocks.items()))
        return ModelSignature(type(model).__name__, lists, width_of(_shapes(model)))

    def unlike(self, model: nn.Module) -> list[str]:
        """Describe each difference of a model."""
        found = dict(_lists(model, [name for name, _ in self.blocks]))
        kind = _differs("class", self.model, type(model).__name__)
        return [*kind, *self.unlike_graph(found, _shapes(model))]

    def unlike_graph(
        self, blocks: Mapping[str, int], shapes: Iterable[Sequence[int]] = ()
    ) -> list[str]:
        """Describe each difference of a graph's lists and parameters. No shapes: unknown width."""
        told = [d for name, count in self.blocks for d in _blocks_differ(name, count, blocks)]
        width = width_of(shapes)
        return told + (_differs("width", self.width, width) if width else [])

    def to_json(self) -> dict[str, Any]:
        """Return a dict of JSON values."""
        return {"model": self.model, "blocks": dict(self.blocks), "width": self.width}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> ModelSignature:
        """Read the result of `to_json`."""
        blocks = {str(name): int(count) for name, count in data["blocks"].items()}
        return ModelSignature(str(data["model"]), tuple(sorted(blocks.items())), int(data["width"]))


def width_of(shapes: Iterable[Sequence[int]]) -> int:
    """Return the most frequent size of a dimension, the largest of several; 0 if there is none."""
    counts = Counter(size for shape in shapes for size in shape if size > 1)
    return max(counts, key=lambda size: (counts[size], size), default=0)


def _shapes(model: nn.Module) -> list[Sequence[int]]:
    return [parameter.shape for parameter in model.parameters()]


def _lists(model: nn.Module, names: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Yield the named lists that exist, with their lengths."""
    for name in names:
        try:
            yield name, len([*model.get_submodule(name).children()])
        except AttributeError:
            continue


def _blocks_differ(name: str, count: int, blocks: Mapping[str, int]) -> list[str]:
    """Describe how a block list differs; its path may have a prefix here."""
    found = [n for own, n in blocks.items() if own == name or f".{own}".endswith(f".{name}")]
    if not found:
        return [f"there is no block list {name!r} of {count} blocks"]
    return [] if count in found else _differs(f"blocks in {name!r}", count, found[0])


def _differs(what: str, calibrated: object, here: object) -> list[str]:
    same = calibrated == here
    return [] if same else [f"{what}: {here} here, {calibrated} where it was calibrated"]
