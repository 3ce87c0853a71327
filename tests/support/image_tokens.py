"""Transformers whose sample is packed into tokens before the call."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.transformers import (
    BriaFiboTransformer2DModel,
    BriaTransformer2DModel,
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    Ideogram4Transformer2DModel,
    JoyImageEditPlusTransformer3DModel,
    Krea2Transformer2DModel,
    LongCatImageTransformer2DModel,
    NucleusMoEImageTransformer2DModel,
    OvisImageTransformer2DModel,
    PriorTransformer,
    QwenImage21Transformer2DModel,
)
from diffusers.models.transformers.transformer_ideogram4 import (
    IMAGE_POSITION_OFFSET,
    LLM_TOKEN_INDICATOR,
    OUTPUT_IMAGE_INDICATOR,
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
    TEXT_DIM,
    TEXT_LEN,
    ascending,
    batched,
    case,
    diagonal_ids,
    fixed,
    grid_ids,
    mask,
    noise,
    text,
    tokens,
    whole,
)
from tests.zoo.case import sigmas, thousand, thousand_integers

IMAGE_LEN = GRID * GRID
LAYERS = 3

two_stream = partial(
    case,
    in_channels=4 * CHANNELS,
    num_layers=LAYERS,
    num_single_layers=LAYERS,
    attention_head_dim=HEAD_DIM,
    num_attention_heads=HEADS,
    joint_attention_dim=TEXT_DIM,
)
"""A case of a model with Flux's block lists."""


def bria_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": tokens(seed),
        "timestep": batched(timestep),
        "encoder_hidden_states": text(),
        "attention_kwargs": None,
        "return_dict": False,
        "txt_ids": torch.zeros(TEXT_LEN, 3),
        "img_ids": grid_ids(),
    }


def bria_fibo_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": tokens(seed),
        "timestep": batched(timestep),
        "encoder_hidden_states": text(),
        "text_encoder_layers": [fixed(f"layer {i}", TEXT_LEN, TEXT_DIM) for i in range(2 * LAYERS)],
        "joint_attention_kwargs": {"attention_mask": _joint_mask(torch.bool)[:, None, None, :]},
        "return_dict": False,
        "txt_ids": torch.zeros(TEXT_LEN, 3),
        "img_ids": grid_ids(),
    }


def chroma_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": tokens(seed),
        "timestep": batched(timestep),
        "encoder_hidden_states": text(),
        "txt_ids": torch.zeros(TEXT_LEN, 3),
        "img_ids": grid_ids(),
        "attention_mask": _joint_mask(torch.float32),
        "joint_attention_kwargs": {},
        "return_dict": False,
    }


def flux2_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": tokens(seed),
        "timestep": batched(timestep),
        "guidance": torch.full([1], 4.0).expand(1),
        "encoder_hidden_states": text(),
        "txt_ids": _text_ids4()[None],
        "img_ids": _grid_ids4()[None],
        "joint_attention_kwargs": None,
        "return_dict": False,
    }


def flux3_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """Image to image: one reference image, of the size of the sample."""
    return {
        "hidden_states": tokens(seed),
        "timestep": batched(timestep),
        "return_dict": False,
        "img_ids": _scaled_ids4(reference=0),
        "image_cond_hidden_states": fixed("reference", IMAGE_LEN, 4 * CHANNELS),
        "image_cond_ids": _scaled_ids4(reference=1),
        "encoder_hidden_states": text(),
        "txt_ids": _text_ids4().float(),
    }


def longcat_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": tokens(seed),
        "timestep": batched(timestep),
        "guidance": None,
        "encoder_hidden_states": text(),
        "txt_ids": diagonal_ids(TEXT_LEN),
        "img_ids": grid_ids(plane=1, start=TEXT_LEN),
        "return_dict": False,
    }


def ovis_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": tokens(seed),
        "timestep": batched(timestep),
        "encoder_hidden_states": text(),
        "txt_ids": diagonal_ids(TEXT_LEN),
        "img_ids": grid_ids(),
        "joint_attention_kwargs": {},
        "return_dict": False,
    }


def ideogram4_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """Padding, text and image in one sequence: the sample and the text are zero elsewhere."""
    valid, sequence = TEXT_LEN - 2, TEXT_LEN + IMAGE_LEN
    start = TEXT_LEN - valid
    position = torch.zeros(1, sequence, 3, dtype=torch.int64)
    position[0, start:TEXT_LEN] = torch.arange(valid)[:, None]
    position[0, TEXT_LEN:] = grid_ids().long() + IMAGE_POSITION_OFFSET
    segment = torch.full((1, sequence), -1)
    segment[:, start:] = 1
    indicator = torch.zeros(1, sequence, dtype=torch.int64)
    indicator[:, start:TEXT_LEN] = LLM_TOKEN_INDICATOR
    indicator[:, TEXT_LEN:] = OUTPUT_IMAGE_INDICATOR
    return {
        "hidden_states": torch.cat([torch.zeros(1, TEXT_LEN, 4 * CHANNELS), tokens(seed)], dim=1),
        "timestep": batched(timestep),
        "encoder_hidden_states": torch.cat([text(), torch.zeros(1, IMAGE_LEN, TEXT_DIM)], dim=1),
        "position_ids": position,
        "segment_ids": segment,
        "indicator": indicator,
        "attention_kwargs": None,
        "return_dict": False,
    }


def krea2_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": tokens(seed),
        "encoder_hidden_states": fixed("text", TEXT_LEN, LAYERS, HIDDEN),
        "timestep": batched(timestep),
        "position_ids": torch.cat([torch.zeros(TEXT_LEN, 3), grid_ids()]),
        "encoder_attention_mask": mask(torch.bool),
        "attention_kwargs": None,
        "return_dict": False,
    }


