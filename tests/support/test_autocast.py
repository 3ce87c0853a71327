"""Each class of the support table under autocast.

Computed steps are bitwise those of the model, and the others are reused.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.case import SupportCase
from tests.support.checks import Fault, autocast
from tests.support.classes import SUPPORT

#: one stream; two; layers that turn autocast off; values read out of masks; two samples, whose
#: results have another dtype than they; blocks that autocast themselves; mixed lists
SOME = (
    "DiTTransformer2DModel",
    "FluxTransformer2DModel",
    "WanTransformer3DModel",
    "HunyuanVideo15Transformer3DModel",
    "Kandinsky6Transformer3DModel",
    "MochiTransformer3DModel",
    "SanaTransformer2DModel",
)
#: what these raise under autocast without a cache
FAILING = {"Cosmos3OmniTransformer": r"scatter\(\): Expected self.dtype to be equal to src.dtype"}

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:diffusers"),
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning"),
]


def chosen() -> list[Any]:
    return [
        pytest.param(c, id=c.name, marks=() if c.name in SOME else pytest.mark.exhaustive)
        for c in SUPPORT
    ]


@pytest.mark.parametrize("case", chosen())
def test_a_class_under_autocast(case: SupportCase) -> None:
    with torch.no_grad():
        if case.name in FAILING:
            with pytest.raises(Fault, match=FAILING[case.name]):
                autocast(case)
            return
        autocast(case)
