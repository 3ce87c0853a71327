"""Sizes and draws that the image cases share. Every batch is one row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.case import SupportCase
from tests.zoo.case import built, expanded, rows, text_mask

HEADS, HEAD_DIM, HIDDEN = 2, 16, 32
ROPE_AXES = (4, 6, 6)
TEXT_LEN, TEXT_DIM, POOLED_DIM = 8, 12, 10
CHANNELS = 4
SIDE = 8
GRID = SIDE // 2
"""Rows and columns of 2 by 2 patches."""


def case(
    model: type[nn.Module],
    inputs: Callable[..., dict[str, Any]],
    timesteps: Callable[[int], list[float]],
    **config: Any,
) -> SupportCase:
    return SupportCase(
        name=model.__name__,
        build=partial(built, partial(model, **config)),
        inputs=inputs,
        timesteps=timesteps,
    )


def latents(seed: int) -> Tensor:
    """The noisy sample as `[1, channels, height, width]`."""
    return noise(seed, CHANNELS, SIDE, SIDE)


def tokens(seed: int) -> Tensor:
    """The noisy sample packed into one token for each patch."""
    return noise(seed, GRID * GRID, 4 * CHANNELS)


def noise(seed: int, *shape: int) -> Tensor:
    return rows("sample", seed, shape, 1, torch.float32)


def fixed(what: str, *shape: int) -> Tensor:
    """A draw that is the same in every call."""
    return rows(what, 0, shape, 1, torch.float32)


def text(length: int = TEXT_LEN, dim: int = TEXT_DIM) -> Tensor:
    return fixed("text", length, dim)


def mask(dtype: torch.dtype = torch.int64) -> Tensor:
    """The mask of a text with one token of padding."""
    return text_mask(0, TEXT_LEN, 1, dtype)


def batched(timestep: float) -> Tensor:
    return expanded(timestep, 1)


def whole(timestep: float) -> Tensor:
    """The timestep as a tensor without dimensions, as a DDPM-like scheduler gives it."""
    return torch.tensor(round(timestep))


def grid_ids(plane: int = 0, start: int = 0) -> Tensor:
    """Rotary positions `[plane, row, column]` of the patches."""
    row, column = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    ids = torch.stack([torch.full_like(row, plane), row + start, column + start], dim=-1)
    return ids.reshape(-1, 3).float()


def diagonal_ids(length: int) -> Tensor:
    """Rotary positions `[0, i, i]` of the text."""
    index = torch.arange(length).float()
    return torch.stack([torch.zeros(length), index, index], dim=-1)


def ascending(n: int) -> list[float]:
    """`n` values rising from 0 (noise) towards 1 (image)."""
    return [i / n for i in range(n)]
