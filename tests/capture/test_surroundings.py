"""What a model's forward puts around its blocks is part of their calls: reproduced, or refused.

Every step is computed here, and is compared with the model, bit by bit.
"""

from __future__ import annotations

import functools
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import dit_cache_fx
from dit_cache_fx.errors import CaptureError
from tests.toys import DIM, Block, ToyDiT, default_dtype, make, new, runs_of, toy_inputs

STEPS = (900.0, 300.0)
Call = Callable[..., Any]

autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)


@pytest.fixture(autouse=True)
def new_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def eager(model: nn.Module) -> Call:
    return dit_cache_fx.apply(model, "deepcache", no_cache_steps=range(9))


def one_graph(model: nn.Module) -> Call:
    return torch.compile(eager(model), backend="eager", fullgraph=True)


def steps(model: nn.Module) -> Call:
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=range(9))
    cached.compile_steps(backend="eager", fullgraph=True)
    return cached


def backend(model: nn.Module) -> Call:
    cache = dit_cache_fx.backend("deepcache", no_cache_steps=range(9), inner="eager")
    return torch.compile(model, backend=cache, fullgraph=True)


APPLIED = [eager, one_graph, steps]
WAYS = [*APPLIED, backend]


def results(call: Call, outer: Any = nullcontext, **more: Any) -> list[Tensor]:
    with torch.no_grad():
        given = [toy_inputs(t, seed=i) for i, t in enumerate(STEPS)]
        got = []
        for inputs in given:
            with outer():
                got.append(call(**inputs, **more))
    return got


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- autocast ------------------------------------------------------------------------------------


class AroundBlocks(ToyDiT):
    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        with autocast():
            h = super().trunk(h, c)
        return h.float()


class AroundOneBlock(ToyDiT):
    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            with autocast(enabled=index == 1):
                h = block(h, c)
        return h.float()


class OffAroundBlocks(ToyDiT):
    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        with autocast(enabled=False):
            return super().trunk(h.float(), c.float())


class OffForTheTime(ToyDiT):
    def condition(self, timestep: Tensor, text: Tensor) -> Tensor:
        with autocast(enabled=False):
            return super().condition(timestep, text)


class OnForTheTime(ToyDiT):
    def condition(self, timestep: Tensor, text: Tensor) -> Tensor:
        with autocast():
            return super().condition(timestep, text).float()


class Whole(ToyDiT):
    @torch.autocast("cpu", torch.bfloat16)
    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        return super().forward(x, timestep, text)


class OwnProducts(ToyDiT):
    """The model's own code multiplies without autocast, within one."""

    def condition(self, timestep: Tensor, text: Tensor) -> Tensor:
        c = super().condition(timestep, text)
        with autocast(enabled=False):
            return c.float() @ self.text_in.weight.float()


@pytest.mark.parametrize(
    ("kind", "way"),
    [*product([AroundBlocks], WAYS), *product([Whole, AroundOneBlock, OnForTheTime], [eager])],
)
def test_autocast_that_forward_enters(kind: type[nn.Module], way: Callable[..., Call]) -> None:
    model = make(kind)
    want = results(model)
    assert same(results(way(model)), want)
    assert not same(results(make(ToyDiT)), want)


@pytest.mark.parametrize(
    ("kind", "way"),
    [*product([OwnProducts], WAYS), *product([ToyDiT, OffAroundBlocks, OffForTheTime], [eager])],
)
def test_a_model_under_autocast(kind: type[nn.Module], way: Callable[..., Call]) -> None:
    """As in Mochi's documented use: around the whole call, without a cache of weights."""
    model = make(kind)
    outer = functools.partial(autocast, cache_enabled=False)
    want = results(model, outer)
    assert same(results(way(model), outer), want)
    assert not same(results(model), want)


def test_autocast_and_none_in_turn() -> None:
    model = make(OffForTheTime)
    cached = eager(model)
    for outer in (autocast, nullcontext, autocast):
        assert same(results(cached, outer), results(model, outer))


