"""FoCa: a BDF2 forecast with Heun's calibration, which equals a straight line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_cache_fx.strategies.taylorcache import TaylorCache


@dataclass(frozen=True, kw_only=True)
class FoCa(TaylorCache):
    """FoCa: a BDF2 forecast, calibrated by Heun's method; together they are a straight line.

    Zheng et al.: Forecast then Calibrate: Feature Caching as ODE for Efficient Diffusion
    Transformers, arXiv:2508.16211, equations 6 to 8.

    From step to step, with h = 1 and F' from the last two computed steps: the forecast `G = 4/3
    F[k] - 1/3 F[k-1] + 2/3 F'[k]`, its slope `F'[k+1] = (3 G - 4 F[k] + F[k-1]) / 2`, and the
    calibration `F[k+1] = F[k] + (F'[computed] + F'[k+1]) / 2`. Substituting the forecast in its
    slope gives `F'[k+1] = F'[k]`: all slopes equal that of the computed step, and the prediction is
    the straight line, TaylorCache of order 1. FoCa runs as that, and has TaylorCache's options.

    Args:
        max_order (`int`, defaults to `1`):
            The highest order of a derivative, as in `TaylorCache`.

    Raises:
        OptionError: An option has a value that cannot work.

    Example:
        >>> cached = dit_cache_fx.apply(model, "foca", schedule="balanced", num_steps=50)
    """

    max_order: int = 1

    name: ClassVar[str] = "foca"
