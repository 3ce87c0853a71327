"""The models that are measured: real architectures of diffusers, random weights.

Each `Shape` also says what must still run on a step whose blocks are all cached, as a module
written by hand: the embedding of the timestep, the output layer, and reading the cache. Compiled,
it is the least that a reused step can take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inputs = dict[str, Any]

#: by the width of a head: how it is divided among the three axes of the rotary embedding
ROTARY_AXES = {16: (4, 6, 6), 64: (8, 28, 28), 128: (16, 56, 56)}


@dataclass(frozen=True)
class Place:
    """Where a model lives."""

    device: str
    dtype: torch.dtype

    def draw(self, seed: int, *shape: int) -> Tensor:
        """A normal draw; the same for every process on this kind of device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Shape:
    """A model to measure.

    `sample`: shape of the noisy sample. `condition(place)`: the arguments that stay the same
    through a generation. `rest(model)`: a module called with what the cache holds (of shape
    `held`) and the arguments named in `rest_reads`. `output_layer`: the model's last layer.
    `pairs`: a block returns two streams, not one.
    """

    title: str
    model: Callable[[], nn.Module]
    sample: tuple[int, ...]
    condition: Callable[[Place], Inputs]
    block_lists: tuple[str, ...]
    output_layer: str
    rest: Callable[[nn.Module], nn.Module]
    rest_reads: tuple[str, ...]
    held: tuple[int, ...]
    first_timestep: float
    integer_timesteps: bool = False
    pairs: bool = True

    def build(self, place: Place) -> nn.Module:
        """The model, for inference, its weights drawn from a fixed seed."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(place.dtype)
        try:
            with torch.device(place.device):
                model = self.model()
        finally:
            torch.set_default_dtype(before)
        redraw(model, torch.Generator(place.device).manual_seed(0))
        return model.eval().requires_grad_(False)

    def generation(self, place: Place, steps: int) -> list[Inputs]:
        """The arguments of each step: the sample moves evenly from one draw to another.

        The conditioning tensors are new in each generation, as of another prompt.
        """
        condition = self.condition(place)
        start, end = (place.draw(seed, *self.sample) for seed in (1, 2))
        return [
            {
                "hidden_states": torch.lerp(start, end, i / steps),
                "timestep": self._timestep(i / steps, place),
                **condition,
                "return_dict": False,
            }
            for i in range(steps)
        ]

    def _timestep(self, done: float, place: Place) -> Tensor:
        value = self.first_timestep * (1 - done)
        dtype = torch.int64 if self.integer_timesteps else place.dtype
        batch = self.sample[0]
        return torch.full((batch,), value, dtype=dtype, device=place.device)

    def lists(self, model: nn.Module) -> list[nn.ModuleList]:
        """The model's block lists, in call order."""
        return [model.get_submodule(name) for name in self.block_lists]  # type: ignore[misc]


@torch.no_grad()
def redraw(model: nn.Module, generator: torch.Generator) -> None:
    """Redraw every parameter, so that each block matters: some start as zeros."""
    for name, parameter in model.named_parameters():
        parameter.normal_(generator=generator)
        if parameter.ndim > 1:
            parameter.mul_(parameter[0].numel() ** -0.5)
        else:
            parameter.mul_(0.1).add_(0 if "bias" in name else 1)


# --- FLUX ------------------------------------------------------------------------------------


