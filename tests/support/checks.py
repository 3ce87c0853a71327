"""The columns of the support table: each is measured on a tiny model of the class."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree

import dit_cache_fx
from dit_cache_fx import CachedModel, DitCacheWarning
from tests.reference import between
from tests.support.case import SupportCase
from tests.zoo import flat

STEPS = 6
COMPUTED = frozenset({0, 1, 3})
CLOSE = 1e-5
YES = "yes"

Outputs = list[Tensor]
Counts = list[Counter[str]]


class Fault(Exception):
    """A column of the table does not hold."""


class Subject:
    """A tiny model, and one generation of it without a cache."""

    def __init__(self, case: SupportCase) -> None:
        self.case = case
        self.model = case.build()
        self.arguments = _steps(case)
        with counting(self.model) as calls:
            self.exact, self.calls = self.generation(self.model, calls)

    def generation(self, model: Callable[..., Any], calls: Counter[str]) -> tuple[Outputs, Counts]:
        """The output of each step, and how often each module was called in it."""
        outputs, counts = [], []
        for arguments in self.arguments:
            calls.clear()
            outputs.append(flat(model(**arguments())))
            counts.append(calls.copy())
        return outputs, counts

    def cached(self, strategy: str) -> CachedModel:
        return dit_cache_fx.apply(
            self.model, strategy, timestep=self.case.timestep, no_cache_steps=COMPUTED
        )


def _steps(case: SupportCase) -> list[Callable[[], dict[str, Any]]]:
    """Makes the arguments of each step: the sample moves, conditioning is of the same tensors."""
    first: list[Any] = []

    def arguments(timestep: float, share: float) -> dict[str, Any]:
        draws = [pytree.tree_flatten(case.inputs(timestep, seed=seed)) for seed in (0, 1)]
        leaves = [between(a, b, share) for a, b in zip(*(d[0] for d in draws), strict=True)]
        if not first:
            first.extend(leaves)
        shared = [_same(a, b) for a, b in zip(first, leaves, strict=True)]
        return pytree.tree_unflatten(shared, draws[0][1])

    shares = [step / (8 * STEPS) for step in range(STEPS)]  # a sampler takes short steps
    return [partial(arguments, t, s) for t, s in zip(case.timesteps(STEPS), shares, strict=True)]


def _same(first: Any, now: Any) -> Any:
    both = isinstance(first, Tensor) and isinstance(now, Tensor)
    return first if both and first.shape == now.shape and torch.equal(first, now) else now


@contextmanager
def counting(model: nn.Module) -> Iterator[Counter[str]]:
    """Count the calls of every module of a model by its name."""
    names = {module: name for name, module in model.named_modules()}
    calls: Counter[str] = Counter()
    handle = register_module_forward_pre_hook(lambda m, _: calls.update([names.get(m, "")]))
    try:
        yield calls
    finally:
        handle.remove()


# --- the columns -------------------------------------------------------------------------------


class Seen:
    """A class's cached generation, and what the columns say of it."""

    def __init__(self, case: SupportCase) -> None:
        self.subject = Subject(case)
        self.cached = self.subject.cached("deepcache")
        with counting(self.subject.model) as calls:
            self.outputs, self.counts = self.subject.generation(self.cached, calls)
        self.blocks = self.cached.cache_report().cached_blocks
        self.names = [f"{name}.{i}" for name, ids in self.blocks.items() for i in ids]

    def exact(self) -> None:
        """Computed steps are bitwise the model's."""
        _refuse_others(self.outputs, self.subject.exact)

    def skips(self) -> None:
        """A cached block runs on a computed step as often as without a cache, else not at all."""
        for step, called in enumerate(self.counts):
            for name in self.names:
                expected = self.subject.calls[step][name] if step in COMPUTED else 0
                if called[name] != expected:
                    raise Fault(f"step {step} calls {name} {called[name]} times, not {expected}")

    def deepcache(self) -> None:
        """Every step is bitwise that of blocks that are cached one by one."""
        reference = PerBlock(self.subject.model, self.names)
        want, _ = self.subject.generation(reference, reference.calls)
        wrong = [i for i in range(STEPS) if not torch.equal(self.outputs[i], want[i])]
        if wrong:
            raise Fault(f"steps {wrong} differ from blocks that are cached one by one")
        if all(map(torch.equal, self.outputs, self.subject.exact)):
            raise Fault("the blocks do not matter to the output")

    def others(self) -> None:
        """TeaCache and TaylorCache: computed steps are bitwise the model's, the others finite."""
        for strategy in ("teacache", "taylorcache"):
            cached = self.subject.cached(strategy)
            outputs, _ = self.subject.generation(cached, Counter())
            _refuse_others(outputs, self.subject.exact)
            timeline = cached.cache_report().timeline
            steps = [r.step for r in timeline if r.action == "computed"]
            if steps != sorted(COMPUTED) or not all(o.isfinite().all() for o in outputs):
                raise Fault(f"{strategy} computes {steps}, or gives infinite values")

    def autocast(self) -> None:
        """Under autocast too computed steps are bitwise the model's, and the others are reused."""
        autocast(self.subject.case)

    def one_graph(self) -> str:
        """One graph for all steps of an input signature; it gives what eager mode gives."""
        graphs: list[fx.GraphModule] = []
        compiled = _compiled(self.subject.cached("deepcache"), graphs)
        try:
            outputs, _ = self.subject.generation(compiled, Counter())
        finally:
            torch.compiler.reset()
        _refuse_others(outputs, self.subject.exact)
        signatures = len(self.cached.cache_report().captures)
        if len(graphs) != signatures:
            raise Fault(f"{len(graphs)} graphs")
        errors = [error_of(a, b) for a, b in zip(outputs, self.outputs, strict=True)]
        if max(errors) > CLOSE:
            raise Fault(f"compiled, its steps are off by {errors}")
        if max(errors) > 0:
            return "yes, except for rounding on reused steps"
        return (
            YES if signatures == 1 else f"yes, one graph for each of {signatures} input signatures"
        )

    def steps(self) -> None:
        """Compiled step by step it gives what eager mode gives."""
        torch.compiler.reset()
        cached = self.subject.cached("deepcache")
        cached.compile_steps(backend=_as_it_is)
        try:
            self._refuse_unlike(*self.subject.generation(cached, Counter()))
        finally:
            torch.compiler.reset()

    def through_backend(self) -> None:
        """So does `backend()`, where nothing says that the model is not cached."""
        torch.compiler.reset()
        case = self.subject.case
        cache = dit_cache_fx.backend(
            "deepcache", inner="aot_eager", timestep=case.timestep, no_cache_steps=COMPUTED
        )
        compiled = torch.compile(self.subject.model, backend=cache)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", DitCacheWarning)
                outputs, counts = self.subject.generation(compiled, Counter())
        finally:
            torch.compiler.reset()
        said = [str(w.message) for w in caught if issubclass(w.category, DitCacheWarning)]
        if said:
            errors = [error_of(a, b) for a, b in zip(outputs, self.subject.exact, strict=True)]
            reason = said[0].partition(";")[0]
            raise Fault(reason if max(errors) <= CLOSE else f"not cached, and off by {errors}")
        self._refuse_unlike(outputs, counts)

    def _refuse_unlike(self, outputs: Outputs, _: Counts) -> None:
        errors = [error_of(a, b) for a, b in zip(outputs, self.outputs, strict=True)]
        if max(errors) > CLOSE:
            raise Fault(f"its steps are off by {errors}")

    def itself_is_one_graph(self) -> bool:
        """Whether the model without a cache is one graph."""
        try:
            _compiled(self.subject.model, [])(**self.subject.arguments[0]())
        except Exception:
            return False
        finally:
            torch.compiler.reset()
        return True


