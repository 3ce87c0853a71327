"""The model of the digits: 8 blocks, 16 tokens, 8x8 pixels."""

from pathlib import Path
from typing import TypeVar

from examples.flow import checkpoint
from examples.flow.model import DiT

CHECKPOINT = Path(__file__).with_name("digits_dit.safetensors")


_Kind = TypeVar("_Kind", bound=DiT)


def untrained(kind: type[_Kind] = DiT) -> _Kind:  # type: ignore[assignment]
    """The model as it is before training, or one of a `kind` derived from it."""
    return kind(8, channels=1, classes=10, dim=128, depth=8, heads=4, patch=2)


def load(path: Path = CHECKPOINT) -> DiT:
    """The trained model."""
    return checkpoint.load(untrained(), path)
