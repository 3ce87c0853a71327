"""Step caching for Diffusion Transformers as a compiler pass."""

from dit_cache_fx.api import apply, restore
from dit_cache_fx.cached_model import CachedModel
from dit_cache_fx.calibration import Calibration, calibrate
from dit_cache_fx.dynamo import Backend, backend
from dit_cache_fx.errors import (
    CaptureError,
    DiscoveryError,
    DitCacheError,
    DitCacheWarning,
    MissingPackageError,
    OptionError,
    VerifyError,
)
from dit_cache_fx.export import Exported, Runner, export, load
from dit_cache_fx.report.cache_report import CacheReport, CaptureReport
from dit_cache_fx.report.explain import Explanation
from dit_cache_fx.runtime.batch import Batch
from dit_cache_fx.runtime.step_record import StepRecord
from dit_cache_fx.runtime.tracking.session import Session
from dit_cache_fx.strategies import (
    Clock,
    DeepCache,
    EasyCache,
    EvenAndLast,
    EvenSteps,
    EvenTimesteps,
    Exponential,
    FirstBlockCache,
    FoCa,
    HiCache,
    MagCache,
    NewtonCache,
    RuleState,
    Schedule,
    Strategy,
    TaylorCache,
    TeaCache,
    interval_schedule,
)
from dit_cache_fx.strategies.teacache_coefficients import TEACACHE_COEFFICIENTS, Coefficients

__version__ = "0.1.0"

__all__ = [
    "TEACACHE_COEFFICIENTS",
    "Backend",
    "Batch",
    "CacheReport",
    "CachedModel",
    "Calibration",
    "CaptureError",
    "CaptureReport",
    "Clock",
    "Coefficients",
    "DeepCache",
    "DiscoveryError",
    "DitCacheError",
    "DitCacheWarning",
    "EasyCache",
    "EvenAndLast",
    "EvenSteps",
    "EvenTimesteps",
    "Explanation",
    "Exponential",
    "Exported",
    "FirstBlockCache",
    "FoCa",
    "HiCache",
    "MagCache",
    "MissingPackageError",
    "NewtonCache",
    "OptionError",
    "RuleState",
    "Runner",
    "Schedule",
    "Session",
    "StepRecord",
    "Strategy",
    "TaylorCache",
    "TeaCache",
    "VerifyError",
    "apply",
    "backend",
    "calibrate",
    "export",
    "interval_schedule",
    "load",
    "restore",
]
