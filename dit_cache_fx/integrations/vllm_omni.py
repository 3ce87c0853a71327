"""A cache backend for vllm-omni: `CacheBackend` with a session for each request.

In a worker, `register()` adds the backend to vllm-omni by the name "dit_cache_fx". As a plugin of
vllm-omni it runs by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import ref

from vllm_omni.diffusion.cache.base import CacheBackend  # type: ignore[import-not-found]

from dit_cache_fx.api import apply_to_pipeline
from dit_cache_fx.cached_model import CachedModel
from dit_cache_fx.errors import OptionError
from dit_cache_fx.pipeline import restore_pipeline, transformers_of
from dit_cache_fx.runtime.session import Session

NAME = "dit_cache_fx"
#: options of `apply` that vllm-omni's own configuration has by the same name
_SHARED = ("rel_l1_thresh", "coefficients")


class DitCacheBackend(CacheBackend):  # type: ignore[misc]
    """Caches the transformers of a vllm-omni pipeline.

    `config`: `strategy` and the options of `dit_cache_fx.apply`, as a mapping or as vllm-omni's
    `DiffusionCacheConfig` that was made from one.

    A pipeline that runs whole requests is refreshed for each of them. One that is run step by step
    needs no refresh: the requests of a step are told by their states, and each has a session, which
    lies in the state and is freed with it. Rows of several requests are one batch.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._strategy, self._options = _options(config)

    def enable(self, pipeline: Any) -> None:
        """Cache the pipeline's transformers, for whole requests and for steps."""
        apply_to_pipeline(pipeline, self._strategy, self._options)
        if hasattr(pipeline, "denoise_step"):
            pipeline.denoise_step = self._stepwise(pipeline, pipeline.denoise_step)
        self.enabled = True

    def disable(self, pipeline: Any) -> None:
        """Put the original transformers back."""
        restore_pipeline(pipeline)
        vars(pipeline).pop("denoise_step", None)
        self.enabled = False

    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
        """A request begins: forget what the one before has left.

        `num_inference_steps`: how many steps it has; 0 where that is not known.
        """
        for cached in cached_in(pipeline).values():
            cached.clear_states()
            cached.num_steps = num_inference_steps or None

    # --- step by step ----------------------------------------------------------------------------

    @contextmanager
    def step(self, pipeline: Any, states: Sequence[Any]) -> Iterator[None]:
        """Within it calls of the transformers have a row for each of these requests, in order.

        `states`: what vllm-omni knows of each request (`StepRequestState`).
        """
        with ExitStack() as entered:
            for name, cached in cached_in(pipeline).items():
                sessions = [_session_of(state, name, cached) for state in states]
                one = len(sessions) == 1
                entered.enter_context(sessions[0] if one else cached.batch(sessions))
            yield

    def _stepwise(self, pipeline: Any, denoise_step: Callable[..., Any]) -> Callable[..., Any]:
        def step(input_batch: Any, *, states: Sequence[Any] | None = None, **more: Any) -> Any:
            if not states:
                return denoise_step(input_batch, **more)
            with self.step(pipeline, states):
                return denoise_step(input_batch, states=states, **more)

        return step


def _session_of(state: Any, name: str, cached: CachedModel) -> Session:
    """The session of a request for one transformer; it lies in the request's state."""
    sessions: dict[str, Session] = state.extra.setdefault(NAME, {})
    if name not in sessions:
        weak = ref(state)
        sessions[name] = cached.new_session()
        sessions[name].timesteps = lambda: getattr(weak(), "timesteps", None)
    return sessions[name]


def cached_in(pipeline: Any) -> dict[str, CachedModel]:
    """The cached transformers of a pipeline, by name."""
    found = transformers_of(pipeline)
    return {name: model for name, model in found.items() if isinstance(model, CachedModel)}


def register() -> None:
    """Add the backend to those that vllm-omni's configuration can name.

    `cache_backend="dit_cache_fx"` with the options as its `cache_config`. For execution by steps,
    which vllm-omni refuses with any named backend, no name, and the options as
    `cache_config={"dit_cache_fx": {...}}`.
    """
    from vllm_omni.diffusion.worker import diffusion_model_runner as runner  # type: ignore

    known = runner.get_cache_backend
    if getattr(known, "of", None) is not None:  # it is there already
        return

    def get_cache_backend(name: str | None, config: Any) -> Any:
        if name == NAME:
            return DitCacheBackend(config)
        own = _mapping(config).get(NAME) if name in (None, "none") else None
        return known(name, config) if own is None else DitCacheBackend(own)

    get_cache_backend.of = known  # type: ignore[attr-defined]
    runner.get_cache_backend = get_cache_backend


def _options(config: Any) -> tuple[Any, dict[str, Any]]:
    options = dict(_mapping(config))
    strategy = options.pop("strategy", None)
    if strategy is None:
        raise OptionError("strategy", None, "the config's strategy, such as 'taylorcache'")
    if not isinstance(config, Mapping):
        given = {name: getattr(config, name, None) for name in _SHARED}
        options.update((name, value) for name, value in given.items() if value is not None)
    return strategy, options


def _mapping(config: Any) -> Mapping[str, Any]:
    """The options that are not vllm-omni's own."""
    found = config if isinstance(config, Mapping) else getattr(config, "_extra_params", None)
    return found if isinstance(found, Mapping) else {}
