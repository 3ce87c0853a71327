"""Tiny diffusers transformers, called with the arguments that their pipelines pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

from tests.zoo.case import (
    Case,
    built,
    expanded,
    rows,
    sigmas,
    text_mask,
    thousand,
    thousand_integers,
)

HEADS, HEAD_DIM, HIDDEN = 2, 16, 32
ROPE_AXES = (4, 6, 6)
TEXT_LEN, TEXT_DIM, POOLED_DIM = 8, 12, 10
CHANNELS = 4
SIZES = ((8, 8), (8, 12))
FRAMES = 2


def build_flux() -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=3,
        num_single_layers=3,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        guidance_embeds=True,
        axes_dims_rope=ROPE_AXES,
    )


def flux_inputs(
    timestep: float,
    *,
    seed: int = 0,
    prompt: int = 0,
    size: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    height, width = _patched(size)
    return {
        "hidden_states": rows("sample", seed, (height * width, 4 * CHANNELS), batch, dtype),
        "timestep": expanded(timestep, batch, dtype),
        # Times 1000 in the model: 4000 is exact in bfloat16, the usual 3500 is not.
        "guidance": torch.full([1], 4.0).expand(batch),
        "pooled_projections": rows("pooled", prompt, (POOLED_DIM,), batch, dtype),
        "encoder_hidden_states": rows("text", prompt, (TEXT_LEN, TEXT_DIM), batch, dtype),
        "txt_ids": torch.zeros(TEXT_LEN, 3, dtype=dtype),
        "img_ids": _flux_image_ids(height, width).to(dtype),
        "joint_attention_kwargs": {},
        "return_dict": False,
    }


def _flux_image_ids(height: int, width: int) -> Tensor:
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column], dim=-1).reshape(-1, 3)


def build_sd3() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=3,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=HIDDEN,
        pooled_projection_dim=POOLED_DIM,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def sd3_inputs(
    timestep: float,
    *,
    seed: int = 0,
    prompt: int = 0,
    size: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    return {
        "hidden_states": rows("sample", seed, (CHANNELS, *SIZES[size]), batch, dtype),
        "timestep": expanded(timestep, batch),
        "encoder_hidden_states": rows("text", prompt, (TEXT_LEN, TEXT_DIM), batch, dtype),
        "pooled_projections": rows("pooled", prompt, (POOLED_DIM,), batch, dtype),
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def build_dit() -> nn.Module:
    return DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=3,
        sample_size=8,
        num_embeds_ada_norm=10,
    )


def dit_inputs(
    timestep: float,
    *,
    seed: int = 0,
    prompt: int = 0,
    size: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    # The model derives height = width from the number of tokens, so both sizes are square.
    side = (8, 12)[size]
    return {
        "hidden_states": rows("sample", seed, (CHANNELS, side, side), batch, dtype),
        "timestep": expanded(timestep, batch, torch.int64),
        "class_labels": (prompt + torch.arange(batch)) % 10,
        "return_dict": False,
    }


def build_pixart() -> nn.Module:
    return PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=3,
        cross_attention_dim=HIDDEN,
        sample_size=8,
        caption_channels=TEXT_DIM,
    )


def pixart_inputs(
    timestep: float,
    *,
    seed: int = 0,
    prompt: int = 0,
    size: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    return {
        "hidden_states": rows("sample", seed, (CHANNELS, *SIZES[size]), batch, dtype),
        "encoder_hidden_states": rows("text", prompt, (TEXT_LEN, TEXT_DIM), batch, dtype),
        "encoder_attention_mask": text_mask(prompt, TEXT_LEN, batch),
        "timestep": expanded(timestep, batch, torch.int64),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def build_qwen_image() -> nn.Module:
    return QwenImageTransformer2DModel(
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=3,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=ROPE_AXES,
    )


def qwen_image_inputs(
    timestep: float,
    *,
    seed: int = 0,
    prompt: int = 0,
    size: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    height, width = _patched(size)
    return {
        "hidden_states": rows("sample", seed, (height * width, 4 * CHANNELS), batch, dtype),
        "timestep": expanded(timestep, batch, dtype),
        "guidance": None,
        "encoder_hidden_states_mask": text_mask(prompt, TEXT_LEN, batch),
        "encoder_hidden_states": rows("text", prompt, (TEXT_LEN, TEXT_DIM), batch, dtype),
        "img_shapes": [[(1, height, width)]] * batch,
        "attention_kwargs": {},
        "return_dict": False,
    }


def build_hunyuan_video() -> nn.Module:
    return HunyuanVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=3,
        num_single_layers=3,
        num_refiner_layers=1,
        guidance_embeds=True,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        rope_axes_dim=ROPE_AXES,
    )


def hunyuan_video_inputs(
    timestep: float,
    *,
    seed: int = 0,
    prompt: int = 0,
    size: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    return {
        "hidden_states": rows("sample", seed, (CHANNELS, FRAMES, *SIZES[size]), batch, dtype),
        "timestep": expanded(timestep, batch, dtype),
        "encoder_hidden_states": rows("text", prompt, (TEXT_LEN, TEXT_DIM), batch, dtype),
        "encoder_attention_mask": text_mask(prompt, TEXT_LEN, batch),
        "pooled_projections": rows("pooled", prompt, (POOLED_DIM,), batch, dtype),
        "guidance": torch.full([batch], 6000.0, dtype=dtype),
        "attention_kwargs": None,
        "return_dict": False,
    }


def build_hunyuan_video15() -> nn.Module:
    return HunyuanVideo15Transformer3DModel(
        in_channels=2 * CHANNELS + 1,
        out_channels=CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=3,
        num_refiner_layers=1,
        text_embed_dim=TEXT_DIM,
        text_embed_2_dim=POOLED_DIM,
        image_embed_dim=HIDDEN,
        rope_axes_dim=ROPE_AXES,
    )


def hunyuan_video15_inputs(
    timestep: float,
    *,
    seed: int = 0,
    prompt: int = 0,
    size: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Prompts 0 and 1 are text-to-video (zero image embeddings), 2 and above image-to-video."""
    height, width = _patched(size)
    latents = rows("sample", seed, (CHANNELS, FRAMES, height, width), batch, dtype)
    no_condition = latents.new_zeros(batch, CHANNELS + 1, FRAMES, height, width)
    image = rows("image", prompt, (4, HIDDEN), batch, dtype)
    return {
        "hidden_states": torch.cat([latents, no_condition], dim=1),
        "image_embeds": image if prompt >= 2 else torch.zeros_like(image),
        "timestep": expanded(timestep, batch, dtype),
        "attention_kwargs": None,
        "return_dict": False,
        "encoder_hidden_states": rows("text", prompt, (TEXT_LEN, TEXT_DIM), batch, dtype),
        "encoder_attention_mask": text_mask(prompt, TEXT_LEN, batch),
        "encoder_hidden_states_2": rows("byt5", prompt, (6, POOLED_DIM), batch, dtype),
        "encoder_attention_mask_2": text_mask(prompt, 6, batch),
    }


