"""A small module for each pipeline."""

from collections.abc import Iterable
from typing import Any

import pytest

from tests.pipelines.families.cogvideox import COGVIDEOX
from tests.pipelines.families.dit import DIT
from tests.pipelines.families.flux import FLUX, FLUX_IMAGE_TO_IMAGE
from tests.pipelines.families.hunyuan_video import HUNYUAN_VIDEO
from tests.pipelines.families.hunyuan_video15 import HUNYUAN_VIDEO15
from tests.pipelines.families.ltx import LTX
from tests.pipelines.families.pixart import PIXART
from tests.pipelines.families.qwen_image import QWEN_IMAGE
from tests.pipelines.families.sd3 import SD3
from tests.pipelines.families.wan import WAN
from tests.pipelines.families.z_image import Z_IMAGE
from tests.pipelines.family import Family
from tests.zoo.representatives import marks_of

#: each pipeline, and the class of its transformer
MODELS: dict[Family, str] = {
    FLUX: "FluxTransformer2DModel",
    FLUX_IMAGE_TO_IMAGE: "FluxTransformer2DModel",
    SD3: "SD3Transformer2DModel",
    QWEN_IMAGE: "QwenImageTransformer2DModel",
    WAN: "WanTransformer3DModel",
    HUNYUAN_VIDEO: "HunyuanVideoTransformer3DModel",
    HUNYUAN_VIDEO15: "HunyuanVideo15Transformer3DModel",
    COGVIDEOX: "CogVideoXTransformer3DModel",
    LTX: "LTXVideoTransformer3DModel",
    PIXART: "PixArtTransformer2DModel",
    DIT: "DiTTransformer2DModel",
    Z_IMAGE: "ZImageTransformer2DModel",
}
FAMILIES = tuple(MODELS)


def marked(families: Iterable[Family] = FAMILIES) -> list[Any]:
    """The families as parameters; one for each of the zoo's representatives runs by default."""
    usual = {model: family for family, model in reversed(MODELS.items())}.values()
    return [pytest.param(f, id=f.name, marks=marks_of(MODELS[f], f in usual)) for f in families]


each_family = pytest.mark.parametrize("family", marked())

__all__ = ["FAMILIES", "FLUX", "QWEN_IMAGE", "SD3", "WAN", "Family", "each_family", "marked"]