def autocast(case: SupportCase) -> None:
    """Raises where the class's computed steps under autocast are not bitwise the model's.

    And where the others are not reused, and where it does not run without a cache either.
    """
    with torch.autocast("cpu", torch.bfloat16):
        try:
            subject = Subject(case)
        except Exception as error:
            raise Fault(f"without a cache it does not run: {_reason(error)}") from error
        cached = subject.cached("deepcache")
        outputs, _ = subject.generation(cached, Counter())
    _refuse_others(outputs, subject.exact)
    steps = [r.step for r in cached.cache_report().timeline if r.action == "computed"]
    if steps != sorted(COMPUTED) or all(map(torch.equal, outputs, subject.exact)):
        raise Fault(f"steps {steps} are computed")


def _refuse_others(outputs: Outputs, exact: Outputs) -> None:
    wrong = [i for i in sorted(COMPUTED) if not torch.equal(outputs[i], exact[i])]
    if wrong:
        raise Fault(f"computed steps {wrong} differ from the model")


def error_of(got: Tensor, want: Tensor) -> float:
    return 0.0 if torch.equal(got, want) else ((got - want).norm() / want.norm()).item()


def _as_it_is(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    return gm.forward


def _compiled(model: nn.Module, graphs: list[fx.GraphModule]) -> Callable[..., Any]:
    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend=backend)


