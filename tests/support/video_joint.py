"""Video transformers that denoise sound as well, and those that are given a cache of keys."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers.models.transformers import (
    Kandinsky6Transformer3DModel,
    LTX2VideoTransformer3DModel,
    MiniMaxH3Transformer3DModel,
    SanaWMLTX2RefinerTransformer3DModel,
    WanAnimate2Transformer3DModel,
)
from diffusers.models.transformers.transformer_ltx2 import LTX2AudioVideoRotaryPosEmbed
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMRefinerKVCache
from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache
from torch import Tensor

from tests.support.case import SupportCase
from tests.support.image_common import (
    CHANNELS,
    GRID,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    POOLED_DIM,
    ROPE_AXES,
    SIDE,
    TEXT_DIM,
    TEXT_LEN,
    ascending,
    batched,
    case,
    fixed,
    mask,
    noise,
    text,
)
from tests.zoo.case import expanded, rows, thousand, thousand_integers

FRAMES = 2
LAYERS = 3
VIDEO_LEN = FRAMES * GRID * GRID
AUDIO_LEN, AUDIO_CHANNELS = 6, 5
AUDIO_HEAD_DIM = 8


def kandinsky6_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """The sample, then the condition and its mask, both zero."""
    sample = noise(seed, FRAMES, SIDE, SIDE, CHANNELS)
    return {
        "hidden_states": torch.nn.functional.pad(sample, (0, CHANNELS + 1)),
        "audio_hidden_states": _sound(seed),
        "encoder_hidden_states": text(),
        "pooled_projections": fixed("pooled", POOLED_DIM),
        "timestep": batched(timestep),
        "visual_rope_pos": None,
        "encoder_attention_mask": None,
        "visual_token_type_ids": None,
        "return_dict": False,
    }


def ltx2_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """As LTX-2.3: the timestep goes in twice."""
    positions = LTX2AudioVideoRotaryPosEmbed(HIDDEN)
    device = torch.device("cpu")
    return {
        "hidden_states": noise(seed, VIDEO_LEN, CHANNELS),
        "audio_hidden_states": _sound(seed),
        "encoder_hidden_states": text(),
        "audio_encoder_hidden_states": fixed("audio text", TEXT_LEN, TEXT_DIM),
        "timestep": batched(timestep),
        "sigma": batched(timestep),
        "encoder_attention_mask": mask(),
        "audio_encoder_attention_mask": mask(),
        "num_frames": FRAMES,
        "height": GRID,
        "width": GRID,
        "fps": 24.0,
        "audio_num_frames": AUDIO_LEN,
        "video_coords": positions.prepare_video_coords(1, FRAMES, GRID, GRID, device, fps=24.0),
        "audio_coords": positions.prepare_audio_coords(1, AUDIO_LEN, device),
        "isolate_modalities": False,
        "spatio_temporal_guidance_blocks": None,
        "perturbation_mask": None,
        "use_cross_timestep": True,
        "attention_kwargs": None,
        "return_dict": False,
    }


def minimax_h3_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """Text, sound and video in one sequence.

    Sound has its own schedule. The model is given the distinct timesteps, of which the first step
    has one and the others two, and the one of each row.
    """
    text_rows, audio_rows, video_rows = torch.arange(TEXT_LEN + AUDIO_LEN + VIDEO_LEN).split(
        [TEXT_LEN, AUDIO_LEN, VIDEO_LEN]
    )
    times = torch.full((TEXT_LEN + AUDIO_LEN + VIDEO_LEN,), timestep)
    times[audio_rows] = timestep**0.5
    distinct, of_row = torch.unique(times, sorted=True, return_inverse=True)
    tags = torch.zeros(len(times), dtype=torch.int64)
    tags[audio_rows], tags[video_rows] = 1, 2
    positions = torch.zeros(len(times), 3, dtype=torch.float64)
    positions[:, 0] = torch.arange(len(times))
    positions[video_rows] = torch.cartesian_prod(
        TEXT_LEN + torch.arange(FRAMES), torch.arange(GRID), torch.arange(GRID)
    ).double()
    return {
        "hidden_states": noise(seed, VIDEO_LEN, 4 * CHANNELS),
        "audio_hidden_states": _sound(seed),
        "encoder_hidden_states": text(),
        "timestep": distinct,
        "timestep_indices": of_row,
        "attention_kwargs": None,
        "return_dict": False,
        "position_ids": positions,
        "token_tags": tags,
        "video_indices": video_rows,
        "audio_indices": audio_rows,
        "text_indices": text_rows,
    }


def refiner_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": noise(seed, VIDEO_LEN, CHANNELS),
        "encoder_hidden_states": text(),
        "timestep": torch.full((1, VIDEO_LEN), timestep),
        "video_rotary_emb": _rotary(FRAMES),
        "encoder_attention_mask": mask(),
        "kv_cache": _refiner_cache(),
        "kv_cache_mode": "inject",
        "return_dict": False,
    }


def animate2_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """One frame for the reference image precedes those of the driving video, which are cached."""
    frames = 1 + FRAMES
    return {
        "hidden_states": [noise(seed, CHANNELS, frames, SIDE, SIDE)[0]],
        "timestep": expanded(timestep, 1, torch.int64),
        "encoder_hidden_states": [text()[0]],
        "condition_latents": [fixed("condition", CHANNELS, frames, SIDE, SIDE)[0]],
        "kv_cache": _animate2_cache(),
        "kv_cache_mode": "cached",
        "seq_len": frames * GRID * GRID,
        "reference_grid_sizes": torch.tensor([[FRAMES, GRID, GRID]]),
        "origin_len": 4 * (FRAMES - 1) + 1,
        "origin_area": [8 * SIDE, 8 * SIDE],
        "is_uncondtion": False,
        "encoder_hidden_states_image": fixed("image", 5, 1280),
    }


def _sound(seed: int) -> Tensor:
    """The noisy sound, part of the sample."""
    return rows("sound", seed, (AUDIO_LEN, AUDIO_CHANNELS), 1, torch.float32)


@cache
def _refiner_cache() -> SanaWMRefinerKVCache:
    """One object for all steps, as in the pipeline, with a frame of sink and one of history."""
    frame = GRID * GRID
    cached = SanaWMRefinerKVCache(LAYERS)
    cached.sink_pe = _rotary(1)
    for i in range(LAYERS):
        key, value, old_key, old_value = fixed(f"cache {i}", 4, frame, HIDDEN).transpose(0, 1)
        cached.get(i).store_sink(key, value)
        cached.get(i).store_history(old_key, old_value)
    return cached


@cache
def _animate2_cache() -> WanAnimate2KVCache:
    """One object for all steps, as in the pipeline."""
    cached = WanAnimate2KVCache(LAYERS)
    for i in range(LAYERS):
        key, value = fixed(f"cache {i}", 2, VIDEO_LEN, HEADS, HEAD_DIM).transpose(0, 1)
        cached.get(i).store(key, value)
    return cached


def _rotary(frames: int) -> tuple[Tensor, Tensor]:
    rope = LTX2AudioVideoRotaryPosEmbed(HIDDEN)
    return rope(rope.prepare_video_coords(1, frames, GRID, GRID, torch.device("cpu")))


LTX2: dict[str, Any] = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "cross_attention_dim": HIDDEN,
    "audio_in_channels": AUDIO_CHANNELS,
    "audio_out_channels": AUDIO_CHANNELS,
    "audio_num_attention_heads": HEADS,
    "audio_attention_head_dim": AUDIO_HEAD_DIM,
    "audio_cross_attention_dim": HEADS * AUDIO_HEAD_DIM,
    "num_layers": LAYERS,
    "caption_channels": TEXT_DIM,
}

JOINT: tuple[SupportCase, ...] = (
    case(
        Kandinsky6Transformer3DModel,
        kandinsky6_inputs,
        thousand,
        in_visual_dim=CHANNELS,
        out_visual_dim=CHANNELS,
        in_text_dim=TEXT_DIM,
        in_text_dim2=POOLED_DIM,
        time_dim=HIDDEN,
        model_dim=HIDDEN,
        ff_dim=2 * HIDDEN,
        num_text_blocks=2,
        num_visual_blocks=LAYERS,
        axes_dims=ROPE_AXES,
        in_audio_dim=AUDIO_CHANNELS,
        out_audio_dim=AUDIO_CHANNELS,
    ),
    case(
        LTX2VideoTransformer3DModel,
        ltx2_inputs,
        thousand,
        **LTX2,
        gated_attn=True,
        cross_attn_mod=True,
        audio_gated_attn=True,
        audio_cross_attn_mod=True,
    ),
    case(
        MiniMaxH3Transformer3DModel,
        minimax_h3_inputs,
        ascending,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        num_refiner_layers=2,
        ffn_dim=2 * HIDDEN,
        in_channels=CHANNELS,
        audio_in_channels=AUDIO_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=HEAD_DIM,
        time_embed_hidden_dim=HIDDEN,
        time_embed_dim=HIDDEN,
        rope_freq_dim=2,
    ),
    case(SanaWMLTX2RefinerTransformer3DModel, refiner_inputs, thousand, **LTX2),
    case(
        WanAnimate2Transformer3DModel,
        animate2_inputs,
        thousand_integers,
        text_len=TEXT_LEN,
        in_dim=2 * CHANNELS,
        dim=HIDDEN,
        ffn_dim=2 * HIDDEN,
        freq_dim=HEAD_DIM,
        text_dim=TEXT_DIM,
        out_dim=CHANNELS,
        num_heads=HEADS,
        num_layers=LAYERS,
    ),
)
