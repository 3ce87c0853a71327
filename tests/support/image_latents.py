"""Transformers whose sample is a grid of latents."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from diffusers.models.transformers import (
    AuraFlowTransformer2DModel,
    BriaFibo2Transformer2DModel,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    DreamLiteTransformer2DModel,
    ErnieImageTransformer2DModel,
    GlmImageTransformer2DModel,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanImageTransformer2DModel,
    JoyImageEditTransformer3DModel,
    Kandinsky6SRTransformer3DModel,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    OmniGenTransformer2DModel,
    PRXTransformer2DModel,
    SanaTransformer2DModel,
    Transformer2DModel,
)
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from diffusers.models.unets.unet_dreamlite import DreamLiteAttnProcessor2_0
from torch import nn

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
    latents,
    mask,
    noise,
    text,
    whole,
)
from tests.zoo.case import built, sigmas, text_mask, thousand, thousand_integers

LAYERS = 3
SECOND_LEN = 6
UNET_CHANNELS = 16
VIDEO_FRAMES = 2
GLM_CACHES = GlmImageKVCache(num_layers=LAYERS)


def aura_flow_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": latents(seed),
        "encoder_hidden_states": text(),
        "timestep": batched(timestep),
        "return_dict": False,
        "attention_kwargs": None,
    }


def hunyuan_dit_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    grid = (GRID, GRID)
    return {
        "hidden_states": latents(seed),
        "timestep": batched(timestep),
        "encoder_hidden_states": text(dim=HIDDEN),
        "text_embedding_mask": mask(),
        "encoder_hidden_states_t5": fixed("t5", SECOND_LEN, HIDDEN),
        "text_embedding_mask_t5": text_mask(0, SECOND_LEN, 1),
        "image_meta_size": torch.tensor([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]]),
        "style": torch.tensor([0]),
        "image_rotary_emb": get_2d_rotary_pos_embed(
            HEAD_DIM, ((0, 0), grid), grid, output_type="pt"
        ),
        "return_dict": False,
    }


def lumina_next_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": latents(seed),
        "timestep": batched(timestep),
        "encoder_hidden_states": text(),
        "encoder_mask": mask(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(HEAD_DIM, SIDE, SIDE),
        "cross_attention_kwargs": {"base_sequence_length": (GRID // 2) ** 2},
        "return_dict": False,
    }


def masked_text_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": latents(seed),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": mask(),
        "timestep": batched(timestep),
        "return_dict": False,
        "attention_kwargs": None,
    }


def unet_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """As a U-Net calls its attentions, and the timestep, which these blocks need (`ada_norm`)."""
    return {
        "hidden_states": noise(seed, UNET_CHANNELS, GRID, GRID),
        "encoder_hidden_states": text(),
        "timestep": whole(timestep),
        "cross_attention_kwargs": None,
        "attention_mask": None,
        "encoder_attention_mask": None,
        "return_dict": False,
    }


def build_dreamlite() -> nn.Module:
    model = DreamLiteTransformer2DModel(**UNET, qk_norm="rms_norm", num_kv_heads=1)
    for module in model.modules():
        if isinstance(module, Attention):
            module.set_processor(DreamLiteAttnProcessor2_0())
    return model


def bria_fibo2_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": latents(seed),
        "timestep": batched(timestep),
        "encoder_hidden_states": fixed("text", 3, TEXT_LEN, TEXT_DIM),
        "encoder_attention_mask": None,
        "context_latents": None,
        "return_dict": False,
    }


def cogview3_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": latents(seed),
        "encoder_hidden_states": text(),
        "timestep": batched(timestep),
        "original_size": torch.tensor([[64.0, 64.0]]),
        "target_size": torch.tensor([[64.0, 64.0]]),
        "crop_coords": torch.zeros(1, 2),
        "return_dict": False,
    }


def cogview4_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {**cogview3_inputs(timestep, seed=seed), "attention_kwargs": None}


def ernie_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": latents(seed),
        "timestep": batched(timestep),
        "text_bth": text(),
        "text_lens": torch.tensor([TEXT_LEN]),
        "return_dict": False,
    }


def glm_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """Text to image: the caches are there, one object for all steps, and stay empty."""
    return {
        "hidden_states": latents(seed),
        "encoder_hidden_states": text(),
        "prior_token_id": torch.arange(GRID * GRID)[None],
        "prior_token_drop": torch.zeros(1, GRID * GRID, dtype=torch.bool),
        "timestep": batched(timestep),
        "target_size": torch.tensor([[64.0, 64.0]]),
        "crop_coords": torch.zeros(1, 2),
        "attention_kwargs": None,
        "return_dict": False,
        "kv_caches": GLM_CACHES,
    }


def glm_timesteps(n: int) -> list[float]:
    return [t - 1 for t in thousand(n)]


def hidream_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    layers = [fixed(f"llama {i}", TEXT_LEN, TEXT_DIM) for i in range(2 * LAYERS)]
    return {
        "hidden_states": latents(seed),
        "timesteps": batched(timestep),
        "encoder_hidden_states_t5": fixed("t5", SECOND_LEN, TEXT_DIM),
        "encoder_hidden_states_llama3": torch.stack(layers),
        "pooled_embeds": fixed("pooled", POOLED_DIM),
        "attention_kwargs": None,
        "return_dict": False,
    }


def hunyuan_image_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": noise(seed, CHANNELS, GRID, GRID),
        "timestep": batched(timestep),
        "timestep_r": None,
        "guidance": None,
        "attention_kwargs": {},
        "return_dict": False,
        "encoder_hidden_states": text(),
        "encoder_attention_mask": mask(),
        "encoder_hidden_states_2": fixed("byt5", SECOND_LEN, POOLED_DIM),
        "encoder_attention_mask_2": text_mask(0, SECOND_LEN, 1),
    }


def joy_edit_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """The reference image, then the sample."""
    item = (1, CHANNELS, 1, SIDE, SIDE)
    return {
        "hidden_states": torch.cat([fixed("reference", *item), noise(seed, *item)], dim=1),
        "timestep": batched(timestep),
        "encoder_hidden_states": text(),
        "return_dict": False,
    }


def kandinsky6_sr_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """The sample, then the anchor and its mask, both zero."""
    sample = noise(seed, VIDEO_FRAMES, SIDE, 2 * SIDE, CHANNELS)
    return {
        "hidden_states": torch.nn.functional.pad(sample, (0, CHANNELS + 1)),
        "timestep": batched(timestep),
        "return_dict": False,
    }


def omnigen_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """The text is causal; the timestep's token and the image see everything."""
    image_len = GRID * GRID
    sequence = TEXT_LEN + 1 + image_len
    attention = torch.ones(1, sequence, sequence)
    attention[:, : TEXT_LEN + 1] = attention[:, : TEXT_LEN + 1].tril()
    return {
        "hidden_states": latents(seed),
        "timestep": batched(timestep),
        "input_ids": 1 + torch.arange(TEXT_LEN)[None],
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": attention,
        "position_ids": torch.arange(sequence)[None],
        "return_dict": False,
    }