def nucleus_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": tokens(seed),
        "timestep": batched(timestep),
        "encoder_hidden_states": text(),
        "encoder_hidden_states_mask": mask(),
        "img_shapes": [(1, GRID, GRID)],
        "attention_kwargs": {},
        "return_dict": False,
    }


def qwen_image21_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """The pipeline's `use_kv_cache=False`: its default fills a cache object in the first step."""
    is_image = torch.arange(TEXT_LEN + IMAGE_LEN // 4) >= TEXT_LEN
    return {
        "hidden_states": tokens(seed),
        "timestep": batched(timestep),
        "encoder_hidden_states": text(),
        "encoder_hidden_states_mask": None,
        "img_shapes": [[(1, GRID, GRID)]],
        "img_mask": is_image[None],
        "attention_kwargs": {},
        "kv_cache": None,
        "kv_cache_mode": None,
        "return_dict": False,
    }


def joy_edit_plus_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """The patches of the sample, then those of one reference image."""
    patches = (IMAGE_LEN, CHANNELS, 1, 2, 2)
    return {
        "hidden_states": torch.cat([noise(seed, *patches), fixed("reference", *patches)], dim=1),
        "timestep": batched(timestep),
        "encoder_hidden_states": text(),
        "encoder_hidden_states_mask": mask(),
        "shape_list": [[(1, GRID, GRID), (1, GRID, GRID)]],
        "return_dict": False,
    }


def prior_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": noise(seed, TEXT_DIM),
        "timestep": whole(timestep),
        "proj_embedding": fixed("pooled", TEXT_DIM),
        "encoder_hidden_states": text(),
        "attention_mask": mask(torch.bool),
    }


def _joint_mask(dtype: torch.dtype) -> Tensor:
    return torch.cat([mask(dtype), torch.ones(1, IMAGE_LEN, dtype=dtype)], dim=1)


def _text_ids4() -> Tensor:
    return torch.cartesian_prod(*map(torch.arange, (1, 1, 1, TEXT_LEN)))


def _grid_ids4() -> Tensor:
    return torch.cartesian_prod(*map(torch.arange, (1, GRID, GRID, 1)))


def _scaled_ids4(reference: int) -> Tensor:
    """Rows and columns in halves; reference image `i` lies at `-i` of the last axis."""
    return _grid_ids4() * torch.tensor([1, 0.5, 0.5, 1]) - torch.tensor([0, 0, 0, reference])


TOKENS: tuple[SupportCase, ...] = (
    two_stream(BriaTransformer2DModel, bria_inputs, thousand, axes_dims_rope=list(ROPE_AXES)),
    two_stream(
        BriaFiboTransformer2DModel,
        bria_fibo_inputs,
        thousand,
        axes_dims_rope=list(ROPE_AXES),
        text_encoder_dim=TEXT_DIM,
    ),
    two_stream(
        ChromaTransformer2DModel,
        chroma_inputs,
        sigmas,
        axes_dims_rope=ROPE_AXES,
        approximator_hidden_dim=HIDDEN,
        approximator_layers=2,
    ),
    two_stream(Flux2Transformer2DModel, flux2_inputs, sigmas, axes_dims_rope=(4, 4, 4, 4)),
    two_stream(
        Flux3Transformer2DModel,
        flux3_inputs,
        sigmas,
        cond_in_channels=4 * CHANNELS,
        axes_dims_rope=(4, 4, 4, 4),
    ),
    two_stream(
        LongCatImageTransformer2DModel, longcat_inputs, sigmas, axes_dims_rope=list(ROPE_AXES)
    ),
    two_stream(
        OvisImageTransformer2DModel,
        ovis_inputs,
        sigmas,
        out_channels=4 * CHANNELS,
        axes_dims_rope=ROPE_AXES,
    ),
    case(
        Ideogram4Transformer2DModel,
        ideogram4_inputs,
        ascending,
        in_channels=4 * CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        intermediate_size=2 * HIDDEN,
        adaln_dim=HIDDEN,
        llm_features_dim=TEXT_DIM,
        mrope_section=(3, 3, 2),
    ),
    case(
        Krea2Transformer2DModel,
        krea2_inputs,
        sigmas,
        in_channels=4 * CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        intermediate_size=2 * HIDDEN,
        timestep_embed_dim=HIDDEN,
        text_hidden_dim=HIDDEN,
        num_text_layers=LAYERS,
        text_num_attention_heads=HEADS,
        text_num_key_value_heads=HEADS,
        text_intermediate_size=2 * HIDDEN,
        axes_dims_rope=ROPE_AXES,
    ),
    # Three dense blocks, two with experts, one dense.
    case(
        NucleusMoEImageTransformer2DModel,
        nucleus_inputs,
        sigmas,
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=6,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=ROPE_AXES,
        mlp_ratio=8.0,
        num_experts=4,
        moe_intermediate_dim=2 * HIDDEN,
        capacity_factors=2.0,
    ),
    case(
        QwenImage21Transformer2DModel,
        qwen_image21_inputs,
        sigmas,
        in_channels=4 * CHANNELS,
        out_channels=4 * CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        context_in_dim=TEXT_DIM,
        axes_dims_rope=ROPE_AXES,
    ),
    case(
        JoyImageEditPlusTransformer3DModel,
        joy_edit_plus_inputs,
        thousand,
        in_channels=CHANNELS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        text_dim=TEXT_DIM,
        num_layers=LAYERS,
        rope_dim_list=list(ROPE_AXES),
    ),
    case(
        PriorTransformer,
        prior_inputs,
        thousand_integers,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=LAYERS,
        embedding_dim=TEXT_DIM,
        num_embeddings=TEXT_LEN,
    ),
)
