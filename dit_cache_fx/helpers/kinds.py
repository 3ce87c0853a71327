"""The helpers of AngelSlim, one class for each strategy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dit_cache_fx.helpers.base import Blocks, CacheHelper, Ids
from dit_cache_fx.helpers.quirks import LateTaylorCache, StoredInputTeaCache
from dit_cache_fx.strategies import Strategy, TaylorCache, TeaCache


class DeepCacheHelper(CacheHelper):
    """DeepCache, with blocks that always run.

    Args:
        no_cache_block_id (`Mapping[str, Iterable[int]]`, *optional*):
            The blocks that run on every step: "double_blocks" or "single_blocks" -> indices in the
            list that was passed under this name.
        more (`Any`):
            `model` and `timestep`, as in `CacheHelper`.

    Example:
        >>> never = {"double_blocks": [2]}
        >>> steps = dit_cache_fx.interval_schedule(50, 11, 45, 4)
        >>> helper = DeepCacheHelper(model.blocks, no_cache_steps=steps, no_cache_block_id=never)
        >>> helper.enable()
        >>> helper.disable()
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
    """TeaCache: a reused step adds the residual of the blocks to this step's stream.

    Args:
        cache_name (`str`, defaults to `"img"`):
            The block argument that carries the stream.
        stored_input (`bool`, defaults to `False`):
            Add the residual to the input of the step that it comes from, as AngelSlim's helper
            does. That returns the last result, like DeepCache.
        more (`Any`):
            `model` and `timestep`, as in `CacheHelper`.

    Example:
        >>> helper = TeaCacheHelper(model.blocks, no_cache_steps=range(0, 50, 2), cache_name="h")
        >>> helper.enable()
        >>> helper.disable()
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
    """TaylorCache: extrapolate results from their last computed values.

    Args:
        max_order (`int`, defaults to `2`):
            The highest order of a derivative, as in `TaylorCache`.
        low_freqs_order (`int`, defaults to `2`):
            The order for the low frequencies over the tokens, as in `TaylorCache`.
        high_freqs_order (`int`, defaults to `2`):
            The order for the high frequencies, as in `TaylorCache`.
        skip_first (`bool`, defaults to `False`):
            Leave the generation's first computed step out of the differences, as AngelSlim's helper
            does.
        more (`Any`):
            `model` and `timestep`, as in `CacheHelper`.

    Example:
        >>> helper = TaylorCacheHelper(model.blocks, no_cache_steps=range(0, 50, 2), max_order=1)
        >>> helper.enable()
        >>> helper.disable()
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
