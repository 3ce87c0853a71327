"""From a program that went through the passes to something that runs."""

from dit_cache_fx.lowering.eager import lower_eager

__all__ = ["lower_eager"]