def prx_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": latents(seed),
        "timestep": batched(timestep),
        "encoder_hidden_states": text(),
        "attention_mask": mask(torch.bool),
        "return_dict": False,
    }


UNET: dict[str, Any] = {
    "num_attention_heads": HEADS,
    "attention_head_dim": HEAD_DIM,
    "in_channels": UNET_CHANNELS,
    "num_layers": LAYERS,
    "norm_num_groups": 4,
    "cross_attention_dim": TEXT_DIM,
    "norm_type": "ada_norm",
    "num_embeds_ada_norm": 1000,
}
COGVIEW: dict[str, Any] = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": LAYERS,
    "attention_head_dim": HEAD_DIM,
    "num_attention_heads": HEADS,
    "text_embed_dim": TEXT_DIM,
    "time_embed_dim": HIDDEN,
    "condition_dim": HEAD_DIM,
}

LATENTS: tuple[SupportCase, ...] = (
    case(
        AuraFlowTransformer2DModel,
        aura_flow_inputs,
        sigmas,
        sample_size=SIDE,
        in_channels=CHANNELS,
        num_mmdit_layers=LAYERS,
        num_single_dit_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT_DIM,
        caption_projection_dim=HIDDEN,
        out_channels=CHANNELS,
        pos_embed_max_size=GRID * GRID,
    ),
    # Blocks 4 and 5 take the results of blocks 1 and 0.
    case(
        HunyuanDiT2DModel,
        hunyuan_dit_inputs,
        thousand_integers,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=CHANNELS,
        patch_size=2,
        sample_size=SIDE,
        hidden_size=HIDDEN,
        num_layers=6,
        cross_attention_dim=HIDDEN,
        cross_attention_dim_t5=HIDDEN,
        pooled_projection_dim=POOLED_DIM,
        text_len=TEXT_LEN,
        text_len_t5=SECOND_LEN,
    ),
    case(
        LuminaNextDiT2DModel,
        lumina_next_inputs,
        ascending,
        sample_size=SIDE,
        in_channels=CHANNELS,
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=TEXT_DIM,
    ),
    case(
        SanaTransformer2DModel,
        masked_text_inputs,
        thousand_integers,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=LAYERS,
        num_cross_attention_heads=HEADS,
        cross_attention_head_dim=HEAD_DIM,
        cross_attention_dim=HIDDEN,
        caption_channels=TEXT_DIM,
        sample_size=SIDE,
    ),
    case(Transformer2DModel, unet_inputs, thousand_integers, **UNET),
    SupportCase(
        name="DreamLiteTransformer2DModel",
        build=partial(built, build_dreamlite),
        inputs=unet_inputs,
        timesteps=thousand_integers,
    ),
    case(
        BriaFibo2Transformer2DModel,
        bria_fibo2_inputs,
        sigmas,
        in_channels=CHANNELS,
        dim=HIDDEN,
        n_layers=4,
        n_refiner_layers=2,
        n_heads=HEADS,
        cap_feat_dim=TEXT_DIM,
        injection_layer_ids=(1, 3),
        min_num_gist_tokens=4,
        max_num_gist_tokens=8,
        gist_step=2,
        gist_min_text_len=4,
        gist_max_text_len=16,
        axes_dims=ROPE_AXES,
        axes_lens=(16, GRID, GRID),
    ),
    case(
        CogView3PlusTransformer2DModel,
        cogview3_inputs,
        thousand_integers,
        **COGVIEW,
        pos_embed_max_size=GRID,
    ),
    case(
        CogView4Transformer2DModel,
        cogview4_inputs,
        thousand_integers,
        **COGVIEW,
        rope_axes_dim=(GRID, GRID),
    ),
    case(
        ErnieImageTransformer2DModel,
        ernie_inputs,
        thousand,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_layers=LAYERS,
        ffn_hidden_size=2 * HIDDEN,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_in_dim=TEXT_DIM,
        rope_axes_dim=ROPE_AXES,
    ),
    case(
        GlmImageTransformer2DModel,
        glm_inputs,
        glm_timesteps,
        **COGVIEW,
        prior_vq_quantizer_codebook_size=GRID * GRID,
    ),
    case(
        HiDreamImageTransformer2DModel,
        hidream_inputs,
        thousand,
        patch_size=2,
        in_channels=CHANNELS,
        num_layers=LAYERS,
        num_single_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        caption_channels=[TEXT_DIM, TEXT_DIM],
        text_emb_dim=POOLED_DIM,
        axes_dims_rope=ROPE_AXES,
        max_resolution=(SIDE, SIDE),
        llama_layers=list(range(2 * LAYERS)),
    ),
    case(
        HunyuanImageTransformer2DModel,
        hunyuan_image_inputs,
        thousand,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=LAYERS,
        num_single_layers=LAYERS,
        num_refiner_layers=2,
        text_embed_dim=TEXT_DIM,
        text_embed_2_dim=POOLED_DIM,
        rope_axes_dim=(8, 8),
    ),
    case(
        JoyImageEditTransformer3DModel,
        joy_edit_inputs,
        thousand,
        in_channels=CHANNELS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        text_dim=TEXT_DIM,
        num_layers=LAYERS,
        rope_dim_list=list(ROPE_AXES),
    ),
    case(
        Kandinsky6SRTransformer3DModel,
        kandinsky6_sr_inputs,
        thousand,
        in_visual_dim=CHANNELS,
        out_visual_dim=CHANNELS,
        time_dim=HIDDEN,
        model_dim=HIDDEN,
        ff_dim=2 * HIDDEN,
        num_visual_blocks=LAYERS,
        axes_dims=ROPE_AXES,
        nabla_window=(1, 1, 1),
    ),
    case(
        Lumina2Transformer2DModel,
        masked_text_inputs,
        ascending,
        sample_size=SIDE,
        in_channels=CHANNELS,
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        num_refiner_layers=2,
        num_attention_heads=HEADS,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=ROPE_AXES,
        axes_lens=(16, GRID, GRID),
        cap_feat_dim=TEXT_DIM,
    ),
    case(
        OmniGenTransformer2DModel,
        omnigen_inputs,
        ascending,
        in_channels=CHANNELS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=2 * HIDDEN,
        num_layers=LAYERS,
        pad_token_id=0,
        vocab_size=2 * TEXT_LEN,
        rope_scaling={"short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        pos_embed_max_size=SIDE,
    ),
    case(
        PRXTransformer2DModel,
        prx_inputs,
        sigmas,
        in_channels=CHANNELS,
        context_in_dim=TEXT_DIM,
        hidden_size=HIDDEN,
        num_heads=HEADS,
        depth=LAYERS,
        axes_dim=[8, 8],
    ),
)
