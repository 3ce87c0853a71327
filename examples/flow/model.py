"""A small class-conditional DiT for square pictures, in plain torch."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TimestepEmbedder(nn.Module):
    """Sinusoids of the time followed by an MLP: [B] -> [B, D]."""

    freqs: Tensor

    def __init__(self, dim: int, num_freqs: int = 64) -> None:
        super().__init__()
        freqs = 1000.0 * torch.exp(-math.log(10000.0) * torch.arange(num_freqs) / num_freqs)
        self.register_buffer("freqs", freqs, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * num_freqs, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, timestep: Tensor) -> Tensor:
        angles = timestep[:, None] * self.freqs
        out: Tensor = self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))
        return out


class Attention(nn.Module):
    """Multi-head self-attention: [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim))  # [B, N, 3, H, D/H]
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)  # [B, H, N, D/H]
        out: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return out


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale [B, N, D] by per-picture vectors [B, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Transformer block with adaLN-zero conditioning: x [B, N, D], cond [B, D] -> [B, N, D]."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
        )
        six = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(six.weight)
        nn.init.zeros_(six.bias)
        self.modulation = nn.Sequential(nn.SiLU(), six)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(cond).chunk(6, dim=-1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nn.Module):
    """Velocity of the flow at noisy pictures: x [B, C, S, S], timestep [B] in [0, 1], y [B].

    The label `classes` stands for "no label" in classifier-free guidance.
    """

    def __init__(
        self, size: int, channels: int, classes: int, dim: int, depth: int, heads: int, patch: int
    ) -> None:
        super().__init__()
        self.size, self.channels, self.classes, self.patch = size, channels, classes, patch
        self.grid = size // patch
        self.embed = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, self.grid**2, dim))
        self.time = TimestepEmbedder(dim)
        self.label = nn.Embedding(classes + 1, dim)
        self.blocks = nn.ModuleList(DiTBlock(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.head = nn.Linear(dim, channels * patch * patch)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        tokens: Tensor = self.embed(x).flatten(2).transpose(1, 2) + self.position  # [B, N, D]
        cond = self.time(timestep) + self.label(y)  # [B, D]
        for block in self.blocks:
            tokens = block(tokens, cond)
        shift, scale = self.modulation(cond).chunk(2, dim=-1)
        return self.unpatchify(self.head(modulate(self.norm(tokens), shift, scale)))

    def unpatchify(self, patches: Tensor) -> Tensor:
        """[B, N, C * patch * patch] -> [B, C, S, S]."""
        cells: Tensor = patches.unflatten(1, (self.grid, self.grid))
        pixels: Tensor = cells.unflatten(3, (self.channels, self.patch, self.patch))
        return pixels.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
