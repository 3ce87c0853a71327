"""Wan2.2: two experts of one run, the second from the boundary on."""

from __future__ import annotations

from diffusers import WanPipeline

from tests.pipelines.families.wan import WAN, arguments
from tests.pipelines.families.wan import build as build_wan21
from tests.pipelines.family import Family, quiet, scale
from tests.zoo.case import built
from tests.zoo.diffusers_models import build_wan


def build(boundary: float = 0.8) -> WanPipeline:
    parts = build_wan21().components
    parts["transformer_2"] = built(build_wan, seed=2)
    return quiet(WanPipeline(**parts, boundary_ratio=boundary))


WAN22 = Family("Wan2.2", build, arguments, scale("guidance_scale"), WAN.blocks, passes=2)
