"""Every video transformer of diffusers that denoises and that the zoo of the other tests lacks.

TransformerTemporalModel is not here: it is a layer of a U-Net, and ignores its `timestep`.
"""

from __future__ import annotations

from tests.support.case import SupportCase
from tests.support.video_joint import JOINT
from tests.support.video_latents import LATENTS
from tests.support.video_packed import PACKED
from tests.support.video_wan import WAN

VIDEO: tuple[SupportCase, ...] = (*LATENTS, *WAN, *JOINT, *PACKED)
