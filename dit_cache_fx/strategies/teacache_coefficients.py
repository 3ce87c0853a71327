"""TeaCache's published coefficients: numbers fitted by their authors, each with its source.

A set fits one trained model, and one value of it: `signal` names the value (see `TeaCache`). So
users choose a set by name, and nothing depends on a model's class.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

_TEACACHE = "https://github.com/ali-vilab/TeaCache/blob/7c10efc4702c6b619f47805f7abe4a7a08085aa0/"
_COMFYUI = (
    "https://github.com/welltop-cn/ComfyUI-TeaCache/blob/91dff8e31684ca70a5fda309611484402d8fa192/"
)
_FLUX = _TEACACHE + "TeaCache4FLUX/teacache_flux.py"
_HUNYUAN = _TEACACHE + "TeaCache4HunyuanVideo/teacache_sample_video.py"
_WAN = _TEACACHE + "TeaCache4Wan2.1/teacache_generate.py"
_COGVIDEOX = _TEACACHE + "TeaCache4CogVideoX1.5/teacache_sample_video.py"
_LTX = _TEACACHE + "TeaCache4LTX-Video/teacache_ltx.py"
_MOCHI = _TEACACHE + "TeaCache4Mochi/teacache_mochi.py"
_LUMINA2 = _TEACACHE + "TeaCache4Lumina2/teacache_lumina2.py"
_LUMINA_NEXT = _TEACACHE + "TeaCache4Lumina-T2X/teacache_lumina_next.py"
_HIDREAM = _TEACACHE + "TeaCache4HiDream-I1/teacache_hidream_i1.py"
_COSMOS = _TEACACHE + "TeaCache4Cosmos/teacache_sample_video_t2v.py"
_COMFYUI_NODES = _COMFYUI + "nodes.py"

#: steps that the sources compute regardless of the rule
_ENDS = "the first and the last step"
_FIRST = "the first step"
_FIRST_FIVE = "the first 5 steps"
_TENTH = "the first tenth of the steps"


@dataclass(frozen=True)
class Coefficients:
    """A published polynomial for TeaCache's rule.

    Args:
        values (`tuple[float, ...]`):
            The coefficients, highest power first.
        signal (`str`):
            The value whose relative change they were fitted to, as in `TeaCache(signal=...)`.
        source (`str`):
            The URL of the code that contains the numbers.
        thresholds (`Mapping[float, float]`, defaults to `{}`):
            The published values of `rel_l1_thresh`, each with the speedup measured at the source.
        always (`str`, defaults to `"the first and the last step"`):
            The steps that the source computes in any case, in words.

    Example:
        >>> flux = dit_cache_fx.TEACACHE_COEFFICIENTS["flux"]
        >>> flux.signal
        'modulated'
        >>> cached = dit_cache_fx.apply(model, "teacache", rel_l1_thresh=0.4, coefficients=flux)
    """

    values: tuple[float, ...]
    signal: str
    source: str
    thresholds: Mapping[float, float] = field(default_factory=dict)
    always: str = _ENDS

    def __post_init__(self) -> None:
        object.__setattr__(self, "thresholds", MappingProxyType(dict(self.thresholds)))


# fmt: off
_SETS = {
    "flux": Coefficients(
        (4.98651651e+02, -2.83781631e+02, 5.58554382e+01, -3.82021401e+00, 2.64230861e-01),
        "modulated", _FLUX, {0.25: 1.5, 0.4: 1.8, 0.6: 2.0, 0.8: 2.25},
    ),
    "hunyuan-video": Coefficients(
        (7.33226126e+02, -4.01131952e+02, 6.75869174e+01, -3.14987800e+00, 9.61237896e-02),
        "modulated", _HUNYUAN, {0.1: 1.6, 0.15: 2.1},
    ),
    "wan2.1-t2v-1.3b": Coefficients(
        (2.39676752e+03, -1.31110545e+03, 2.01331979e+02, -8.29855975e+00, 1.37887774e-01),
        "embedding", _WAN, {0.05: 97 / 64, 0.08: 97 / 49},
    ),
    "wan2.1-t2v-14b": Coefficients(
        (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
        "embedding", _WAN, {0.14: 1829 / 1234, 0.2: 1829 / 909},
    ),
    "wan2.1-i2v-480p": Coefficients(
        (-3.02331670e+02, 2.23948934e+02, -5.25463970e+01, 5.87348440e+00, -2.01973289e-01),
        "embedding", _WAN, {0.13: 385 / 241, 0.26: 385 / 156},
    ),
    "wan2.1-i2v-720p": Coefficients(
        (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
        "embedding", _WAN, {0.2: 903 / 476, 0.3: 903 / 363},
    ),
    "wan2.1-t2v-1.3b-ret-steps": Coefficients(
        (-5.21862437e+04, 9.23041404e+03, -5.28275948e+02, 1.36987616e+01, -4.99875664e-02),
        "conditioning", _WAN, {0.05: 97 / 61, 0.1: 97 / 41}, _FIRST_FIVE,
    ),
    "wan2.1-t2v-14b-ret-steps": Coefficients(
        (-3.03318725e+05, 4.90537029e+04, -2.65530556e+03, 5.87365115e+01, -3.15583525e-01),
        "conditioning", _WAN, {0.1: 1829 / 915, 0.2: 1829 / 578}, _FIRST_FIVE,
    ),
    "wan2.1-i2v-480p-ret-steps": Coefficients(
        (2.57151496e+05, -3.54229917e+04, 1.40286849e+03, -1.35890334e+01, 1.32517977e-01),
        "conditioning", _WAN, {0.2: 385 / 212, 0.3: 385 / 164}, _FIRST_FIVE,
    ),
    "wan2.1-i2v-720p-ret-steps": Coefficients(
        (8.10705460e+03, 2.13393892e+03, -3.72934672e+02, 1.66203073e+01, -4.17769401e-02),
        "conditioning", _WAN, {0.2: 903 / 430, 0.3: 903 / 340}, _FIRST_FIVE,
    ),
    "cogvideox-2b": Coefficients(
        (-3.10658903e+01, 2.54732368e+01, -5.92380459e+00, 1.75769064e+00, -3.61568434e-03),
        "conditioning", _COGVIDEOX,
    ),
    "cogvideox-5b": Coefficients(
        (-1.53880483e+03, 8.43202495e+02, -1.34363087e+02, 7.97131516e+00, -5.23162339e-02),
        "conditioning", _COGVIDEOX,
    ),
    "cogvideox1.5-5b": Coefficients(
        (2.50210439e+02, -1.65061612e+02, 3.57804877e+01, -7.81551492e-01, 3.58559703e-02),
        "conditioning", _COGVIDEOX, {0.1: 1.3, 0.2: 1.8, 0.3: 2.1},
    ),
    "cogvideox1.5-5b-i2v": Coefficients(
        (1.22842302e+02, -1.04088754e+02, 2.62981677e+01, -3.06009921e-01, 3.71213220e-02),
        "conditioning", _COGVIDEOX, {0.1: 1.5, 0.2: 2.2, 0.3: 2.7},
    ),
    "ltx-video": Coefficients(
        (2.14700694e+01, -1.28016453e+01, 2.31279151e+00, 7.92487521e-01, 9.69274326e-03),
        "modulated", _LTX, {0.03: 1.6, 0.05: 2.1},
    ),
    "mochi": Coefficients(
        (-3.51241319e+03, 8.11675948e+02, -6.09400215e+01, 2.42429681e+00, 3.05291719e-03),
        "modulated", _MOCHI, {0.06: 1.5, 0.09: 2.1},
    ),
    "lumina2": Coefficients(
        (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344),
        "modulated", _LUMINA2, {0.2: 1.25, 0.3: 1.5625, 0.4: 2.0833, 0.5: 2.5},
    ),
    "lumina2-v2": Coefficients(
        (225.7042019806413, -608.8453716535591, 304.1869942338369,
         124.21267720116742, -1.4089066892956552),
        "modulated", _LUMINA2, {0.2: 1.5, 0.3: 1.6, 0.5: 1.8, 1.1: 2.1},
    ),
    "lumina-next": Coefficients(
        (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344),
        "modulated", _LUMINA_NEXT, {0.2: 1.5, 0.3: 1.9, 0.4: 2.4, 0.5: 2.8},
    ),
    "hidream-full": Coefficients(
        (-3.13605009e+04, -7.12425503e+02, 4.91363285e+01, 8.26515490e+00, 1.08053901e-01),
        "embedding", _HIDREAM, {0.17: 1.5, 0.25: 1.7, 0.3: 2.0, 0.45: 2.6}, _TENTH,
    ),
    "hidream-dev": Coefficients(
        (1.39997273, -4.30130469, 5.01534416, -2.20504164, 0.93942874),
        "input", _COMFYUI_NODES, {1.0: 2.0}, _FIRST,
    ),
    "hidream-fast": Coefficients(
        (2.26509623, -6.88864563, 7.61123826, -3.10849353, 0.99927602),
        "input", _COMFYUI_NODES, {1.5: 1.7}, "the first step and the last tenth",
    ),
    "cosmos": Coefficients(
        (2.71156237e+02, -9.19775607e+01, 2.24437250e+00, 2.08355751e+00, 1.41776330e-01),
        "modulated", _COSMOS, {0.3: 1.4, 0.4: 2.0},
    ),
}
# fmt: on

#: name -> published coefficients; pass the name to `TeaCache(coefficients=...)`
TEACACHE_COEFFICIENTS: Mapping[str, Coefficients] = MappingProxyType(_SETS)
