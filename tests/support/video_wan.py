"""Video transformers built on Wan's blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.transformers import (
    AnyFlowFARTransformer3DModel,
    AnyFlowTransformer3DModel,
    ChronoEditTransformer3DModel,
    HeliosTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    WanAnimateTransformer3DModel,
    WanVACETransformer3DModel,
)
from torch import Tensor

from tests.support.case import SupportCase
from tests.support.image_common import (
    CHANNELS,
    GRID,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    ROPE_AXES,
    SIDE,
    TEXT_DIM,
    batched,
    case,
    fixed,
    noise,
    text,
)
from tests.zoo.case import expanded, thousand, thousand_integers

FRAMES = 2
LAYERS = 3
IMAGE_LEN, IMAGE_DIM = 5, 12
CONDITION = CHANNELS + 4
"""Channels of the conditioning image and its mask, which follow those of the sample."""

wan = partial(
    case,
    num_attention_heads=HEADS,
    attention_head_dim=HEAD_DIM,
    out_channels=CHANNELS,
    text_dim=TEXT_DIM,
    freq_dim=HEAD_DIM,
    ffn_dim=2 * HIDDEN,
    rope_max_seq_len=32,
)


def any_flow_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """From `timestep` to the target of the step, both for each frame."""
    return {
        "hidden_states": noise(seed, FRAMES, CHANNELS, SIDE, SIDE),
        "timestep": _per_frame(timestep),
        "r_timestep": _per_frame(0.8 * timestep),
        "encoder_hidden_states": text(),
        "attention_kwargs": None,
        "return_dict": False,
    }


def any_flow_far_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """The second of three chunks: one frame is in the caches, two are denoised."""
    caches = {
        layer: {
            "full_cache": _keys_values(f"full {layer}", 3 * FRAMES * GRID**2),
            "compressed_cache": _keys_values(f"coarse {layer}", FRAMES * (GRID // 2) ** 2),
        }
        for layer in range(LAYERS)
    }
    return {
        **any_flow_inputs(timestep, seed=seed),
        "chunk_partition": [1, FRAMES],
        "kv_cache": caches,
        "kv_cache_flag": {"num_cached_chunks": 1, "is_cache_step": False},
    }


def chrono_edit_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    sample = noise(seed, CHANNELS, FRAMES, SIDE, SIDE)
    condition = fixed("condition", CONDITION, FRAMES, SIDE, SIDE)
    return {
        "hidden_states": torch.cat([sample, condition], dim=1),
        "timestep": batched(timestep),
        "encoder_hidden_states": text(),
        "encoder_hidden_states_image": fixed("image", IMAGE_LEN, IMAGE_DIM),
        "attention_kwargs": None,
        "return_dict": False,
    }


def helios_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """Long, middle and short history, then the sample."""
    long, middle, short, sample = torch.arange(4 + 2 + 2 + FRAMES).split([4, 2, 2, FRAMES])
    return {
        "hidden_states": noise(seed, CHANNELS, FRAMES, SIDE, SIDE),
        "timestep": batched(timestep),
        "encoder_hidden_states": text(),
        "indices_hidden_states": sample[None],
        "indices_latents_history_short": short[None],
        "indices_latents_history_mid": middle[None],
        "indices_latents_history_long": long[None],
        "latents_history_short": fixed("short", CHANNELS, len(short), SIDE, SIDE),
        "latents_history_mid": fixed("middle", CHANNELS, len(middle), SIDE, SIDE),
        "latents_history_long": fixed("long", CHANNELS, len(long), SIDE, SIDE),
        "attention_kwargs": None,
        "return_dict": False,
    }


def sky_reels_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": noise(seed, CHANNELS, FRAMES, SIDE, SIDE),
        "timestep": expanded(timestep, 1, torch.int64),
        "encoder_hidden_states": text(),
        "attention_kwargs": None,
        "return_dict": False,
    }


def vace_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        **sky_reels_inputs(timestep, seed=seed),
        "control_hidden_states": fixed("control", 2 * CHANNELS, FRAMES, SIDE, SIDE),
        "control_hidden_states_scale": torch.tensor([1.0, 0.5]),
    }


def animate_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """One frame for the reference image precedes those of the pose and the face."""
    sample = noise(seed, CHANNELS, 1 + FRAMES, SIDE, SIDE)
    condition = fixed("condition", CONDITION, 1 + FRAMES, SIDE, SIDE)
    return {
        "hidden_states": torch.cat([sample, condition], dim=1),
        "timestep": expanded(timestep, 1, torch.int64),
        "encoder_hidden_states": text(),
        "encoder_hidden_states_image": fixed("image", IMAGE_LEN, IMAGE_DIM),
        "pose_hidden_states": fixed("pose", CHANNELS, FRAMES, SIDE, SIDE),
        "face_pixel_values": fixed("face", 3, 4 * (FRAMES - 1) + 1, 16, 16),
        "motion_encode_batch_size": None,
        "attention_kwargs": None,
        "return_dict": False,
    }


def _per_frame(timestep: float) -> Tensor:
    return torch.full((1, FRAMES), timestep)


def _keys_values(what: str, length: int) -> Tensor:
    return fixed(what, 2, HEADS, length, HEAD_DIM).transpose(0, 1)


WAN: tuple[SupportCase, ...] = (
    wan(
        AnyFlowTransformer3DModel,
        any_flow_inputs,
        thousand,
        in_channels=CHANNELS,
        num_layers=LAYERS,
    ),
    wan(
        AnyFlowFARTransformer3DModel,
        any_flow_far_inputs,
        thousand,
        in_channels=CHANNELS,
        num_layers=LAYERS,
        chunk_partition=(1, FRAMES, FRAMES),
    ),
    wan(
        ChronoEditTransformer3DModel,
        chrono_edit_inputs,
        thousand,
        in_channels=CHANNELS + CONDITION,
        num_layers=LAYERS,
        image_dim=IMAGE_DIM,
        added_kv_proj_dim=HIDDEN,
    ),
    case(
        HeliosTransformer3DModel,
        helios_inputs,
        thousand,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=HEAD_DIM,
        ffn_dim=2 * HIDDEN,
        num_layers=LAYERS,
        rope_dim=ROPE_AXES,
        is_amplify_history=True,
    ),
    wan(
        SkyReelsV2Transformer3DModel,
        sky_reels_inputs,
        thousand_integers,
        in_channels=CHANNELS,
        num_layers=LAYERS,
    ),
    wan(
        WanVACETransformer3DModel,
        vace_inputs,
        thousand_integers,
        in_channels=CHANNELS,
        num_layers=4,
        vace_layers=[0, 2],
        vace_in_channels=2 * CHANNELS,
    ),
    wan(
        WanAnimateTransformer3DModel,
        animate_inputs,
        thousand_integers,
        in_channels=CHANNELS + CONDITION,
        latent_channels=CHANNELS,
        num_layers=4,
        image_dim=IMAGE_DIM,
        added_kv_proj_dim=HIDDEN,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=16,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    ),
)
