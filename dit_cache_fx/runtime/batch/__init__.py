"""A batch: calls whose rows belong to different requests, which are at steps of their own."""

from dit_cache_fx.runtime.batch.batch import Batch

__all__ = ["Batch"]
