"""A small module for each pipeline."""

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

FAMILIES: tuple[Family, ...] = (
    FLUX,
    FLUX_IMAGE_TO_IMAGE,
    SD3,
    QWEN_IMAGE,
    WAN,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO15,
    COGVIDEOX,
    LTX,
    PIXART,
    DIT,
    Z_IMAGE,
)

__all__ = ["FAMILIES", "FLUX", "QWEN_IMAGE", "SD3", "WAN", "Family"]
