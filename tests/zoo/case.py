"""What a model of the zoo offers to the tests, and how its weights and inputs are drawn."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Case:
    """One tiny Diffusion Transformer: how to build it and how to call it.

    `inputs(timestep, *, seed=0, prompt=0, size=0, batch=1, dtype=torch.float32)` gives the keyword
    arguments of `forward`. `seed` redraws the noisy sample, `prompt` the conditioning (and the
    number of valid tokens where the model takes a mask), `size` picks one of two resolutions.
    Row `i` of a batch does not depend on the batch size.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[..., dict[str, Any]]
    timesteps: Callable[[int], list[float]]
    block_lists: tuple[str, ...]
    timestep_arg: str
    half: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)


def built(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build a model for inference with redrawn weights, leaving the global RNG as it was."""
    with torch.random.fork_rng(devices=[]):
        model = make()
    redraw(model, seed)
    return model.eval()


@torch.no_grad()
def redraw(model: nn.Module, seed: int) -> None:
    """Redraw every parameter so that each one matters and activations stay O(1).

    Default initialisation zeroes gates and output layers, which would hide a skipped block.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(module, name, noise))


def _scaled(module: nn.Module, name: str, noise: Tensor) -> Tensor:
    if noise.ndim == 1:
        return 0.1 * noise if "bias" in name else 1 + 0.1 * noise
    if isinstance(module, nn.Embedding):
        return noise
    is_conv = isinstance(module, (nn.Conv2d, nn.Conv3d))
    fan_in = noise[0].numel() if is_conv else noise.shape[-1]
    return noise / fan_in**0.5


def rows(what: str, number: int, shape: tuple[int, ...], batch: int, dtype: torch.dtype) -> Tensor:
    """A normal draw of `[batch, *shape]`, one generator per row: rows do not depend on `batch`."""
    return torch.stack([_row(what, number, row, shape) for row in range(batch)]).to(dtype)


def _row(what: str, number: int, row: int, shape: tuple[int, ...]) -> Tensor:
    key = zlib.crc32(f"{what} {number} {row}".encode())
    return torch.randn(shape, generator=torch.Generator().manual_seed(key))


def valid_tokens(prompt: int, length: int, row: int) -> int:
    """Number of valid tokens out of `length`: differs by prompt and by row, at least 2."""
    return length - 1 - (2 * prompt + row) % (length - 2)


def text_mask(prompt: int, length: int, batch: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """A `[batch, length]` mask, 1 for the valid leading tokens and 0 for the padding."""
    valid = torch.tensor([valid_tokens(prompt, length, row) for row in range(batch)])
    return (torch.arange(length)[None] < valid[:, None]).to(dtype)


def expanded(timestep: float, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The timestep as pipelines pass it: one scalar expanded to `[batch]`."""
    is_integer = not dtype.is_floating_point
    value = torch.tensor(round(timestep) if is_integer else timestep, dtype=dtype)
    return value.expand(batch)


def thousand(n: int) -> list[float]:
    """`n` descending values from 1000, as flow-matching schedulers give."""
    return [1000 * (1 - i / n) for i in range(n)]


def thousand_integers(n: int) -> list[float]:
    """`n` descending whole values from 999, as DDIM-like schedulers give (n up to 999)."""
    return [float(round(999 * (1 - i / n))) for i in range(n)]


def sigmas(n: int) -> list[float]:
    """`n` descending values from 1."""
    return [1 - i / n for i in range(n)]


def flat(output: Any) -> Tensor:
    """All tensors of a model's output as one vector."""
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    return torch.cat([leaf.flatten() for leaf in leaves])
