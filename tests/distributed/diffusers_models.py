"""Transformers of diffusers, tiny, and their calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import (
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
)
from torch import nn

from examples.several_devices import tiny_flux
from tests.distributed.models import STEPS, Call


class Family(NamedTuple):
    """A model, the shape of its sample, and what else a call takes."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    more: Callable[[], dict[str, Any]]
    scale: float = 1.0  # of the timestep

    def call(self) -> Callable[[int, torch.Tensor | None], Call]:
        """The arguments of each step; what does not change is the same tensors."""
        constant = {**self.more(), "return_dict": False}

        def arguments(step: int, before: torch.Tensor | None) -> Call:
            sample = torch.randn(self.shape) if before is None else before
            time = torch.tensor([self.scale * (1 - step / STEPS)])
            return {"hidden_states": sample, "timestep": time, **constant}

        return arguments


def flux_more() -> dict[str, Any]:
    return {
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 32),
        "img_ids": torch.randn(16, 3).round(),
        "txt_ids": torch.zeros(8, 3),
    }


def wan() -> nn.Module:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=3,
        rope_max_seq_len=32,
    )


def qwen() -> nn.Module:
    return QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )


FAMILIES = {
    "flux": Family(tiny_flux, (1, 16, 4), flux_more),
    "wan": Family(
        wan, (1, 4, 2, 8, 8), lambda: {"encoder_hidden_states": torch.randn(1, 8, 16)}, 1000.0
    ),
    "qwen": Family(
        qwen,
        (1, 16, 16),
        lambda: {
            "encoder_hidden_states": torch.randn(1, 8, 16),
            "img_shapes": [[(1, 4, 4)]],
            "encoder_hidden_states_mask": None,
        },
    ),
}


def made(family: str) -> nn.Module:
    torch.manual_seed(1)
    return FAMILIES[family].model().eval()


def calls(family: str) -> Callable[[int, torch.Tensor | None], Call]:
    torch.manual_seed(3)
    return FAMILIES[family].call()
