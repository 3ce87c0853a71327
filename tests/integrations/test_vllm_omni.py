"""The cache backend for vllm-omni: with modules that stand in for it, and with itself if there."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

from dit_cache_fx import CachedModel, DeepCache, OptionError, TaylorCache
from tests.integrations.engine import Config, Engine, Request, stand_in, timesteps

MODULE = "dit_cache_fx.integrations.vllm_omni"
OPTIONS = {"strategy": "taylorcache", "computed_steps": 4}


@pytest.fixture(params=["a stand-in", "vllm-omni"])
def module(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The integration, imported beside each of both."""
    sys.modules.pop(MODULE, None)
    if request.param == "vllm-omni":
        pytest.importorskip("vllm_omni.diffusion.cache.base", exc_type=ImportError)
        yield importlib.import_module(MODULE)
    else:
        with stand_in():
            yield importlib.import_module(MODULE)
    sys.modules.pop(MODULE, None)


def plain(number: int, steps: int) -> Tensor:
    return Engine()(number, steps)


def planned(steps: int, computed: int = 4) -> list[int]:
    course = TaylorCache(computed_steps=computed).course(steps, tuple(map(float, timesteps(steps))))
    return [step for step in range(steps) if course.computes(step)]


def computed(engine: Engine) -> list[int]:
    timeline = engine.transformer.cache_report().timeline
    return [r.step for r in timeline if r.action == "computed"]


def test_it_is_imported_by_name_only() -> None:
    assert importlib.util.find_spec(MODULE) is not None
    assert MODULE not in sys.modules


def test_the_interface(module: Any) -> None:
    base = sys.modules["vllm_omni.diffusion.cache.base"].CacheBackend
    backend, engine = module.DitCacheBackend(OPTIONS), Engine()
    model = engine.transformer
    assert isinstance(backend, base)
    assert not backend.is_enabled()
    backend.enable(engine)
    assert backend.is_enabled()
    assert isinstance(engine.transformer, CachedModel)
    backend.disable(engine)
    assert not backend.is_enabled()
    assert engine.transformer is model
    assert "denoise_step" not in vars(engine)


def test_whole_requests(module: Any) -> None:
    """Each is refreshed; presets go by the timesteps of its scheduler."""
    backend, engine = module.DitCacheBackend(OPTIONS), Engine()
    backend.enable(engine)
    for number, steps in ((0, 12), (1, 9), (0, 12)):
        backend.refresh(engine, steps)
        got = engine(number, steps)
        assert computed(engine) == planned(steps)
        assert not torch.equal(got, plain(number, steps))
    backend.refresh(engine, 0)  # of a number that is not known
    assert engine.transformer.num_steps is None


def test_with_every_step_computed_nothing_changes(module: Any) -> None:
    every = {"strategy": "taylorcache", "no_cache_steps": range(8)}
    backend, engine = module.DitCacheBackend(every), Engine()
    backend.enable(engine)
    backend.refresh(engine, 0)
    assert torch.equal(engine(3, 8), plain(3, 8))


def test_step_by_step_each_request_is_as_it_is_alone(module: Any) -> None:
    """In turn, with other numbers of steps; nothing is refreshed."""
    alone = {}
    for number, steps in ((0, 12), (1, 8), (2, 12)):
        backend, engine = module.DitCacheBackend(OPTIONS), Engine()
        backend.enable(engine)
        alone[number] = engine(number, steps)
    backend, engine = module.DitCacheBackend(OPTIONS), Engine()
    backend.enable(engine)
    requests = [Request.of(0, 12), Request.of(1, 8), Request.of(2, 12)]
    waiting = list(requests)
    while waiting:
        request = waiting.pop(0)
        engine.together([request])
        waiting += [] if request.over else [request]
    for number, request in enumerate(requests):
        assert torch.equal(request.latents, alone[number])
        with request.extra["dit_cache_fx"]["transformer"]:
            assert computed(engine) == planned(len(request.timesteps))


@pytest.mark.skipif(not hasattr(CachedModel, "batch"), reason="needs batches of sessions")
def test_requests_in_one_batch(module: Any) -> None:
    """At different steps, of different numbers of steps."""
    backend, engine = module.DitCacheBackend(OPTIONS), Engine()
    backend.enable(engine)
    requests, arriving = [Request.of(0, 12)], [Request.of(1, 8), Request.of(2, 12)]
    finished = []
    while requests:
        engine.together(requests)
        finished += [r for r in requests if r.over]
        requests = [r for r in requests if not r.over] + arriving[:1]
        del arriving[:1]
    for request in finished:
        number, steps = int(request.request_id[1:]), len(request.timesteps)
        backend, engine = module.DitCacheBackend(OPTIONS), Engine()
        backend.enable(engine)
        torch.testing.assert_close(request.latents, engine(number, steps), rtol=1e-4, atol=1e-4)


def test_what_a_request_holds_goes_with_it(module: Any) -> None:
    backend, engine = module.DitCacheBackend(OPTIONS), Engine()
    backend.enable(engine)
    request = Request.of(0, 12)
    engine.together([request])
    assert engine.transformer.cache_report().bytes_held > 0
    gone = ref(request)
    del request
    gc.collect()
    assert gone() is None
    assert engine.transformer.cache_report().bytes_held == 0


def test_a_step_without_states_is_the_pipelines_own(module: Any) -> None:
    backend, engine = module.DitCacheBackend(OPTIONS), Engine()
    backend.enable(engine)
    request = Request.of(0, 12)
    engine.scheduler.timesteps = torch.stack(request.timesteps)
    with torch.no_grad():
        assert torch.equal(engine.denoise_step([request]), engine.noise([request]))


def test_the_engines_configuration(module: Any) -> None:
    config = Config({"rel_l1_thresh": 0.2}, strategy="teacache", no_cache_steps={0})
    backend, engine = module.DitCacheBackend(config), Engine()
    backend.enable(engine)
    strategy = engine.transformer._call_log.strategy
    assert (strategy.name, strategy.rel_l1_thresh) == ("teacache", 0.2)
    assert backend.config is config
    own = module.DitCacheBackend({"strategy": DeepCache(no_cache_steps={0})})
    own.enable(Engine())
    with pytest.raises(OptionError, match="strategy=None: the config's strategy"):
        module.DitCacheBackend({"computed_steps": 4})
    with pytest.raises(OptionError, match="taylorcache has no such option"):
        module.DitCacheBackend({**OPTIONS, "order": 2}).enable(Engine())


def test_registered(module: Any) -> None:
    pytest.importorskip("vllm_omni.diffusion.worker.diffusion_model_runner", exc_type=ImportError)
    runner = sys.modules["vllm_omni.diffusion.worker.diffusion_model_runner"]
    before = runner.get_cache_backend
    try:
        module.register()
        module.register()  # once in a process
        assert runner.get_cache_backend.of is before
        named = runner.get_cache_backend("dit_cache_fx", OPTIONS)
        unnamed = runner.get_cache_backend("none", {"dit_cache_fx": OPTIONS})
        assert isinstance(named, module.DitCacheBackend)
        assert isinstance(unnamed, module.DitCacheBackend)
        assert runner.get_cache_backend(None, {}) is None
        with pytest.raises(ValueError, match="Unsupported cache backend"):
            runner.get_cache_backend("other", {})
    finally:
        runner.get_cache_backend = before
