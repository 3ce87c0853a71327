"""Graph passes over a captured model, and the manager that runs them in order."""

from dit_cache_fx.passes.manager import PASSES, run_passes

__all__ = ["PASSES", "run_passes"]
