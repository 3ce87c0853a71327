"""Helper classes as published by AngelSlim, over this library: for code that was written for them.

`docs/moving_from_angelslim.md` says what is the same and what is not.
"""

from dit_cache_fx.helpers.base import CacheHelper
from dit_cache_fx.helpers.kinds import DeepCacheHelper, TaylorCacheHelper, TeaCacheHelper

__all__ = ["CacheHelper", "DeepCacheHelper", "TaylorCacheHelper", "TeaCacheHelper"]
