"""Every image transformer of diffusers that the zoo of the other tests does not have."""

from __future__ import annotations

from tests.support.case import SupportCase
from tests.support.image_latents import LATENTS
from tests.support.image_tokens import TOKENS

IMAGE: tuple[SupportCase, ...] = (*LATENTS, *TOKENS)
