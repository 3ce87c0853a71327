"""The helper classes of AngelSlim on top of this library, for code that was written for them.

`docs/moving_from_angelslim.md` lists the differences.
"""

from dit_cache_fx.helpers.base import CacheHelper
from dit_cache_fx.helpers.kinds import DeepCacheHelper, TaylorCacheHelper, TeaCacheHelper

__all__ = ["CacheHelper", "DeepCacheHelper", "TaylorCacheHelper", "TeaCacheHelper"]
