"""The model of the digits: 8 blocks, 16 tokens, 8x8 pixels."""

from pathlib import Path

from examples.flow import checkpoint
from examples.flow.model import DiT

CHECKPOINT = Path(__file__).with_name("digits_dit.safetensors")


def untrained() -> DiT:
    """The model as it is before training."""
    return DiT(8, channels=1, classes=10, dim=128, depth=8, heads=4, patch=2)


def load(path: Path = CHECKPOINT) -> DiT:
    """The trained model."""
    return checkpoint.load(untrained(), path)
