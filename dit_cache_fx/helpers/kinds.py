"""The published helpers, one class for each strategy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dit_cache_fx.helpers.base import Blocks, CacheHelper, Ids
from dit_cache_fx.helpers.quirks import LateTaylorCache, StoredInputTeaCache
from dit_cache_fx.strategies import Strategy, TaylorCache, TeaCache


class DeepCacheHelper(CacheHelper):
    """DeepCache, with blocks that always run.

    `no_cache_block_id`: "double_blocks" or "single_blocks" -> ids in the given list. The other
    arguments are those of `CacheHelper`.
    """

    def __init__(
        self,
        double_blocks: Blocks | None = None,
        single_blocks: Blocks | None = None,
        no_cache_steps: Iterable[int] | None = None,
        no_cache_block_id: Ids | None = None,
        **more: Any,
    ) -> None:
        super().__init__(double_blocks, single_blocks, no_cache_steps, **more)
        self.no_cache_block_id = no_cache_block_id

    def _never_cached(self) -> Ids | None:
        return self.no_cache_block_id


class TeaCacheHelper(CacheHelper):
    """TeaCache: what the blocks add to their stream is held, and added to this step's stream.

    `cache_name`: the block argument that carries the stream. `stored_input=True` adds it to the
    stream of the step that it was held on, as AngelSlim's helper does: then the last result is
    returned, as with DeepCache. The other arguments are those of `CacheHelper`.
    """

    def __init__(
        self,
        double_blocks: Blocks | None = None,
        single_blocks: Blocks | None = None,
        no_cache_steps: Iterable[int] | None = None,
        cache_name: str = "img",
        *,
        stored_input: bool = False,
        **more: Any,
    ) -> None:
        super().__init__(double_blocks, single_blocks, no_cache_steps, **more)
        self.cache_name = cache_name
        self.stored_input = stored_input

    def _strategy(self, ids: Ids | None) -> Strategy:
        kind = StoredInputTeaCache if self.stored_input else TeaCache
        return kind(
            no_cache_steps=self.no_cache_steps,
            no_cache_block_id=ids,
            cache_name=self.cache_name,
        )


class TaylorCacheHelper(CacheHelper):
    """TaylorCache: results are extrapolated from their last computed values.

    `max_order`, `low_freqs_order`, `high_freqs_order`: as of `TaylorCache`. `skip_first=True`
    leaves the generation's first computed step out of the differences, as AngelSlim's helper does.
    The other arguments are those of `CacheHelper`.
    """

    def __init__(
        self,
        double_blocks: Blocks | None = None,
        single_blocks: Blocks | None = None,
        no_cache_steps: Iterable[int] | None = None,
        max_order: int = 2,
        low_freqs_order: int = 2,
        high_freqs_order: int = 2,
        *,
        skip_first: bool = False,
        **more: Any,
    ) -> None:
        super().__init__(double_blocks, single_blocks, no_cache_steps, **more)
        self.max_order = max_order
        self.low_freqs_order = low_freqs_order
        self.high_freqs_order = high_freqs_order
        self.skip_first = skip_first

    def _strategy(self, ids: Ids | None) -> Strategy:
        kind = LateTaylorCache if self.skip_first else TaylorCache
        return kind(
            no_cache_steps=self.no_cache_steps,
            no_cache_block_id=ids,
            max_order=self.max_order,
            low_freqs_order=self.low_freqs_order,
            high_freqs_order=self.high_freqs_order,
        )
