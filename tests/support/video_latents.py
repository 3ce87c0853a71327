"""Video transformers whose sample is a grid of latents."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.embeddings import (
    get_3d_rotary_pos_embed,
    get_3d_rotary_pos_embed_allegro,
)
from diffusers.models.transformers import (
    AllegroTransformer3DModel,
    ConsisIDTransformer3DModel,
    CosmosTransformer3DModel,
    EasyAnimateTransformer3DModel,
    HunyuanVideoFramepackTransformer3DModel,
    Kandinsky5Transformer3DModel,
    LatteTransformer3DModel,
    MochiTransformer3DModel,
    MotifVideoTransformer3DModel,
    SanaVideoTransformer3DModel,
    SanaWMTransformer3DModel,
)
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
    batched,
    case,
    fixed,
    mask,
    noise,
    text,
)
from tests.zoo.case import expanded, thousand, thousand_integers

FRAMES = 2
LAYERS = 3
IMAGE_LEN, IMAGE_DIM = 5, 12
ALLEGRO_HEAD_DIM = 24
MOCHI_TEXT_DIM = 16
PLUCKER_CHANNELS = 48
CPU = torch.device("cpu")


def consisid_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    sample = noise(seed, FRAMES, CHANNELS, SIDE, SIDE)
    image = fixed("image", FRAMES, CHANNELS, SIDE, SIDE)
    grid = (GRID, GRID)
    return {
        "hidden_states": torch.cat([sample, image], dim=2),
        "encoder_hidden_states": text(),
        "timestep": expanded(timestep, 1, torch.int64),
        "image_rotary_emb": get_3d_rotary_pos_embed(
            HEAD_DIM, ((0, 0), grid), grid, FRAMES, device=CPU
        ),
        "attention_kwargs": None,
        "return_dict": False,
        "id_vit_hidden": [fixed(f"face {i}", IMAGE_LEN, IMAGE_DIM) for i in range(2)],
        "id_cond": fixed("identity", IMAGE_DIM),
    }


def latte_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": noise(seed, CHANNELS, FRAMES, SIDE, SIDE),
        "encoder_hidden_states": text(),
        "timestep": expanded(timestep, 1, torch.int64),
        "enable_temporal_attentions": True,
        "return_dict": False,
    }


def allegro_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    *frequencies, frame, row, column = get_3d_rotary_pos_embed_allegro(
        ALLEGRO_HEAD_DIM, ((0, 0), (GRID, GRID)), (GRID, GRID), FRAMES, device=CPU
    )
    positions = torch.cartesian_prod(frame.long(), row.long(), column.long()).T[:, None]
    return {
        "hidden_states": noise(seed, CHANNELS, FRAMES, SIDE, SIDE),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": mask(),
        "timestep": batched(timestep),
        "image_rotary_emb": (tuple(frequencies), tuple(positions.contiguous())),
        "return_dict": False,
    }


def cosmos_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": noise(seed, CHANNELS, FRAMES, SIDE, SIDE),
        "timestep": batched(timestep),
        "encoder_hidden_states": text(),
        "fps": 30,
        "padding_mask": torch.zeros(1, 1, 8 * SIDE, 8 * SIDE),
        "return_dict": False,
    }


def cosmos_timesteps(n: int) -> list[float]:
    """A quarter of the logarithm of noise levels from 80: positive, then negative."""
    return [1.1 - 2.6 * i / n for i in range(n)]


def easy_animate_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": noise(seed, CHANNELS, FRAMES, SIDE, SIDE),
        "timestep": batched(timestep),
        "encoder_hidden_states": text(),
        "return_dict": False,
    }


def framepack_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """The image and one frame of history in full, two and four frames of it coarser."""
    image, sample, last, coarse, coarser = torch.arange(1 + FRAMES + 1 + 2 + 4).split(
        [1, FRAMES, 1, 2, 4]
    )
    return {
        "hidden_states": noise(seed, CHANNELS, FRAMES, SIDE, SIDE),
        "timestep": batched(timestep),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": mask(torch.float32),
        "pooled_projections": fixed("pooled", POOLED_DIM),
        "image_embeds": fixed("image", IMAGE_LEN, IMAGE_DIM),
        "indices_latents": sample,
        "guidance": torch.tensor([6000.0]),
        "latents_clean": fixed("clean", CHANNELS, 2, SIDE, SIDE),
        "indices_latents_clean": torch.cat([image, last]),
        "latents_history_2x": fixed("coarse", CHANNELS, 2, SIDE, SIDE),
        "indices_latents_history_2x": coarse,
        "latents_history_4x": fixed("coarser", CHANNELS, 4, SIDE, SIDE),
        "indices_latents_history_4x": coarser,
        "attention_kwargs": None,
        "return_dict": False,
    }


def kandinsky5_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": noise(seed, FRAMES, SIDE, SIDE, CHANNELS),
        "encoder_hidden_states": text(),
        "pooled_projections": fixed("pooled", POOLED_DIM),
        "timestep": torch.tensor([timestep]),
        "visual_rope_pos": [torch.arange(size) for size in (FRAMES, GRID, GRID)],
        "text_rope_pos": torch.arange(TEXT_LEN),
        "scale_factor": (1.0, 2.0, 2.0),
        "sparse_params": None,
        "return_dict": True,
    }


def mochi_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": noise(seed, CHANNELS, FRAMES, SIDE, SIDE),
        "encoder_hidden_states": text(dim=MOCHI_TEXT_DIM),
        "timestep": batched(timestep),
        "encoder_attention_mask": mask(torch.bool),
        "attention_kwargs": None,
        "return_dict": False,
    }


def mochi_timesteps(n: int) -> list[float]:
    """They rise, from 0 for noise."""
    return [1000 * i / n for i in range(n)]


def motif_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """The sample, then the condition and its mask, both zero."""
    sample = noise(seed, CHANNELS, FRAMES, SIDE, SIDE)
    return {
        "hidden_states": torch.cat([sample, torch.zeros_like(sample), sample[:, :1] * 0], dim=1),
        "timestep": batched(timestep),
        "attention_kwargs": None,
        "return_dict": False,
        "encoder_hidden_states": text(),
        "encoder_attention_mask": mask(torch.bool),
    }


def sana_video_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": noise(seed, CHANNELS, FRAMES, SIDE, SIDE),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": mask(),
        "timestep": expanded(timestep, 1, torch.int64),
        "return_dict": False,
        "attention_kwargs": None,
    }


def sana_wm_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """The first frame is the conditioning image: its timestep is 0 in every step."""
    frame = fixed("image", CHANNELS, 1, GRID, GRID)
    return {
        "hidden_states": torch.cat([frame, noise(seed, CHANNELS, FRAMES, GRID, GRID)], dim=2),
        "timestep": torch.tensor([[[0.0] + [timestep] * FRAMES]]),
        "encoder_hidden_states": text()[None],
        "return_dict": False,
        "data_info": {"img_hw": torch.tensor([[8.0 * GRID, 8.0 * GRID]])},
        "mask": mask(),
        "camera_conditions": _camera_path(1 + FRAMES),
        "chunk_plucker": fixed("plucker", PLUCKER_CHANNELS, 1 + FRAMES, GRID, GRID),
    }


def _camera_path(frames: int) -> Tensor:
    """A camera that moves forward: its pose row by row, focal lengths and principal point."""
    poses = torch.eye(4).repeat(frames, 1, 1)
    poses[:, 2, 3] = torch.arange(frames)
    intrinsics = torch.tensor([4.0, 4.0, GRID / 2, GRID / 2]).expand(frames, 4)
    return torch.cat([poses.flatten(1), intrinsics], dim=1)[None]


heads = partial(case, num_attention_heads=HEADS, attention_head_dim=HEAD_DIM)

LATENTS: tuple[SupportCase, ...] = (
    heads(
        ConsisIDTransformer3DModel,
        consisid_inputs,
        thousand_integers,
        in_channels=2 * CHANNELS,
        out_channels=CHANNELS,
        time_embed_dim=HIDDEN,
        text_embed_dim=TEXT_DIM,
        num_layers=4,
        sample_width=SIDE,
        sample_height=SIDE,
        sample_frames=FRAMES,
        max_text_seq_length=TEXT_LEN,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=IMAGE_DIM,
        LFE_vit_dim=IMAGE_DIM,
        LFE_depth=2,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=4,
        LFE_output_dim=2 * HIDDEN // 3,
        LFE_num_scale=2,
    ),
    heads(
        LatteTransformer3DModel,
        latte_inputs,
        thousand_integers,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=LAYERS,
        cross_attention_dim=HIDDEN,
        sample_size=SIDE,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=TEXT_DIM,
        video_length=FRAMES,
    ),
    case(
        AllegroTransformer3DModel,
        allegro_inputs,
        thousand_integers,
        num_attention_heads=HEADS,
        attention_head_dim=ALLEGRO_HEAD_DIM,
        num_layers=LAYERS,
        cross_attention_dim=HEADS * ALLEGRO_HEAD_DIM,
        sample_height=SIDE,
        sample_width=SIDE,
        sample_frames=FRAMES,
        caption_channels=TEXT_DIM,
    ),
    # Resizing `padding_mask` to the latents would need torchvision.
    heads(
        CosmosTransformer3DModel,
        cosmos_inputs,
        cosmos_timesteps,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=LAYERS,
        text_embed_dim=TEXT_DIM,
        adaln_lora_dim=8,
        max_size=(4, SIDE, SIDE),
        concat_padding_mask=False,
    ),
    # The last block has one weight for text and video.
    heads(
        EasyAnimateTransformer3DModel,
        easy_animate_inputs,
        thousand,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        patch_size=2,
        num_layers=LAYERS,
        mmdit_layers=LAYERS - 1,
        time_embed_dim=HIDDEN,
        text_embed_dim=TEXT_DIM,
        add_norm_text_encoder=True,
    ),
    heads(
        HunyuanVideoFramepackTransformer3DModel,
        framepack_inputs,
        thousand,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=LAYERS,
        num_single_layers=LAYERS,
        num_refiner_layers=2,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        rope_axes_dim=ROPE_AXES,
        has_image_proj=True,
        image_proj_dim=IMAGE_DIM,
        has_clean_x_embedder=True,
    ),
    case(
        Kandinsky5Transformer3DModel,
        kandinsky5_inputs,
        thousand,
        in_visual_dim=CHANNELS,
        in_text_dim=TEXT_DIM,
        in_text_dim2=POOLED_DIM,
        time_dim=HIDDEN,
        out_visual_dim=CHANNELS,
        model_dim=HIDDEN,
        ff_dim=2 * HIDDEN,
        num_text_blocks=2,
        num_visual_blocks=LAYERS,
        axes_dims=ROPE_AXES,
    ),
    heads(
        MochiTransformer3DModel,
        mochi_inputs,
        mochi_timesteps,
        num_layers=LAYERS,
        pooled_projection_dim=HIDDEN,
        in_channels=CHANNELS,
        text_embed_dim=MOCHI_TEXT_DIM,
        time_embed_dim=HEAD_DIM,
    ),
    # The last two single blocks decode: they start again from the embedded sample.
    heads(
        MotifVideoTransformer3DModel,
        motif_inputs,
        thousand,
        in_channels=2 * CHANNELS + 1,
        out_channels=CHANNELS,
        num_layers=LAYERS,
        num_single_layers=4,
        num_decoder_layers=2,
        text_embed_dim=TEXT_DIM,
        rope_axes_dim=ROPE_AXES,
        enable_text_cross_attention_dual=True,
        enable_text_cross_attention_single=True,
    ),
    heads(
        SanaVideoTransformer3DModel,
        sana_video_inputs,
        thousand_integers,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=LAYERS,
        num_cross_attention_heads=HEADS,
        cross_attention_head_dim=HEAD_DIM,
        cross_attention_dim=HIDDEN,
        caption_channels=TEXT_DIM,
        sample_size=SIDE,
        rope_max_seq_len=32,
    ),
    # Every second block has softmax attention, the others linear attention.
    case(
        SanaWMTransformer3DModel,
        sana_wm_inputs,
        thousand,
        in_channels=CHANNELS,
        num_layers=4,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        softmax_every_n=2,
        linear_head_dim=HEAD_DIM,
        chunk_plucker_channels=PLUCKER_CHANNELS,
        caption_channels=TEXT_DIM,
    ),
)
