"""Which models of the zoo stand for the others in the default run.

A test over the zoo takes `each_case`, or `each_kind` where it is the one that a strategy rests on:
both have all models with `-m exhaustive`. What depends on the model itself takes `every_case`.
"""

from __future__ import annotations

from collections.abc import Collection

import pytest

from tests.zoo import CASES

#: a model of each kind, and what sets it apart
REPRESENTATIVES = {
    "FluxTransformer2DModel": "two streams, then one of both: two block lists",
    "DiTTransformer2DModel": "one stream; whole timesteps; a label in the place of text",
    "WanTransformer3DModel": "video; text by cross attention, outside of the stream",
    "OfficialHunyuanVideo15": "not of diffusers; video; masks, branches on data, a dict",
}
#: one kind more, whose model takes longer than the others together
KINDS = REPRESENTATIVES | {
    "ZImageTransformer2DModel": "lists of tensors; timesteps that rise; a size for each prompt",
}


def marks_of(
    name: str, usual: bool = True, among: Collection[str] = REPRESENTATIVES
) -> tuple[pytest.MarkDecorator, ...]:
    """The marks of a test of the model with this name; `usual`: whether one of its usual cases."""
    return () if usual and name in among else (pytest.mark.exhaustive,)


def _parametrize(among: Collection[str]) -> pytest.MarkDecorator:
    marked = [pytest.param(c, id=c.name, marks=marks_of(c.name, among=among)) for c in CASES]
    return pytest.mark.parametrize("model_case", marked)


each_case = _parametrize(REPRESENTATIVES)
each_kind = _parametrize(KINDS)
every_case = _parametrize([c.name for c in CASES])
