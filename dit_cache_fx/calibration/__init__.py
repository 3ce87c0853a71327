"""Calibration: find the best plan for a model, its sampler and a number of computed steps."""

from dit_cache_fx.calibration.calibrating import calibrate
from dit_cache_fx.calibration.calibration import Calibration
from dit_cache_fx.calibration.row import Row

__all__ = ["Calibration", "Row", "calibrate"]
