"""`CacheHelper`: the base class of the helpers, which adds caching to an existing model object."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from dit_cache_fx.api import apply
from dit_cache_fx.cached_model import CachedModel
from dit_cache_fx.errors import OptionError
from dit_cache_fx.forward_patch import InstalledForward, installed_on
from dit_cache_fx.helpers.places import checked_ids, given_blocks, model_with, places
from dit_cache_fx.strategies import DeepCache, Strategy

Blocks = Iterable[nn.Module]
Ids = Mapping[str, Iterable[int]]


class CacheHelper:
    """Caches the given blocks of a model, with DeepCache; base class of the other helpers.

    While it is enabled, the model's `forward` is that of a cached model, so code that holds the
    model needs no change. Set `cur_timestep` to the step's index before each step, and call
    `clear_states()` before each generation.

    `enable()` checks all arguments. Attributes of these names that change later take effect at the
    next `enable()` or `clear_states()`.

    Args:
        double_blocks (`Iterable[nn.Module]`, *optional*):
            The blocks to cache: a module list of the model, or a list of its members.
        single_blocks (`Iterable[nn.Module]`, *optional*):
            More blocks to cache, of a second list.
        no_cache_steps (`Iterable[int]`, *optional*):
            The indices of the steps to compute in full, counted from 0 in each generation. Required
            by `enable()`.
        model (`nn.Module`, *optional*):
            The model that is called. When None, the only module of the process whose module lists
            hold the blocks.
        timestep (`str`, *optional*):
            The name of forward's timestep argument. When None, it is determined from the arguments.

    Example:
        >>> helper = CacheHelper(model.blocks, no_cache_steps=range(0, 50, 2))
        >>> helper.enable()
        >>> helper.cur_timestep = 0
        >>> noise = model(sample, timestep, prompt)
        >>> helper.disable()
    """

    def __init__(
        self,
        double_blocks: Blocks | None = None,
        single_blocks: Blocks | None = None,
        no_cache_steps: Iterable[int] | None = None,
        *,
        model: nn.Module | None = None,
        timestep: str | None = None,
    ) -> None:
        self.double_blocks = [] if double_blocks is None else _kept(double_blocks)
        self.single_blocks = [] if single_blocks is None else _kept(single_blocks)
        self.no_cache_steps = _kept(no_cache_steps)
        self.model = model
        self.timestep = timestep
        self._step = 0
        self._options: Strategy | None = None  # of the cached model
        self._cached: CachedModel | None = None
        self._installed: InstalledForward | None = None

    # --- what a kind of helper says ------------------------------------------------------------

    def _strategy(self, ids: Ids | None) -> Strategy:
        """Return the strategy, with `ids` as its `no_cache_block_id`."""
        return DeepCache(no_cache_steps=self.no_cache_steps, no_cache_block_id=ids)

    def _never_cached(self) -> Ids | None:
        """Return list ("double_blocks", "single_blocks") -> ids in it that always run."""
        return None

    # --- life cycle ----------------------------------------------------------------------------

    def enable(self) -> None:
        """Cache from the model's next call on; nothing is held yet.

        Raises:
            OptionError: An argument has a value that cannot work, or another helper is enabled on
                the model.
            DiscoveryError: The timestep argument cannot be determined.
        """
        self.disable()
        given = given_blocks(double_blocks=self.double_blocks, single_blocks=self.single_blocks)
        model = model_with(given) if self.model is None else _checked(self.model)
        self._options = self._strategy(self._never_cached())
        never = checked_ids(given, self._options.no_cache_block_id or {})
        lists, ids = places(model, given, never)
        _free(model)
        self._cached = apply(model, self._strategy(ids), blocks=lists, timestep=self.timestep)
        self._installed = InstalledForward(self._cached, self)
        self.cur_timestep = 0

    def disable(self) -> None:
        """Restore the model exactly, and free the cached tensors."""
        if self._installed is not None:
            self._installed.remove()
        self._installed = self._cached = None
        self._step = 0

    def clear_states(self) -> None:
        """Forget the cached tensors and start at step 0; keep the graphs."""
        if self._cached is not None and self._strategy(self._never_cached()) != self._options:
            self.enable()
        if self._cached is not None:
            self._cached.clear_states()
        self.cur_timestep = 0

    def reset_states(self) -> None:
        """Forget everything, including graphs, and start at step 0."""
        if self._cached is not None:
            self._cached.reset_states()
        self.cur_timestep = 0

    @property
    def cur_timestep(self) -> int:
        """The index of the current step, from 0; several calls with the same one are its branches.

        Raises:
            OptionError: The new value is no integer from 0.
        """
        return self._step

    @cur_timestep.setter
    def cur_timestep(self, step: int) -> None:
        try:
            index = operator.index(step)
        except TypeError:
            index = -1
        if index < 0 or isinstance(step, bool):
            raise OptionError("cur_timestep", step, "a step index: an integer from 0")
        self._step = index
        if self._cached is not None:
            self._cached.cur_timestep = index

    @property
    def cached(self) -> CachedModel | None:
        """The cached model behind `forward`, for its `cache_report()`; None while not enabled."""
        return self._cached

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the enabled state: a copy must not share the model's forward with this one."""
        nothing = {"_installed": None, "_cached": None, "_options": None, "_step": 0}
        return {**vars(self), **nothing}


def _kept(value: Any) -> Any:
    """Return an iterator's items, to be read several times; any other value as it is."""
    return list(value) if isinstance(value, Iterator) else value


def _checked(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise OptionError("model", model, "an nn.Module")
    if isinstance(model, CachedModel):
        raise OptionError(
            "model", type(model).__name__, "the model itself: this one is cached already"
        )
    compiled: nn.Module = getattr(model, "_orig_mod", model)
    return compiled


def _free(model: nn.Module) -> None:
    """Check that no other helper is enabled; remove the patch of one that no longer exists."""
    installed = installed_on(model)
    if installed is None:
        return
    if installed.owned:
        raise OptionError(
            "model", type(model).__name__, "another helper is enabled on it: disable() that first"
        )
    installed.remove()
