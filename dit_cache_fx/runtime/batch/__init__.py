"""Batches: calls whose rows belong to different requests, each at its own step."""

from dit_cache_fx.runtime.batch.batch import Batch

__all__ = ["Batch"]
