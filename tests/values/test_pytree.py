"""Skeletons: what two calls have to share beside their tensors."""

from __future__ import annotations

from typing import Any

import pytest

from dit_cache_fx.values.pytree import flatten


@pytest.mark.parametrize(("one", "other"), [(1, True), (1, 1.0), (0.0, False), (0, None)])
def test_equal_numbers_of_two_types_are_two_values(one: Any, other: Any) -> None:
    """A model may ask for the type: `if scale is True`."""
    assert flatten({"scale": one})[1] == flatten({"scale": one})[1]
    assert flatten({"scale": one})[1] != flatten({"scale": other})[1]
