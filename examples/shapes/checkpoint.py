"""The model of the shapes: 6 blocks, 64 tokens, 16x16 pixels in colour."""

from pathlib import Path

from examples.flow import checkpoint
from examples.flow.model import DiT
from examples.shapes.data import NAMES, SIZE

CHECKPOINT = Path(__file__).with_name("shapes_dit.safetensors")


def untrained() -> DiT:
    """The model as it is before training."""
    return DiT(SIZE, channels=3, classes=len(NAMES), dim=96, depth=6, heads=4, patch=2)


def load(path: Path = CHECKPOINT) -> DiT:
    """The trained model."""
    return checkpoint.load(untrained(), path)
