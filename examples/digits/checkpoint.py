"""Saving and loading the digits model: float16 on disk, float32 in memory."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from examples.digits.model import DigitsDiT

CHECKPOINT = Path(__file__).with_name("digits_dit.safetensors")


def save(state: dict[str, Tensor], path: Path = CHECKPOINT) -> None:
    """Write the weights in float16."""
    save_file({name: value.to(torch.float16).contiguous() for name, value in state.items()}, path)


def load(path: Path = CHECKPOINT) -> DigitsDiT:
    """The trained model in float32 and eval mode."""
    model = DigitsDiT()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval().requires_grad_(False)
