"""What every test of a pipeline runs under."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
from diffusers.utils import logging

from dit_cache_fx import DitCacheWarning


@pytest.fixture(autouse=True)
def _no_warning_of_ours() -> Iterator[None]:
    """A whole pipeline caches: a warning that something does not is an error.

    The libraries' own warnings about each other are left out.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"(diffusers|peft|transformers|accelerate)\b")
        warnings.simplefilter("error", DitCacheWarning)
        yield


@pytest.fixture(autouse=True)
def _quiet_diffusers() -> Iterator[None]:
    """Without its notes about experimental guiders and ignored arguments."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)
