"""Every audio transformer of diffusers that denoises.

MiniMaxMusic3RVQDepthDecoder is not here: it decodes codes one after the other, without a timestep.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers import (
    AceStepTransformer1DModel,
    LongCatAudioDiTTransformer,
    MiniMaxMusic3Transformer1DModel,
    StableAudio3DiTModel,
    StableAudioDiTModel,
    T5FilmDecoder,
)

from tests.support.case import SupportCase
from tests.support.image_common import (
    CHANNELS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    POOLED_DIM,
    TEXT_DIM,
    ascending,
    batched,
    case,
    fixed,
    mask,
    noise,
    text,
)
from tests.zoo.case import sigmas

LAYERS = 3
LENGTH = 12
MEMORY_TOKENS = 2


def ace_step_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": noise(seed, LENGTH, CHANNELS),
        "timestep": batched(timestep),
        "timestep_r": batched(timestep),
        "encoder_hidden_states": text(),
        "context_latents": fixed("context", LENGTH, 2 * CHANNELS),
        "attention_kwargs": None,
        "return_dict": False,
    }


def minimax_music3_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": noise(seed, CHANNELS, LENGTH),
        "timestep": batched(timestep),
        "return_dict": False,
        "encoder_hidden_states": text(LENGTH),
    }


def t5_film_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """Encoded notes and the encoded sound before, each with its mask."""
    past = (fixed("past", LENGTH, HIDDEN), torch.ones(1, LENGTH))
    return {
        "encodings_and_masks": [(text(dim=HIDDEN), mask(torch.bool)), past],
        "decoder_input_tokens": noise(seed, LENGTH, CHANNELS),
        "decoder_noise_time": batched(timestep),
    }


def stable_audio_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """The duration is a token before those of the sound."""
    return {
        "hidden_states": noise(seed, CHANNELS, LENGTH),
        "timestep": batched(timestep),
        "encoder_hidden_states": text(),
        "global_hidden_states": fixed("duration", 1, POOLED_DIM),
        "rotary_embedding": get_1d_rotary_pos_embed(
            HEAD_DIM // 2, LENGTH + 1, use_real=True, repeat_interleave_real=False
        ),
        "return_dict": False,
    }


def stable_audio3_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": noise(seed, CHANNELS, LENGTH),
        "timestep": batched(timestep),
        "encoder_hidden_states": text(),
        "global_hidden_states": fixed("duration", POOLED_DIM),
        "encoder_attention_mask": mask(),
        "return_dict": False,
    }


def longcat_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": noise(seed, LENGTH, CHANNELS),
        "encoder_hidden_states": text(),
        "encoder_attention_mask": mask(torch.bool),
        "timestep": batched(timestep),
        "attention_mask": torch.ones(1, LENGTH, dtype=torch.bool),
        "latent_cond": torch.zeros(1, LENGTH, CHANNELS),
    }


AUDIO: tuple[SupportCase, ...] = (
    # Every second block has full attention, the others a sliding window.
    case(
        AceStepTransformer1DModel,
        ace_step_inputs,
        sigmas,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
        in_channels=3 * CHANNELS,
        audio_acoustic_hidden_dim=CHANNELS,
        sliding_window=2,
        encoder_hidden_size=TEXT_DIM,
    ),
    # The timestep is a token: the blocks are given nothing else of it.
    case(
        MiniMaxMusic3Transformer1DModel,
        minimax_music3_inputs,
        ascending,
        in_channels=CHANNELS,
        condition_dim=TEXT_DIM,
        num_layers=LAYERS,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        ff_inner_dim=2 * HIDDEN,
        rotary_dim=HEAD_DIM // 2,
        fourier_embedding_dim=HEAD_DIM,
    ),
    case(
        T5FilmDecoder,
        t5_film_inputs,
        sigmas,
        input_dims=CHANNELS,
        targets_length=LENGTH,
        d_model=HIDDEN,
        num_layers=LAYERS,
        num_heads=HEADS,
        d_kv=HEAD_DIM,
        d_ff=2 * HIDDEN,
    ),
    case(
        StableAudioDiTModel,
        stable_audio_inputs,
        sigmas,
        sample_size=LENGTH,
        in_channels=CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        num_key_value_attention_heads=1,
        out_channels=CHANNELS,
        cross_attention_dim=HEAD_DIM,
        time_proj_dim=HEAD_DIM,
        global_states_input_dim=POOLED_DIM,
        cross_attention_input_dim=TEXT_DIM,
    ),
    case(
        StableAudio3DiTModel,
        stable_audio3_inputs,
        sigmas,
        io_channels=CHANNELS,
        embed_dim=HIDDEN,
        depth=LAYERS,
        num_heads=HEADS,
        cond_token_dim=TEXT_DIM,
        global_cond_dim=POOLED_DIM,
        local_add_cond_dim=CHANNELS + 1,
        timestep_features_dim=HEAD_DIM,
        num_memory_tokens=MEMORY_TOKENS,
    ),
    case(
        LongCatAudioDiTTransformer,
        longcat_inputs,
        sigmas,
        dit_dim=HIDDEN,
        dit_depth=LAYERS,
        dit_heads=HEADS,
        dit_text_dim=TEXT_DIM,
        latent_dim=CHANNELS,
    ),
)