def build_wan() -> nn.Module:
    return WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=TEXT_DIM,
        ffn_dim=2 * HIDDEN,
        num_layers=3,
        rope_max_seq_len=32,
    )


def wan_inputs(
    timestep: float,
    *,
    seed: int = 0,
    prompt: int = 0,
    size: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    return {
        "hidden_states": rows("sample", seed, (CHANNELS, FRAMES, *SIZES[size]), batch, dtype),
        "timestep": expanded(timestep, batch, torch.int64),
        "encoder_hidden_states": rows("text", prompt, (TEXT_LEN, TEXT_DIM), batch, dtype),
        "attention_kwargs": None,
        "return_dict": False,
    }


def build_cogvideox() -> nn.Module:
    return CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        time_embed_dim=HIDDEN,
        text_embed_dim=TEXT_DIM,
        num_layers=3,
        sample_height=8,
        sample_width=8,
        sample_frames=5,
        max_text_seq_length=TEXT_LEN,
        use_rotary_positional_embeddings=True,
    )


def cogvideox_inputs(
    timestep: float,
    *,
    seed: int = 0,
    prompt: int = 0,
    size: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    grid = _patched(size)
    return {
        "hidden_states": rows("sample", seed, (FRAMES, CHANNELS, *SIZES[size]), batch, dtype),
        "encoder_hidden_states": rows("text", prompt, (TEXT_LEN, TEXT_DIM), batch, dtype),
        "timestep": expanded(timestep, batch, torch.int64),
        "image_rotary_emb": get_3d_rotary_pos_embed(
            HEAD_DIM, ((0, 0), grid), grid, FRAMES, device=torch.device("cpu")
        ),
        "attention_kwargs": None,
        "return_dict": False,
    }


def build_ltx() -> nn.Module:
    return LTXVideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=HIDDEN,
        num_layers=3,
        caption_channels=TEXT_DIM,
    )