def test_reused_steps_run_their_layers_under_autocast_too() -> None:
    model = make(ToyDiT)
    cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps={0})
    with torch.no_grad(), autocast():
        first = toy_inputs(900.0)
        assert torch.equal(cached(**first), model(**first))
        again = cached(**toy_inputs(600.0))
    assert again.dtype == torch.bfloat16
    assert cached.cache_report().timeline[-1].action == "reused"
    assert not torch.is_autocast_enabled("cpu")


def test_the_graph_says_what_its_blocks_run_in() -> None:
    cached = dit_cache_fx.apply(make(AroundOneBlock), "deepcache", no_cache_steps=range(9))
    results(cached)
    text = cached.explain(full=True)
    entered = "with torch.autocast('cpu', torch.bfloat16, cache_enabled=True): model_blocks_1 ="
    assert entered in str(text)
    assert "cache_enabled=True): model_blocks_0" not in str(text)


def test_an_exported_program_has_what_forward_sets_and_enters() -> None:
    inputs = toy_inputs(900.0)
    for kind in (AroundBlocks, GainDiT):
        model = make(kind)
        cached = dit_cache_fx.apply(model, "deepcache", no_cache_steps=range(9))
        with torch.no_grad():
            runner = dit_cache_fx.export(cached, (), inputs).runner()
            assert torch.equal(runner(**inputs), model(**inputs))


def in_float32(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs).float()

    return wrapped


@pytest.mark.parametrize("way", [eager, backend], ids=lambda way: way.__name__)
def test_a_forward_prepared_for_mixed_precision(way: Callable[..., Call]) -> None:
    """As accelerate does it: autocast around the class's forward, and a float32 result."""
    model = make(ToyDiT)
    plain = results(model)
    forward = autocast()(type(model).forward)
    model.forward = types.MethodType(in_float32(forward), model)  # type: ignore[method-assign]
    want = results(model)
    assert same(results(way(model)), want)
    assert not same(plain, want)


# --- other state of torch ------------------------------------------------------------------------