# --- the reference -----------------------------------------------------------------------------


class PerBlock:
    """DeepCache block by block: each returns on a reused step what it returned before.

    A block that runs twice in a step has two results. `calls` has to be cleared before each step.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = copy.deepcopy(model)
        self.step = -1
        self.calls: Counter[str] = Counter()
        self.stored: dict[tuple[str, int], Any] = {}
        for name in names:
            block = self.model.get_submodule(name)
            block.forward = partial(self.answer, name, block.forward)

    def __call__(self, **arguments: Any) -> Any:
        self.step += 1
        return self.model(**arguments)

    def answer(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        key = name, self.calls[name]
        self.calls[name] += 1
        if self.step in COMPUTED:
            self.stored[key] = _copied(forward(*args, **kwargs))
        return _copied(self.stored[key])


def _copied(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)


# --- a row of the table ------------------------------------------------------------------------

EAGER: Mapping[str, Callable[[Seen], None]] = {
    "computed steps bitwise": Seen.exact,
    "reused steps skip blocks": Seen.skips,
    "equals per-block cache": Seen.deepcache,
}


def look(case: SupportCase) -> tuple[Seen | None, list[str]]:
    """The cached generation of a class, and its first cells: the blocks, and `EAGER`."""
    with torch.no_grad():
        try:
            seen = Seen(case)
        except Exception as error:
            return None, [_reason(error)]
        blocks = ", ".join(f"{len(ids)} `{name}`" for name, ids in seen.blocks.items())
        named = f" (with `timestep={case.timestep!r}`)" if case.timestep else ""
        return seen, [blocks + named, *(_cell(partial(check, seen)) for check in EAGER.values())]


def look_further(seen: Seen) -> list[str]:
    """The other cells: TeaCache and TaylorCache, autocast, and the ways to compile."""
    with torch.no_grad():
        graph = _cell(seen.one_graph)
        if graph.startswith("no") and not seen.itself_is_one_graph():
            graph = f"{graph.rstrip('.')}. Without a cache, the model is not one graph either."
        return [_cell(seen.others), _cell(seen.autocast), graph, *look_compiled(seen)]


def look_compiled(seen: Seen) -> list[str]:
    """Two cells more: `compile_steps`, and `backend()`."""
    return [_cell(seen.steps), _cell(seen.through_backend)]


def _cell(check: Callable[[], str | None]) -> str:
    try:
        return check() or YES
    except Exception as error:
        return f"no: {_reason(error)}"


def _reason(error: Exception) -> str:
    """An error's first line that says something, without addresses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kind = "" if isinstance(error, Fault) else f"{type(error).__name__}: "
    return f"{kind}{lines[0] if lines else ''}"[:240]
