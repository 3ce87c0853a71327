"""A tiny model of our own in the form of the official HunyuanVideo-1.5 transformer.

Only the form matters: how blocks are called, what they return, how text tokens are merged.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.case import Case, built, expanded, rows, text_mask, thousand

HIDDEN, HEADS = 32, 2
HEAD_DIM = HIDDEN // HEADS
ROPE_AXES = (4, 6, 6)
CHANNELS, FRAMES = 4, 2
TEXT_LEN, TEXT_DIM, POOLED_DIM = 8, 12, 10
BYT5_LEN, BYT5_DIM = 6, 10
VISION_LEN, VISION_DIM = 4, 14
PATCH = (1, 2, 2)
SIZES = ((8, 8), (8, 12))

Rotary = tuple[Tensor, Tensor]


class TimestepEmbedder(nn.Module):
    """Sinusoidal embedding of a scalar per sample, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(64, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN))

    def forward(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10000) * torch.arange(32, device=t.device) / 32)
        angles = t[:, None].float() * frequencies[None]
        embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(embedding.to(self.mlp[0].weight.dtype))


class Modulation(nn.Module):
    """`count` vectors of shape `[batch, 1, HIDDEN]` from the conditioning vector."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(HIDDEN, count * HIDDEN)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(vec)).unsqueeze(1).chunk(self.count, dim=-1)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, (HIDDEN,)) * (1 + scale) + shift


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(HIDDEN, 2 * HIDDEN), nn.GELU("tanh"), nn.Linear(2 * HIDDEN, HIDDEN)
    )


def rotated(x: Tensor, freqs_cis: Rotary) -> Tensor:
    """Rotate `[batch, tokens, heads, dim]` by position, in float32."""
    cos, sin = (each[None, :, None] for each in freqs_cis)
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
    return (x.float() * cos + turned * sin).to(x.dtype)


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Attention over `[batch, tokens, heads, dim]`; `mask` is True for the keys to attend to."""
    query, key, value = (each.transpose(1, 2) for each in (query, key, value))
    mask = None if mask is None else mask[:, None, None]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


class Projections(nn.Module):
    """Query, key and value of one stream, with RMS-normed query and key."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.q_norm = nn.RMSNorm(HEAD_DIM)
        self.k_norm = nn.RMSNorm(HEAD_DIM)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.qkv(x).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        return self.q_norm(query), self.k_norm(key), value


class Stream(nn.Module):
    """The weights of one stream of a double block."""

    def __init__(self) -> None:
        super().__init__()
        self.mod = Modulation(6)
        self.projections = Projections()
        self.proj = nn.Linear(HIDDEN, HIDDEN)
        self.mlp = mlp()


class DoubleBlock(nn.Module):
    """Joint attention of two streams, each with its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.img = Stream()
        self.txt = Stream()

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, freqs_cis: Rotary, text_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        img_mod, txt_mod = self.img.mod(vec), self.txt.mod(vec)
        img_q, img_k, img_v = self.img.projections(modulated(img, *img_mod[:2]))
        txt_q, txt_k, txt_v = self.txt.projections(modulated(txt, *txt_mod[:2]))
        out = attention(
            torch.cat([rotated(img_q, freqs_cis), txt_q], dim=1),
            torch.cat([rotated(img_k, freqs_cis), txt_k], dim=1),
            torch.cat([img_v, txt_v], dim=1),
            joint_mask(img.shape[1], text_mask),
        )
        img_out, txt_out = out[:, : img.shape[1]], out[:, img.shape[1] :]
        return (
            self._finish(self.img, img, img_out, img_mod),
            self._finish(self.txt, txt, txt_out, txt_mod),
        )

    def _finish(self, stream: Stream, x: Tensor, out: Tensor, mod: tuple[Tensor, ...]) -> Tensor:
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = mod
        x = x + gate * stream.proj(out)
        return x + mlp_gate * stream.mlp(modulated(x, mlp_shift, mlp_scale))


class SingleBlock(nn.Module):
    """Attention and MLP in parallel on the joined sequence, image tokens first."""

    def __init__(self) -> None:
        super().__init__()
        self.mod = Modulation(3)
        self.projections = Projections()
        self.proj = nn.Linear(HIDDEN, HIDDEN)
        self.mlp = mlp()

    def forward(
        self, x: Tensor, vec: Tensor, txt_len: int, freqs_cis: Rotary, text_mask: Tensor
    ) -> Tensor:
        shift, scale, gate = self.mod(vec)
        normed = modulated(x, shift, scale)
        img_len = x.shape[1] - txt_len
        query, key, value = self.projections(normed)
        query, key = (
            torch.cat([rotated(each[:, :img_len], freqs_cis), each[:, img_len:]], dim=1)
            for each in (query, key)
        )
        out = attention(query, key, value, joint_mask(img_len, text_mask))
        return x + gate * (self.proj(out) + self.mlp(normed))


def joint_mask(img_len: int, text_mask: Tensor) -> Tensor:
    """All image tokens and the valid text tokens."""
    return F.pad(text_mask.bool(), (img_len, 0), value=True)