class AttentionBlock(Block):
    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        h = super().forward(h, c)
        q = h.unflatten(-1, (2, DIM // 2)).transpose(1, 2)
        return h + nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


class MathAttention(ToyDiT):
    def block(self) -> nn.Module:
        return AttentionBlock()

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return super().trunk(h, c)


def kernels_in_blocks(model: nn.Module, call: Callable[[], Any]) -> list[tuple[bool, bool]]:
    found = []

    def note(*_: Any) -> None:
        cuda = torch.backends.cuda
        found.append((cuda.math_sdp_enabled(), cuda.flash_sdp_enabled()))

    handles = [block.register_forward_hook(note) for block in model.blocks]
    call()
    for handle in handles:
        handle.remove()
    return found


def test_attention_kernels_that_forward_chooses() -> None:
    model = make(MathAttention)
    cached = eager(model)
    results(cached)
    found = kernels_in_blocks(model, lambda: results(cached))
    assert set(found) == {(True, False)}
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("way", [eager, one_graph, backend], ids=lambda way: way.__name__)
def test_attention_kernels_that_forward_chooses_give_the_models_output(
    way: Callable[..., Call],
) -> None:
    def long(seed: int) -> dict[str, Any]:
        return toy_inputs(STEPS[seed], seed=seed, size=300)

    model = make(MathAttention)
    call = way(model)
    with torch.no_grad():
        for seed in range(2):
            assert torch.equal(call(**long(seed)), model(**long(seed)))


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Watching(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("context", "named"),
    [
        (lambda: default_dtype(torch.float64), "the default dtype set to torch.float64"),
        (deterministic, "deterministic algorithms set to True"),
        (Watching, r"the modes on torch's stacks set to \('Watching',\)"),
    ],
    ids=["default dtype", "flags", "mode"],
)
def test_state_that_a_graph_cannot_set_is_refused_by_name(context: Any, named: str) -> None:
    class Around(ToyDiT):
        def trunk(self, h: Tensor, c: Tensor) -> Tensor:
            with context():
                return super().trunk(h, c)

    model = make(Around)
    with pytest.raises(CaptureError, match=f"calls module 'blocks.0' with {named}"):
        results(eager(model))


def test_state_around_the_call_is_the_callers() -> None:
    with deterministic(), Watching():
        assert same(results(eager(make(ToyDiT))), results(make(ToyDiT)))


# --- attributes of blocks ------------------------------------------------------------------------


class Adapted(nn.Module):
    """A layer with a low-rank addition, its strength in a dict, as peft has it."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(DIM, DIM)
        self.lora = nn.Linear(DIM, DIM)
        self.scaling = {"default": 0.8}

    def forward(self, h: Tensor) -> Tensor:
        return self.base_layer(h) + self.scaling["default"] * self.lora(h)


class AdaptedBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.mix = Adapted()  # type: ignore[assignment]


class LoraDiT(ToyDiT):
    """The strength of a call multiplies that of every adapted layer, and is divided out after."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__(depth)
        self.embed = Adapted()  # type: ignore[assignment]

    def block(self) -> nn.Module:
        return AdaptedBlock()

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, extra: Any = None) -> Any:
        scale = (extra or {}).get("scale", 1.0)
        with ExitStack() as stack:
            for layer in self.modules():
                if isinstance(layer, Adapted):
                    layer.scaling["default"] *= scale
                    stack.callback(self._divide, layer, scale)
            return super().forward(x, timestep, text)

    def _divide(self, layer: Adapted, scale: float) -> None:
        layer.scaling["default"] /= scale


def scalings(model: nn.Module) -> list[float]:
    return [m.scaling["default"] for m in model.modules() if isinstance(m, Adapted)]


@pytest.mark.parametrize("way", APPLIED, ids=lambda way: way.__name__)
def test_the_strength_of_lora_is_that_of_the_call(way: Callable[..., Call]) -> None:
    model, cached = make(LoraDiT), None
    cached = way(model)
    plain = results(model)
    for scale in (1.0, 0.7, 2.0, 0.7):
        extra = {"scale": scale}
        want = results(make(LoraDiT), extra=extra)
        for got, wanted in zip(results(cached, extra=extra), want, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
        assert same(plain, want) == (scale == 1.0)
        assert scalings(model) == pytest.approx([0.8] * 4, rel=1e-12)


def test_the_strength_is_given_back_when_a_block_raises() -> None:
    model = make(LoraDiT)
    cached = eager(model)
    results(cached, extra={"scale": 2.0})

    def fail(*_: Any) -> None:
        raise RuntimeError("a block fails")

    handle = model.blocks[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="a block fails"):
        results(cached, extra={"scale": 2.0})
    assert scalings(model) == [0.8] * 4
    handle.remove()
    assert same(results(cached, extra={"scale": 2.0}), results(model, extra={"scale": 2.0}))


def test_another_base_strength_after_the_capture_takes_effect() -> None:
    model = make(LoraDiT)
    cached = eager(model)
    results(cached, extra={"scale": 2.0})
    for layer in model.modules():
        if isinstance(layer, Adapted):
            layer.scaling["default"] = 0.25
    assert same(results(cached, extra={"scale": 2.0}), results(model, extra={"scale": 2.0}))
    assert same(results(cached), results(model))


class GainBlock(Block):
    gain = 1.0

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return super().forward(h, c) * self.gain


class GainDiT(ToyDiT):
    """A number from an argument is put on the blocks; `back`: and taken off after the call."""

    back = True

    def block(self) -> nn.Module:
        return GainBlock()

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, strength: float = 0.5) -> Any:
        for block in self.blocks:
            block.gain = strength
        result = super().forward(x, timestep, text)
        for block in self.blocks if self.back else ():
            block.gain = 1.0
        return result


class LeavingGainDiT(GainDiT):
    back = False


@pytest.mark.parametrize(
    ("kind", "way"), [(GainDiT, eager), (GainDiT, steps), (LeavingGainDiT, eager)]
)
def test_a_number_that_forward_puts_on_its_blocks(
    kind: type[nn.Module], way: Callable[..., Call]
) -> None:
    model, other = make(kind), make(kind)
    cached = way(model)
    for strength in (0.5, 0.75, 0.5):
        want = results(other, strength=strength)
        assert same(results(cached, strength=strength), want)


class DeletedGainDiT(GainDiT):
    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, strength: float = 0.5) -> Any:
        result = super().forward(x, timestep, text, strength)
        for block in self.blocks:
            del block.gain
        return result


