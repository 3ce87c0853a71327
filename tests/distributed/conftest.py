from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

from tests.distributed.pair import Pair


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    """Two processes, for all tests that need them."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("torch is built without torch.distributed, or without gloo")
    two = Pair()
    try:
        two.run(int)
    except OSError as error:
        pytest.skip(str(error))
    yield two
    two.stop()