def ltx_inputs(
    timestep: float,
    *,
    seed: int = 0,
    prompt: int = 0,
    size: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    height, width = _patched(size)
    return {
        "hidden_states": rows("sample", seed, (FRAMES * height * width, CHANNELS), batch, dtype),
        "encoder_hidden_states": rows("text", prompt, (TEXT_LEN, TEXT_DIM), batch, dtype),
        "timestep": expanded(timestep, batch),
        "encoder_attention_mask": text_mask(prompt, TEXT_LEN, batch),
        "num_frames": FRAMES,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
        "attention_kwargs": None,
        "return_dict": False,
    }


def build_z_image() -> nn.Module:
    return ZImageTransformer2DModel(
        in_channels=CHANNELS,
        dim=HIDDEN,
        n_layers=3,
        n_refiner_layers=1,
        n_heads=HEADS,
        n_kv_heads=HEADS,
        cap_feat_dim=TEXT_DIM,
        axes_dims=list(ROPE_AXES),
        axes_lens=[256, 32, 32],
    )


def z_image_inputs(
    timestep: float,
    *,
    seed: int = 0,
    prompt: int = 0,
    size: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Captions are ragged: the model itself pads each one to a multiple of 32 tokens."""
    latents = rows("sample", seed, (CHANNELS, 1, *SIZES[size]), batch, dtype)
    lengths = [20 + 16 * ((prompt + row) % 4) for row in range(batch)]
    captions = rows("text", prompt, (20 + 16 * 3, TEXT_DIM), batch, dtype)
    return {
        "x": list(latents.unbind(dim=0)),
        "t": expanded(timestep, batch),
        "cap_feats": [caption[:length] for caption, length in zip(captions, lengths, strict=True)],
        "return_dict": False,
    }


def z_image_timesteps(n: int) -> list[float]:
    """`n` values rising from 0: the pipeline passes `(1000 - t) / 1000`."""
    return [i / n for i in range(n)]


def _patched(size: int) -> tuple[int, int]:
    """The resolution in patches of 2 by 2."""
    height, width = SIZES[size]
    return height // 2, width // 2


CASES: tuple[Case, ...] = (
    Case(
        name="FluxTransformer2DModel",
        build=partial(built, build_flux),
        inputs=flux_inputs,
        timesteps=sigmas,
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        timestep_arg="timestep",
    ),
    Case(
        name="SD3Transformer2DModel",
        build=partial(built, build_sd3),
        inputs=sd3_inputs,
        timesteps=thousand,
        block_lists=("transformer_blocks",),
        timestep_arg="timestep",
    ),
    Case(
        name="DiTTransformer2DModel",
        build=partial(built, build_dit),
        inputs=dit_inputs,
        timesteps=thousand_integers,
        block_lists=("transformer_blocks",),
        timestep_arg="timestep",
    ),
    Case(
        name="PixArtTransformer2DModel",
        build=partial(built, build_pixart),
        inputs=pixart_inputs,
        timesteps=thousand_integers,
        block_lists=("transformer_blocks",),
        timestep_arg="timestep",
    ),
    Case(
        name="QwenImageTransformer2DModel",
        build=partial(built, build_qwen_image),
        inputs=qwen_image_inputs,
        timesteps=sigmas,
        block_lists=("transformer_blocks",),
        timestep_arg="timestep",
    ),
    Case(
        name="HunyuanVideoTransformer3DModel",
        build=partial(built, build_hunyuan_video),
        inputs=hunyuan_video_inputs,
        timesteps=thousand,
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        timestep_arg="timestep",
    ),
    Case(
        name="HunyuanVideo15Transformer3DModel",
        build=partial(built, build_hunyuan_video15),
        inputs=hunyuan_video15_inputs,
        timesteps=thousand,
        block_lists=("transformer_blocks",),
        timestep_arg="timestep",
    ),
    Case(
        name="WanTransformer3DModel",
        build=partial(built, build_wan),
        inputs=wan_inputs,
        timesteps=thousand_integers,
        block_lists=("blocks",),
        timestep_arg="timestep",
    ),
    Case(
        name="CogVideoXTransformer3DModel",
        build=partial(built, build_cogvideox),
        inputs=cogvideox_inputs,
        timesteps=thousand_integers,
        block_lists=("transformer_blocks",),
        timestep_arg="timestep",
    ),
    Case(
        name="LTXVideoTransformer3DModel",
        build=partial(built, build_ltx),
        inputs=ltx_inputs,
        timesteps=thousand,
        block_lists=("transformer_blocks",),
        timestep_arg="timestep",
    ),
    Case(
        name="ZImageTransformer2DModel",
        build=partial(built, build_z_image),
        inputs=z_image_inputs,
        timesteps=z_image_timesteps,
        block_lists=("layers",),
        timestep_arg="t",
    ),
)
