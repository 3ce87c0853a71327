"""The scikit-learn digits (1797 pictures of 8x8 pixels), scaled to [-1, 1]."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor


def digits() -> tuple[Tensor, Tensor]:
    """Pictures [1797, 1, 8, 8] in [-1, 1] and labels [1797]."""
    bunch = load_digits()
    pictures = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1
    return pictures, torch.tensor(bunch.target, dtype=torch.long)
