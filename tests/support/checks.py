"""What the support table says of one class: every column is measured on its tiny model."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils import _pytree as pytree

import dit_cache_fx
from dit_cache_fx import CachedModel
from tests.support.case import SupportCase
from tests.zoo import flat

STEPS = 6
COMPUTED = frozenset({0, 1, 3})
STRATEGIES = ("deepcache", "teacache", "taylorcache")
CLOSE = 1e-5


@dataclass(frozen=True)
class Result:
    """What was seen of one class; `fault`: of the first thing that went wrong, None when nothing.

    `blocks`: list name -> its cached blocks.
    """

    name: str
    blocks: dict[str, int]
    passed: tuple[str, ...]
    fault: str | None = None


class Fault(Exception):
    """A column of the table does not hold."""


class Subject:
    """A tiny model, and the steps of one generation of it without a cache."""

    def __init__(self, case: SupportCase) -> None:
        self.case = case
        self.model = case.build()
        self.timesteps = case.timesteps(STEPS)
        with counting(self.model) as calls:
            self.exact, self.calls = _generation(self.model, self.inputs, calls)

    def inputs(self, step: int) -> dict[str, Any]:
        """A step's arguments: every step has another sample."""
        return self.case.inputs(self.timesteps[step], seed=step)

    def cached(self, strategy: str) -> CachedModel:
        return dit_cache_fx.apply(self.model, strategy, no_cache_steps=COMPUTED)


def check_class(case: SupportCase) -> Result:
    """Every column of one class, up to the first that fails."""
    passed: list[str] = []
    blocks: dict[str, int] = {}
    try:
        with torch.no_grad():
            subject = Subject(case)
            cached = subject.cached("deepcache")
            with counting(subject.model) as calls:
                got, counts = _generation(cached, subject.inputs, calls)
            blocks = {n: len(ids) for n, ids in cached.cache_report().cached_blocks.items()}
            for column, check in COLUMNS.items():
                check(subject, cached, got, counts)
                passed.append(column)
    except Fault as fault:
        return Result(case.name, blocks, tuple(passed), str(fault))
    except Exception as error:
        text = " ".join(str(error).split())
        return Result(case.name, blocks, tuple(passed), f"{type(error).__name__}: {text}")
    return Result(case.name, blocks, tuple(passed))


Counts = list[Counter[str]]
Check = Callable[[Subject, CachedModel, list[Tensor], Counts], None]


def _generation(
    model: Callable[..., Any], inputs: Callable[[int], dict[str, Any]], calls: Counter[str]
) -> tuple[list[Tensor], Counts]:
    """The output of each step, and how often each module was called in it."""
    outputs, counts = [], []
    for step in range(STEPS):
        calls.clear()
        outputs.append(flat(model(**inputs(step))))
        counts.append(calls.copy())
    return outputs, counts


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


# --- the columns -----------------------------------------------------------------------------


def computed_steps_are_exact(
    subject: Subject, cached: CachedModel, got: list[Tensor], counts: Counts
) -> None:
    wrong = [i for i in sorted(COMPUTED) if not torch.equal(got[i], subject.exact[i])]
    if wrong:
        raise Fault(f"computed steps {wrong} differ from the model")


def reused_steps_skip_the_blocks(
    subject: Subject, cached: CachedModel, got: list[Tensor], counts: Counts
) -> None:
    """A cached block runs on a computed step as often as without a cache, else not at all."""
    names = block_names(cached)
    for step, called in enumerate(counts):
        for name in names:
            expected = subject.calls[step][name] if step in COMPUTED else 0
            if called[name] != expected:
                raise Fault(f"step {step} calls {name} {called[name]} times, not {expected}")


def deepcache_is_the_reference(
    subject: Subject, cached: CachedModel, got: list[Tensor], counts: Counts
) -> None:
    reference = PerBlock(subject.model, block_names(cached))
    want = [flat(reference(i, subject.inputs(i))) for i in range(STEPS)]
    wrong = [i for i in range(STEPS) if not torch.equal(got[i], want[i])]
    if wrong:
        raise Fault(f"steps {wrong} differ from blocks that are cached one by one")
    reused = [i for i in range(STEPS) if i not in COMPUTED]
    if all(torch.equal(got[i], subject.exact[i]) for i in reused):
        raise Fault("the blocks do not matter to the output")


def others_run(strategy: str) -> Check:
    def check(subject: Subject, cached: CachedModel, got: list[Tensor], counts: Counts) -> None:
        other = subject.cached(strategy)
        outputs = [flat(other(**subject.inputs(i))) for i in range(STEPS)]
        computed_steps_are_exact(subject, other, outputs, counts)
        bad = [i for i, output in enumerate(outputs) if not output.isfinite().all()]
        if bad:
            raise Fault(f"{strategy}: steps {bad} are not finite")
        timeline = other.cache_report().timeline
        if [r.step for r in timeline if r.action == "computed"] != sorted(COMPUTED):
            raise Fault(f"{strategy} computes other steps")

    return check


def compiles_to_one_graph(
    subject: Subject, cached: CachedModel, got: list[Tensor], counts: Counts
) -> None:
    graphs = 0

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return gm.forward

    torch.compiler.reset()
    compiled = torch.compile(subject.cached("deepcache"), fullgraph=True, backend=backend)
    try:
        outputs = [flat(compiled(**subject.inputs(i))) for i in range(STEPS)]
    finally:
        torch.compiler.reset()
    wrong = [i for i in range(STEPS) if not torch.equal(outputs[i], got[i])]
    if wrong:
        raise Fault(f"compiled, steps {wrong} differ from eager mode")
    if graphs != 1:
        raise Fault(f"{graphs} graphs")


COLUMNS: dict[str, Check] = {
    "exact": computed_steps_are_exact,
    "skips": reused_steps_skip_the_blocks,
    "deepcache": deepcache_is_the_reference,
    "teacache": others_run("teacache"),
    "taylorcache": others_run("taylorcache"),
    "one graph": compiles_to_one_graph,
}


def block_names(cached: CachedModel) -> list[str]:
    """The cached blocks' names in the model."""
    lists = cached.cache_report().cached_blocks
    return [f"{name}.{i}" for name, ids in lists.items() for i in ids]


class PerBlock:
    """DeepCache block by block: each returns on a reused step what it returned before.

    A block that runs twice in a step has two results.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self.model = copy.deepcopy(model)
        self.step = 0
        self.calls: Counter[str] = Counter()
        self.stored: dict[tuple[str, int], Any] = {}
        for name in names:
            block = self.model.get_submodule(name)
            block.forward = partial(self.answer, name, block.forward)

    def __call__(self, step: int, inputs: dict[str, Any]) -> Any:
        self.step = step
        self.calls.clear()
        return self.model(**inputs)

    def answer(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        key = name, self.calls[name]
        self.calls[name] += 1
        if self.step in COMPUTED:
            self.stored[key] = copied(forward(*args, **kwargs))
        return copied(self.stored[key])


def copied(value: Any) -> Any:
    """The same nested value with tensors of its own."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)