class FluxRest(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm, self.out = model.time_text_embed, model.norm_out, model.proj_out

    def forward(self, held: Tensor, timestep: Tensor, guidance: Tensor, pooled: Tensor) -> Tensor:
        embedding = self.embed(timestep * 1000, guidance * 1000, pooled)
        return self.out(self.norm(held, embedding))


def flux(
    double: int, single: int, heads: int, head_dim: int, side: int, text: int, text_dim: int
) -> Shape:
    """`side` x `side` image tokens and `text` text tokens."""
    from diffusers import FluxTransformer2DModel

    config = {
        "num_layers": double,
        "num_single_layers": single,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "joint_attention_dim": text_dim,
        "guidance_embeds": True,
        "axes_dims_rope": ROTARY_AXES[head_dim],
    }

    def condition(place: Place) -> Inputs:
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
        return {
            "encoder_hidden_states": place.draw(3, 1, text, text_dim),
            "pooled_projections": place.draw(4, 1, 768),
            "guidance": torch.full((1,), 4.0, device=place.device, dtype=place.dtype),
            "img_ids": ids.to(place.device, place.dtype),
            "txt_ids": torch.zeros(text, 3, device=place.device, dtype=place.dtype),
        }

    return Shape(
        title=f"FLUX-shaped: {double}+{single} blocks, width {heads * head_dim}, "
        f"{side * side}+{text} tokens",
        model=partial(FluxTransformer2DModel, **config),
        sample=(1, side * side, 64),
        condition=condition,
        block_lists=("transformer_blocks", "single_transformer_blocks"),
        output_layer="proj_out",
        rest=FluxRest,
        rest_reads=("timestep", "guidance", "pooled_projections"),
        held=(1, side * side, heads * head_dim),
        first_timestep=1.0,
    )


# --- HunyuanVideo-1.5 ------------------------------------------------------------------------


class HunyuanRest(nn.Module):
    def __init__(self, model: nn.Module, grid: tuple[int, int, int]) -> None:
        super().__init__()
        self.embed, self.norm, self.out = model.time_embed, model.norm_out, model.proj_out
        self.grid = grid

    def forward(self, held: Tensor, timestep: Tensor) -> Tensor:
        tokens = self.out(self.norm(held, self.embed(timestep)))
        return tokens.unflatten(1, self.grid).permute(0, 4, 1, 2, 3).contiguous()


def hunyuan(
    layers: int, heads: int, head_dim: int, grid: tuple[int, int, int], text: int, text_dim: int
) -> Shape:
    """`grid`: frames, height and width in latents, one token each."""
    from diffusers import HunyuanVideo15Transformer3DModel

    config = {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "text_embed_dim": text_dim,
        "rope_axes_dim": ROTARY_AXES[head_dim],
    }
    byt5, vision = text // 2, text // 4
    tokens = grid[0] * grid[1] * grid[2]

    def condition(place: Place) -> Inputs:
        return {
            "encoder_hidden_states": place.draw(3, 1, text, text_dim),
            "encoder_attention_mask": _mask(text, place),
            "encoder_hidden_states_2": place.draw(4, 1, byt5, 1472),
            "encoder_attention_mask_2": _mask(byt5, place),
            "image_embeds": torch.zeros(1, vision, 1152, device=place.device, dtype=place.dtype),
        }

    return Shape(
        title=f"HunyuanVideo-1.5-shaped: {layers} blocks, width {heads * head_dim}, "
        f"{tokens}+{text + byt5 + vision} tokens",
        model=partial(HunyuanVideo15Transformer3DModel, **config),
        sample=(1, 65, *grid),
        condition=condition,
        block_lists=("transformer_blocks",),
        output_layer="proj_out",
        rest=partial(HunyuanRest, grid=grid),
        rest_reads=("timestep",),
        held=(1, tokens, heads * head_dim),
        first_timestep=1000.0,
    )


def _mask(length: int, place: Place) -> Tensor:
    """A mask whose last quarter is padding."""
    return (torch.arange(length, device=place.device) < length * 3 // 4).long()[None]


# --- DiT -------------------------------------------------------------------------------------


class DiTRest(nn.Module):
    def __init__(self, model: nn.Module, side: int) -> None:
        super().__init__()
        self.embed = model.transformer_blocks[0].norm1.emb
        self.shift_scale, self.norm, self.out = model.proj_out_1, model.norm_out, model.proj_out_2
        self.side = side

    def forward(self, held: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        embedding = self.embed(timestep, class_labels, hidden_dtype=held.dtype)
        shift, scale = self.shift_scale(F.silu(embedding)).chunk(2, dim=1)
        tokens = self.out(self.norm(held) * (1 + scale[:, None]) + shift[:, None])
        patches = tokens.unflatten(1, (self.side, self.side)).unflatten(-1, (2, 2, -1))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def dit(layers: int, heads: int, head_dim: int, side: int, batch: int) -> Shape:
    """`side` x `side` tokens, each of 2 x 2 latents."""
    from diffusers import DiTTransformer2DModel

    config = {
        "num_layers": layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "sample_size": 2 * side,
    }

    def condition(place: Place) -> Inputs:
        return {"class_labels": torch.arange(batch, device=place.device)}

    return Shape(
        title=f"DiT-XL/2-shaped: {layers} blocks, width {heads * head_dim}, {side * side} tokens, "
        f"batch {batch}",
        model=partial(DiTTransformer2DModel, **config),
        sample=(batch, 4, 2 * side, 2 * side),
        condition=condition,
        block_lists=("transformer_blocks",),
        output_layer="proj_out_2",
        rest=partial(DiTRest, side=side),
        rest_reads=("timestep", "class_labels"),
        held=(batch, side * side, heads * head_dim),
        first_timestep=999.0,
        integer_timesteps=True,
        pairs=False,
    )


#: by size: "cpu" takes about 100 ms a step on two cores, "cuda" is the real one where it fits
SHAPES: dict[str, dict[str, Callable[[], Shape]]] = {
    "flux": {
        "tiny": partial(flux, 1, 1, 2, 16, 4, 8, 32),
        "cpu": partial(flux, 4, 8, 6, 64, 16, 64, 768),
        "cuda": partial(flux, 19, 38, 24, 128, 64, 512, 4096),
    },
    "hunyuan": {
        "tiny": partial(hunyuan, 3, 2, 16, (1, 4, 4), 8, 32),
        "cpu": partial(hunyuan, 8, 6, 64, (4, 8, 8), 64, 768),
        "cuda": partial(hunyuan, 54, 16, 128, (9, 30, 40), 256, 3584),
    },
    "dit": {
        "tiny": partial(dit, 2, 2, 16, 4, 1),
        "cpu": partial(dit, 10, 6, 64, 16, 1),
        "cuda": partial(dit, 28, 16, 72, 16, 1),
    },
    "dit8": {"cuda": partial(dit, 28, 16, 72, 16, 8)},
    # for the time that compiling takes: many blocks, little to compute
    "flux24": {
        "tiny": partial(flux, 2, 2, 2, 16, 4, 8, 32),
        "cpu": partial(flux, 8, 16, 4, 64, 8, 32, 128),
        "cuda": partial(flux, 8, 16, 12, 128, 32, 256, 768),
    },
}


def shape(name: str, size: str) -> Shape:
    """The shape of that name, as big as `size` says: "tiny", "cpu" or "cuda"."""
    return SHAPES[name][size]()