class RefinerBlock(nn.Module):
    """Self-attention over the text, gated by the conditioning."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(HIDDEN)
        self.projections = Projections()
        self.proj = nn.Linear(HIDDEN, HIDDEN)
        self.norm2 = nn.LayerNorm(HIDDEN)
        self.mlp = mlp()
        self.mod = Modulation(2)

    def forward(self, x: Tensor, c: Tensor, mask: Tensor) -> Tensor:
        gate, mlp_gate = self.mod(c)
        x = x + gate * self.proj(attention(*self.projections(self.norm1(x)), mask))
        return x + mlp_gate * self.mlp(self.norm2(x))


class TextRefiner(nn.Module):
    """Text embedding that depends on the timestep: its blocks are not trunk blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(TEXT_DIM, HIDDEN)
        self.t_embedder = TimestepEmbedder()
        self.c_embedder = nn.Linear(TEXT_DIM, HIDDEN)
        self.blocks = nn.ModuleList([RefinerBlock() for _ in range(2)])

    def forward(self, x: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        weights = mask.to(x.dtype).unsqueeze(-1)
        pooled = (x * weights).sum(dim=1) / weights.sum(dim=1)
        c = self.t_embedder(t) + self.c_embedder(pooled)
        x = self.input_embedder(x)
        for block in self.blocks:
            x = block(x, c, mask.bool())
        return x


class Projector(nn.Module):
    """Normed two-layer mapping of another encoder's states into the text stream."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class FinalLayer(nn.Module):
    """Modulated norm, then a linear map from tokens to patches."""

    def __init__(self) -> None:
        super().__init__()
        self.mod = Modulation(2)
        self.linear = nn.Linear(HIDDEN, math.prod(PATCH) * CHANNELS)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        return self.linear(modulated(x, *self.mod(vec)))


class OfficialHunyuanVideo15(nn.Module):
    """Double blocks called by keyword, optional single blocks on the joined sequence."""

    def __init__(self, num_double: int = 3, num_single: int = 2) -> None:
        super().__init__()
        self.img_in = nn.Conv3d(2 * CHANNELS + 1, HIDDEN, kernel_size=PATCH, stride=PATCH)
        self.time_in = TimestepEmbedder()
        self.time_r_in = TimestepEmbedder()
        self.guidance_in = TimestepEmbedder()
        self.vector_in = Projector(POOLED_DIM)
        self.txt_in = TextRefiner()
        self.byt5_in = Projector(BYT5_DIM)
        self.vision_in = Projector(VISION_DIM)
        self.cond_type_embedding = nn.Embedding(3, HIDDEN)
        self.double_blocks = nn.ModuleList([DoubleBlock() for _ in range(num_double)])
        self.single_blocks = nn.ModuleList([SingleBlock() for _ in range(num_single)])
        self.final_layer = FinalLayer()

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        text_states: Tensor,
        text_states_2: Tensor | None,
        encoder_attention_mask: Tensor,
        timestep_r: Tensor | None = None,
        vision_states: Tensor | None = None,
        output_features: bool = False,
        mask_type: str = "t2v",
        guidance: Tensor | None = None,
        freqs_cos: Tensor | None = None,
        freqs_sin: Tensor | None = None,
        return_dict: bool = False,
        extra_kwargs: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor] | None] | dict[str, Tensor]:
        frames, height, width = hidden_states.shape[2:]
        grid = (frames // PATCH[0], height // PATCH[1], width // PATCH[2])
        if freqs_cos is None or freqs_sin is None:
            freqs_cos, freqs_sin = rotary(grid, hidden_states.device)
        freqs_cis = (freqs_cos, freqs_sin)

        img = self.img_in(hidden_states).flatten(2).transpose(1, 2)
        vec = self._conditioning(timestep, timestep_r, text_states_2, guidance)

        text_mask = encoder_attention_mask
        txt = self._typed(self.txt_in(text_states, timestep, text_mask), 0)
        if extra_kwargs is not None:
            byt5 = self._typed(self.byt5_in(extra_kwargs["byt5_text_states"]), 1)
            txt, text_mask = reordered(byt5, extra_kwargs["byt5_text_mask"], txt, text_mask)
        if vision_states is not None:
            vision, vision_mask = self._vision(vision_states, text_mask, mask_type)
            txt, text_mask = reordered(vision, vision_mask, txt, text_mask)

        img_len, txt_len = img.shape[1], txt.shape[1]
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, freqs_cis=freqs_cis, text_mask=text_mask)

        x = torch.cat((img, txt), 1)
        features: list[Tensor] | None = [] if output_features else None
        if len(self.single_blocks) > 0:
            for single_block in self.single_blocks:
                x = single_block(x, vec, txt_len=txt_len, freqs_cis=freqs_cis, text_mask=text_mask)
                if features is not None:
                    features.append(x[:, :img_len, ...])
        img = x[:, :img_len, ...]

        img = unpatchified(self.final_layer(img, vec), grid)
        if return_dict:
            return {"x": img}
        return (img, features)

    def _conditioning(
        self,
        timestep: Tensor,
        timestep_r: Tensor | None,
        text_states_2: Tensor | None,
        guidance: Tensor | None,
    ) -> Tensor:
        vec = self.time_in(timestep)
        if text_states_2 is not None:
            vec = vec + self.vector_in(text_states_2)
        if guidance is not None:
            vec = vec + self.guidance_in(guidance)
        if timestep_r is not None:
            vec = vec + self.time_r_in(timestep_r)
        return vec

    def _typed(self, tokens: Tensor, kind: int) -> Tensor:
        """Mark tokens with the kind of encoder that they come from."""
        index = torch.full_like(tokens[:, :, 0], kind, dtype=torch.long)
        return tokens + self.cond_type_embedding(index)

    def _vision(
        self, vision_states: Tensor, text_mask: Tensor, mask_type: str
    ) -> tuple[Tensor, Tensor]:
        """Vision tokens and their mask, which is empty where there is no image."""
        vision = self.vision_in(vision_states)
        if mask_type == "t2v" and torch.all(vision_states == 0):
            vision = vision * 0.0
            mask = text_mask.new_zeros(vision.shape[:2])
        else:
            mask = text_mask.new_ones(vision.shape[:2])
        return self._typed(vision, 2), mask


def reordered(
    extra: Tensor, extra_mask: Tensor, text: Tensor, text_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """Join two token sets per sample: valid tokens first (extra, text), then the padding."""
    extra_mask, text_mask = extra_mask.bool(), text_mask.bool()
    tokens, masks = [], []
    for i in range(text.shape[0]):
        m1, m2 = text_mask[i], extra_mask[i]
        tokens.append(torch.cat([extra[i][m2], text[i][m1], extra[i][~m2], text[i][~m1]]))
        masks.append(torch.cat([m2[m2], m1[m1], m2[~m2], m1[~m1]]))
    return torch.stack(tokens), torch.stack(masks)


def rotary(grid: tuple[int, int, int], device: torch.device) -> Rotary:
    """Cosines and sines `[tokens, HEAD_DIM]` of the three axes, side by side."""
    axes = [torch.arange(length, device=device, dtype=torch.float32) for length in grid]
    positions = torch.meshgrid(*axes, indexing="ij")
    angles = []
    for dim, position in zip(ROPE_AXES, positions, strict=True):
        frequencies = 256.0 ** -(torch.arange(0, dim, 2, device=device) / dim)
        angles.append(position.reshape(-1, 1) * frequencies)
    joined = torch.cat(angles, dim=1).repeat_interleave(2, dim=1)
    return joined.cos(), joined.sin()


def unpatchified(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Tokens `[batch, tokens, patch]` to latents `[batch, channels, frames, height, width]`."""
    x = x.reshape(x.shape[0], *grid, CHANNELS, *PATCH)
    x = torch.einsum("nthwcopq->nctohpwq", x)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def official_inputs(
    timestep: float,
    *,
    seed: int = 0,
    prompt: int = 0,
    size: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Prompts 0 and 1 are text-to-video (zero vision states), 2 and above image-to-video."""
    latents = rows("sample", seed, (CHANNELS, FRAMES, *SIZES[size]), batch, dtype)
    no_condition = latents.new_zeros(batch, CHANNELS + 1, *latents.shape[2:])
    vision = rows("image", prompt, (VISION_LEN, VISION_DIM), batch, dtype)
    has_image = prompt >= 2
    return {
        "hidden_states": torch.cat([latents, no_condition], dim=1),
        "timestep": expanded(timestep, batch, dtype),
        "text_states": rows("text", prompt, (TEXT_LEN, TEXT_DIM), batch, dtype),
        "text_states_2": None,
        "encoder_attention_mask": text_mask(prompt, TEXT_LEN, batch),
        "timestep_r": None,
        "vision_states": vision if has_image else torch.zeros_like(vision),
        "mask_type": "i2v" if has_image else "t2v",
        "guidance": None,
        "return_dict": False,
        "extra_kwargs": {
            "byt5_text_states": rows("byt5", prompt, (BYT5_LEN, BYT5_DIM), batch, dtype),
            "byt5_text_mask": text_mask(prompt, BYT5_LEN, batch),
        },
    }


CASES: tuple[Case, ...] = (
    Case(
        name="OfficialHunyuanVideo15",
        build=partial(built, partial(OfficialHunyuanVideo15, num_single=0)),
        inputs=official_inputs,
        timesteps=thousand,
        block_lists=("double_blocks",),
        timestep_arg="timestep",
    ),
    Case(
        name="OfficialHunyuanVideo15Single",
        build=partial(built, partial(OfficialHunyuanVideo15, num_single=2)),
        inputs=official_inputs,
        timesteps=thousand,
        block_lists=("double_blocks", "single_blocks"),
        timestep_arg="timestep",
    ),
)
