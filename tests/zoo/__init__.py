"""Tiny Diffusion Transformers with redrawn weights, one `Case` per model."""

from tests.zoo import diffusers_models, official_hunyuan
from tests.zoo.case import Case, flat

__all__ = ["CASES", "Case", "case", "flat"]

CASES: tuple[Case, ...] = diffusers_models.CASES + official_hunyuan.CASES


def case(name: str) -> Case:
    """The case of that name."""
    return next(each for each in CASES if each.name == name)
