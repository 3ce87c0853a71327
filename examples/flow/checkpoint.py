"""Saving and loading a model: float16 on disk, float32 in memory."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from examples.flow.model import DiT


def save(model: DiT, path: Path) -> None:
    """Write the weights in float16."""
    state = model.state_dict().items()
    save_file({name: value.to("cpu", torch.float16).contiguous() for name, value in state}, path)


def load(model: DiT, path: Path) -> DiT:
    """The model with the weights of a file, in eval mode."""
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval().requires_grad_(False)