def test_an_attribute_that_is_taken_away_again() -> None:
    model = make(DeletedGainDiT)
    cached = eager(model)
    for strength in (0.5, 0.75):
        assert same(results(cached, strength=strength), results(model, strength=strength))
        assert all("gain" not in vars(block) for block in model.blocks)


class EachItsOwnDiT(GainDiT):
    """The same block gets another value for its second call."""

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        h = super().trunk(h, c)
        self.blocks[0].gain = 0.25
        return self.blocks[0](h, c)


class TensorDiT(GainDiT):
    """The conditioning is left on the blocks."""

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            block.gain = c[:, None]
        return super().trunk(h, c)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(EachItsOwnDiT, "to another value for another call"), (TensorDiT, "a value of type Tensor")],
)
def test_values_that_differ_from_call_to_call_are_refused_by_name(
    kind: type[nn.Module], reason: str
) -> None:
    with pytest.raises(CaptureError, match=r"attribute 'gain' of module 'blocks\.0'") as raised:
        results(eager(make(kind)))
    assert reason in str(raised.value)


class OwnBuffersDiT(GainDiT):
    """A tensor of the model itself, always the same one, is put on the blocks."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__(depth)
        self.register_buffer("strengths", torch.full((DIM,), 0.3))

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        for block in self.blocks:
            block.gain = self.strengths
        return super().trunk(h, c)


def test_a_tensor_of_the_models_own_is_put_on_the_blocks() -> None:
    model = make(OwnBuffersDiT)
    assert same(results(eager(model)), results(make(OwnBuffersDiT)))


# --- what only a run of the blocks in the graph can see ------------------------------------------


CONTEXT: dict[str, Any] = {}


class GlobalBlock(Block):
    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return super().forward(h, CONTEXT["condition"])


class Monitor(threading.Thread):
    """A thread that keeps a number; it need not run for that."""

    woken = 0


MONITOR = Monitor()


class GlobalDiT(ToyDiT):
    """The conditioning reaches the blocks by a variable of the module, and stays there."""

    def block(self) -> nn.Module:
        return GlobalBlock()

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        CONTEXT["condition"] = c
        return super().trunk(h, c)


class SigmaBlock(Block):
    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return super().forward(h, c) * CONTEXT.get("sigma", 1.0)


class SigmaDiT(ToyDiT):
    """A forward context, left after the call; at the first timestep it makes no difference."""

    def block(self) -> nn.Module:
        return SigmaBlock()

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        CONTEXT["sigma"] = timestep.view(-1, 1, 1) / STEPS[0]
        try:
            return super().forward(x, timestep, text)
        finally:
            del CONTEXT["sigma"]


class StrengthBlock(Block):
    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return super().forward(h, c) * CONTEXT.get("strength", 1.0)


class StrengthDiT(ToyDiT):
    """A number that stays there, the same for each call."""

    def block(self) -> nn.Module:
        return StrengthBlock()

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        CONTEXT["strength"] = 0.5
        return super().trunk(h, c)


VARIABLE: ContextVar[Tensor] = ContextVar("condition")


class VariableBlock(Block):
    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return super().forward(h, VARIABLE.get())


class VariableDiT(ToyDiT):
    """A context variable, which the context of the call ends."""

    def block(self) -> nn.Module:
        return VariableBlock()

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        token = VARIABLE.set(c)
        try:
            return super().trunk(h, c)
        finally:
            VARIABLE.reset(token)


class SharedBlock(Block):
    def __init__(self, shared: types.SimpleNamespace) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return super().forward(h, self.shared.condition)


class SharedDiT(ToyDiT):
    """An object that the model shares with its blocks."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__(depth)
        shared = types.SimpleNamespace(condition=None)
        self.blocks = nn.ModuleList([SharedBlock(shared) for _ in range(depth)])

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        self.blocks[0].shared.condition = c
        return super().trunk(h, c)


