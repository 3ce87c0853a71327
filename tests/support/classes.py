"""Every transformer class that diffusers exports: with a case, or with the reason for none."""

from __future__ import annotations

import inspect

from diffusers.models import transformers
from torch import nn

from tests.support.audio import AUDIO
from tests.support.case import SupportCase
from tests.support.image import IMAGE
from tests.support.video import VIDEO
from tests.zoo.diffusers_models import CASES

ZOO = tuple(SupportCase(c.name, c.build, c.inputs, c.timesteps) for c in CASES)
SUPPORT: tuple[SupportCase, ...] = tuple(
    sorted((*ZOO, *IMAGE, *VIDEO, *AUDIO), key=lambda c: c.name)
)

#: classes that no sampler calls step by step, each with what it is instead
OUTSIDE = {
    "DualTransformer2DModel": "a layer of a UNet that calls two `Transformer2DModel`s",
    "MiniMaxMusic3RVQDepthDecoder": "decodes codes one by one; it has no timestep",
    "TransformerTemporalModel": "a layer of a UNet; it does not read its timestep",
}


def exported() -> set[str]:
    """The names of all model classes in `diffusers.models.transformers`."""
    members = vars(transformers) | {name: getattr(transformers, name) for name in dir(transformers)}
    return {n for n, c in members.items() if inspect.isclass(c) and issubclass(c, nn.Module)}
