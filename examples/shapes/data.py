"""Drawn shapes, 16x16 pixels in colour, scaled to [-1, 1]: no download."""

import math

import torch
from torch import Tensor

SIZE = 16
NAMES = ("disc", "ring", "square", "triangle", "cross", "stripes")


def shapes(labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One shape for each label [B], with its own place, size, turn and two colours: [B, 3, 16, 16].

    The generator, like the result, is on the device of the labels.
    """

    def between(low: float, high: float, *shape: int) -> Tensor:
        drawn = torch.rand(len(labels), *shape, generator=generator, device=labels.device)
        return low + (high - low) * drawn

    x, y = _turned(between(5.5, 10.5, 2), between(-0.2, 0.2))
    radius = between(3.0, 5.0)[:, None, None]
    inside = (0.5 - _distance(x, y, radius, labels)).clamp(0, 1)[:, None]  # smooth at the edge
    ground, paint = between(-1, 0, 3, 1, 1), between(0, 1, 3, 1, 1)
    return torch.lerp(ground, paint, inside)


def _turned(centre: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels' coordinates [B, 16, 16] from a centre [B, 2], turned by an angle [B]."""
    pixels = torch.arange(SIZE, device=angle.device) + 0.5
    right = pixels - centre[:, 0, None, None]
    down = pixels[:, None] - centre[:, 1, None, None]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    return cos * right + sin * down, cos * down - sin * right


def _distance(x: Tensor, y: Tensor, radius: Tensor, labels: Tensor) -> Tensor:
    """How many pixels a point is outside of the edge (below 0: inside): [B, 16, 16]."""
    far = torch.hypot(x, y)
    wide, narrow = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    slanted = [y * math.cos(a) + x * math.sin(a) for a in (0.0, 2.1, 4.2)]
    kinds = [
        far - radius,
        (far - 0.75 * radius).abs() - 0.25 * radius,
        wide - 0.8 * radius,
        torch.stack(slanted).amax(dim=0) - 0.6 * radius,
        torch.maximum(narrow - 0.3 * radius, wide - radius),
        torch.maximum((x.abs() - 0.6 * radius).abs() - 0.25 * radius, y.abs() - 0.9 * radius),
    ]
    return torch.stack(kinds)[labels, torch.arange(len(labels), device=labels.device)]
