"""Transformers whose sample comes with much that says what each token is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers.models.transformers import Cosmos3OmniTransformer, RFD4ProteinaTransformer

from tests.support.case import SupportCase
from tests.support.image_common import (
    CHANNELS,
    GRID,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    SIDE,
    TEXT_LEN,
    ascending,
    batched,
    case,
    noise,
)
from tests.zoo.case import expanded, rows, text_mask, thousand_integers

FRAMES = 2
FRAME_LEN = GRID * GRID
RESIDUES = 10
LATENT_DIM = 4


def cosmos3_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """Text to video: the tokens of the text, then those of the video, all of them noisy."""
    video_len = FRAMES * FRAME_LEN
    frame, row, column = map(torch.arange, (FRAMES, GRID, GRID))
    positions = [
        torch.arange(TEXT_LEN).expand(3, -1),
        torch.cartesian_prod(TEXT_LEN + frame, row, column).T,
    ]
    return {
        "input_ids": 1 + torch.arange(TEXT_LEN),
        "text_indexes": torch.arange(TEXT_LEN),
        "position_ids": torch.cat(positions, dim=1),
        "und_len": TEXT_LEN,
        "sequence_length": TEXT_LEN + video_len,
        "vision_tokens": [noise(seed, CHANNELS, FRAMES, SIDE, SIDE)],
        "vision_token_shapes": [(FRAMES, GRID, GRID)],
        "vision_sequence_indexes": TEXT_LEN + torch.arange(video_len),
        "vision_mse_loss_indexes": TEXT_LEN + torch.arange(video_len),
        "vision_timesteps": expanded(timestep, video_len, torch.int64),
        "vision_noisy_frame_indexes": [torch.arange(FRAMES)],
        "sound_tokens": None,
        "sound_token_shapes": None,
        "sound_sequence_indexes": None,
        "sound_mse_loss_indexes": None,
        "sound_timesteps": None,
        "sound_noisy_frame_indexes": None,
        "action_tokens": None,
        "action_token_shapes": None,
        "action_sequence_indexes": None,
        "action_mse_loss_indexes": None,
        "action_timesteps": None,
        "action_noisy_frame_indexes": None,
        "action_domain_ids": None,
        "return_dict": False,
    }


def proteina_inputs(timestep: float, *, seed: int = 0) -> dict[str, Any]:
    """A protein with one residue of padding; its blocks run twice in a step (`recycle_depth`).

    The sample is the backbone and the latents, each with its own schedule.
    """
    residues = torch.arange(RESIDUES)
    bonds = (residues[:, None] - residues[None]).abs() == 1
    return {
        "bb_ca": noise(seed, RESIDUES, 3),
        "local_latents": rows("latents", seed, (RESIDUES, LATENT_DIM), 1, torch.float32),
        "bb_ca_time": batched(timestep),
        "local_latents_time": batched(timestep**2),
        "padding_mask": text_mask(0, RESIDUES, 1, torch.bool),
        "token_type": torch.zeros(1, RESIDUES, dtype=torch.int64),
        "atom37_mask": torch.ones(1, RESIDUES, 37, dtype=torch.bool),
        "conditioning": {
            "bond_mask": bonds[None],
            "token_bond_path_length": (residues[:, None] - residues[None]).abs()[None],
            "is_in_context_conditioning": torch.zeros(1, RESIDUES, dtype=torch.bool),
            "supports_local_latent": torch.ones(1, RESIDUES, dtype=torch.bool),
        },
        "recycle_depth": 2,
        "attention_kwargs": None,
    }


PACKED: tuple[SupportCase, ...] = (
    case(
        Cosmos3OmniTransformer,
        cosmos3_inputs,
        thousand_integers,
        head_dim=HEAD_DIM,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        latent_channel=CHANNELS,
        num_attention_heads=HEADS,
        num_hidden_layers=3,
        num_key_value_heads=1,
        patch_latent_dim=4 * CHANNELS,
        vocab_size=2 * TEXT_LEN,
        rope_axes_dim=(4, 2, 2),
    ),
    # Every second block is followed by an update of the pairs. The sample's parts have timesteps of
    # their own.
    replace(
        case(
            RFD4ProteinaTransformer,
            proteina_inputs,
            ascending,
            nlayers=4,
            token_dim=HIDDEN,
            nheads=HEADS,
            dim_cond=HEAD_DIM,
            pair_repr_dim=HEAD_DIM,
            latent_dim=LATENT_DIM,
            token_type_emb_dim=4,
            cath_emb_dim=4,
            t_emb_dim=HEAD_DIM,
            seq_sep_dim=8,
            xt_pair_dist_dim=6,
            feats_seq=("xt_bb_ca", "xt_local_latents", "token_type"),
            feats_pair_repr=("xt_bb_ca_pair_dists", "bond_mask", "token_bond_path_length"),
            tri_mult_c=8,
            num_sequence_classes=12,
        ),
        timestep="bb_ca_time",
    ),
)