class ParentBlock(Block):
    def __init__(self, parent: list[nn.Module]) -> None:
        super().__init__()
        self.parent = parent

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return super().forward(h, self.parent[0].now)


class ParentDiT(ToyDiT):
    """The blocks know the model, and what it sets on itself for them."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__(depth)
        self.blocks = nn.ModuleList([ParentBlock([self]) for _ in range(depth)])
        self.now: Tensor | None = None

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        self.now = c
        try:
            return super().trunk(h, c)
        finally:
            self.now = None


class SkippedBlock(Block):
    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return h if CONTEXT.get("skipped") is self else super().forward(h, c)


class SkippingDiT(ToyDiT):
    """Only the second block is told something."""

    def block(self) -> nn.Module:
        return SkippedBlock()

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        CONTEXT["skipped"] = self.blocks[1]
        try:
            return super().trunk(h, c)
        finally:
            del CONTEXT["skipped"]


@pytest.mark.parametrize(
    ("kind", "block"),
    [
        (GlobalDiT, 0),
        (SigmaDiT, 0),
        (StrengthDiT, 0),
        (VariableDiT, 0),
        (SharedDiT, 0),
        (ParentDiT, 0),
        (SkippingDiT, 1),
    ],
)
def test_blocks_that_read_a_variable_are_refused(kind: type[nn.Module], block: int) -> None:
    CONTEXT.clear()
    model = make(kind)
    with pytest.raises(CaptureError, match=rf"block blocks\.{block} gives another result"):
        results(eager(model))


def test_blocks_run_once_where_nothing_around_them_changes() -> None:
    model = make(ToyDiT)
    with runs_of(model.blocks) as counts:
        results(eager(model))
    assert counts == [len(STEPS)] * 3


def test_a_thread_that_notes_something_is_not_the_models_doing() -> None:
    """Such as the monitor of progress bars, which notes when it woke up last."""

    class Watched(ToyDiT):
        def trunk(self, h: Tensor, c: Tensor) -> Tensor:
            MONITOR.woken += 1
            return super().trunk(h, c)

    model = make(Watched)
    with runs_of(model.blocks) as counts:
        results(eager(model))
    assert MONITOR.woken > 0
    assert counts == [len(STEPS)] * 3


def test_blocks_run_once_more_where_something_does() -> None:
    """And the first of them twice more, on inputs that were made up."""

    class Counted(ToyDiT):
        def trunk(self, h: Tensor, c: Tensor) -> Tensor:
            CONTEXT["calls"] = CONTEXT.get("calls", 0) + 1
            return super().trunk(h, c)

    model = make(Counted)
    with runs_of(model.blocks) as counts:
        results(eager(model))
    assert counts == [len(STEPS) + more for more in (3, 1, 1)]


class RandomBlock(Block):
    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return super().forward(h, c) + torch.rand_like(h)


class OwnCountBlock(Block):
    """A state of its own, which is the block's business."""

    calls = 0

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(h, c) * self.calls


@pytest.mark.parametrize("kind", [RandomBlock, OwnCountBlock], ids=lambda kind: kind.__name__)
def test_blocks_with_a_state_of_their_own_go_on_from_it(kind: type[nn.Module]) -> None:
    class Own(ToyDiT):
        def block(self) -> nn.Module:
            return kind()

    model, other = make(Own), make(Own)
    torch.manual_seed(3)
    want = results(other)
    torch.manual_seed(3)
    assert same(results(eager(model)), want)


def test_a_block_that_counts_elsewhere_is_not_taken_for_one_that_reads_a_variable() -> None:
    count = [0]

    class Elsewhere(Block):
        def forward(self, h: Tensor, c: Tensor) -> Tensor:
            count[0] += 1
            return super().forward(h, c) * count[0]

    model = make(ToyDiT)
    model.blocks[0] = new(Elsewhere)
    assert len(results(eager(model))) == len(STEPS)
