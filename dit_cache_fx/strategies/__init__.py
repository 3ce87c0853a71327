"""The caching strategies. To add one, subclass `Strategy` and pass an object of it."""

from dit_cache_fx.strategies.across_ranks import spread_over, without_ranks
from dit_cache_fx.strategies.base import NumSteps, Strategy
from dit_cache_fx.strategies.block_ids import ALIASES, check_block_ids, never_cached
from dit_cache_fx.strategies.clock import CLOCK, Clock
from dit_cache_fx.strategies.course import Course
from dit_cache_fx.strategies.deepcache import DeepCache
from dit_cache_fx.strategies.easycache import EasyCache
from dit_cache_fx.strategies.even import EvenAndLast, EvenSteps, EvenTimesteps
from dit_cache_fx.strategies.exponential import Exponential
from dit_cache_fx.strategies.firstblockcache import FirstBlockCache
from dit_cache_fx.strategies.foca import FoCa
from dit_cache_fx.strategies.hicache import HiCache
from dit_cache_fx.strategies.magcache import MagCache
from dit_cache_fx.strategies.newton import NewtonCache
from dit_cache_fx.strategies.registry import make_strategy
from dit_cache_fx.strategies.rule import RuleState
from dit_cache_fx.strategies.schedule import Schedule, interval_schedule
from dit_cache_fx.strategies.taylorcache import TaylorCache
from dit_cache_fx.strategies.teacache import TeaCache

__all__ = [
    "ALIASES",
    "CLOCK",
    "Clock",
    "Course",
    "DeepCache",
    "EasyCache",
    "EvenAndLast",
    "EvenSteps",
    "EvenTimesteps",
    "Exponential",
    "FirstBlockCache",
    "FoCa",
    "HiCache",
    "MagCache",
    "NewtonCache",
    "NumSteps",
    "RuleState",
    "Schedule",
    "Strategy",
    "TaylorCache",
    "TeaCache",
    "check_block_ids",
    "interval_schedule",
    "make_strategy",
    "never_cached",
    "spread_over",
    "without_ranks",
]
