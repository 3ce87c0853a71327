"""The strategies by name."""

from __future__ import annotations

from typing import Any

from dit_cache_fx.errors import OptionError
from dit_cache_fx.strategies.base import Strategy
from dit_cache_fx.strategies.deepcache import DeepCache
from dit_cache_fx.strategies.easycache import EasyCache
from dit_cache_fx.strategies.exponential import Exponential
from dit_cache_fx.strategies.firstblockcache import FirstBlockCache
from dit_cache_fx.strategies.foca import FoCa
from dit_cache_fx.strategies.hicache import HiCache
from dit_cache_fx.strategies.magcache import MagCache
from dit_cache_fx.strategies.newton import NewtonCache
from dit_cache_fx.strategies.options import options_of
from dit_cache_fx.strategies.taylorcache import TaylorCache
from dit_cache_fx.strategies.teacache import TeaCache

KINDS: tuple[type[Strategy], ...] = (
    DeepCache,
    TeaCache,
    TaylorCache,
    NewtonCache,
    HiCache,
    FoCa,
    Exponential,
    FirstBlockCache,
    MagCache,
    EasyCache,
)
#: with cache-dit's name for one of them
BY_NAME: dict[str, type[Strategy]] = {s.name: s for s in KINDS} | {"dbcache": FirstBlockCache}


def make_strategy(strategy: str | Strategy, options: dict[str, Any]) -> Strategy:
    """Return a strategy object from a name and options, or the object itself.

    Raises `OptionError` for an unknown name or option, or a value that cannot work.
    """
    if isinstance(strategy, Strategy):
        if options:
            raise OptionError(
                "strategy",
                strategy,
                f"an object has its options already; got {sorted(options)}: set them on the object",
            )
        return strategy
    kind = BY_NAME.get(strategy) if isinstance(strategy, str) else None
    if kind is None:
        raise OptionError("strategy", strategy, f"one of {sorted(BY_NAME)}, or a Strategy object")
    for name, value in options.items():
        if name not in options_of(kind):
            raise OptionError(
                name, value, f"{strategy} has no such option; it has {options_of(kind)}"
            )
    return kind(**options)
