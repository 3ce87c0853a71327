"""Threads: each gets what it gets alone, and a capture changes nothing for the others."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, fx, nn
from torch._C._dynamo import eval_frame

import dit_cache_fx
from dit_cache_fx._torch import dynamo_callback, not_a_compiled_frame, signatures_kept
from dit_cache_fx.dynamo.parts import _AtFirstCall
from dit_cache_fx.helpers import DeepCacheHelper
from dit_cache_fx.lowering import Part
from dit_cache_fx.runtime import execution
from dit_cache_fx.runtime.drive import Compiler, drive
from dit_cache_fx.runtime.entry import input_key
from dit_cache_fx.runtime.first_runs import FirstRuns
from dit_cache_fx.runtime.step import Step
from dit_cache_fx.runtime.step_compiler import StepCompiler
from dit_cache_fx.runtime.tracking.branches import Branch
from tests.compile.compiling import RULE, Counting
from tests.toys import MaskedDiT, ToyDiT, make, toy_inputs

T = TypeVar("T")

STEPS = {0, 2, 3}
THREADS = 4
#: seconds after which a test that waits has failed
PATIENCE = 120
CALL = nn.Module.__call__


def together(work: Sequence[Callable[[], T]]) -> list[T]:
    """Run each in a thread of its own, all from one moment on."""
    start = threading.Barrier(len(work))

    def run(one: Callable[[], T]) -> T:
        start.wait(PATIENCE)
        with torch.no_grad():
            return one()

    return [future.result(PATIENCE) for future in [begun(partial(run, one)) for one in work]]


def begun(work: Callable[[], T]) -> Future[T]:
    """Run it in a thread that nobody has to wait for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def elsewhere(work: Callable[[], T]) -> T:
    """Run it in another thread while this one waits."""
    return together([work])[0]


@pytest.fixture(autouse=True)
def _new_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def steps(model: Any, seed: int = 0, number: int = 6) -> list[Tensor]:
    """What a generation of a prompt gives."""
    return [model(**inputs(step, seed)) for step in range(number)]


def inputs(step: int, seed: int = 0) -> dict[str, Any]:
    return toy_inputs(900.0 - 100 * step, seed=100 * seed + step, prompt=seed)


def same(got: Sequence[Tensor], want: Sequence[Tensor]) -> bool:
    return all(map(torch.equal, got, want))


def untouched(model: nn.Module) -> bool:
    """Whether nothing of a capture is left in a model, or in torch."""
    names = {name for module in model.modules() for name in vars(module)}
    return nn.Module.__call__ is CALL and "_call_impl" not in names


# --- first calls at the same time ----------------------------------------------------------------

OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("deepcache", {"no_cache_steps": STEPS}),
    ("taylorcache", {"no_cache_steps": STEPS}),
    RULE,
)


def eager(model: nn.Module, strategy: str, options: dict[str, Any]) -> Any:
    return dit_cache_fx.apply(model, strategy, **options)


def in_one_graph(model: nn.Module, strategy: str, options: dict[str, Any]) -> Any:
    return torch.compile(eager(model, strategy, options), backend="eager")


def compiled_steps(model: nn.Module, strategy: str, options: dict[str, Any]) -> Any:
    cached = eager(model, strategy, options)
    cached.compile_steps(backend="eager", fullgraph=True)
    return cached


def as_a_backend(model: nn.Module, strategy: str, options: dict[str, Any]) -> Any:
    cache = dit_cache_fx.backend(strategy, inner="eager", **options)
    return torch.compile(model, backend=cache)


@pytest.mark.parametrize("way", [eager, in_one_graph, compiled_steps, as_a_backend])
def test_each_thread_gets_what_it_gets_alone(way: Callable[..., Any]) -> None:
    models = [make(ToyDiT) for _ in range(THREADS)]
    ready = [way(m, *OPTIONS[i % len(OPTIONS)]) for i, m in enumerate(models)]
    got = together([partial(steps, model, seed) for seed, model in enumerate(ready)])
    torch._dynamo.reset()
    for seed, model in enumerate(models):
        assert same(got[seed], steps(way(model, *OPTIONS[seed % len(OPTIONS)]), seed))
        assert untouched(model)


class MeetingDiT(ToyDiT):
    """Waits, in each run of its forward, for the other threads' runs."""

    meets: threading.Barrier | None = None

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        if MeetingDiT.meets is not None:
            MeetingDiT.meets.wait(PATIENCE)
        return super().forward(x, timestep, text)


def test_captures_of_shared_modules_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several caches over one model; the captures go through each of their phases together."""
    model = make(MeetingDiT)
    options = [("deepcache", {"no_cache_steps": STEPS}), ("taylorcache", {"no_cache_steps": STEPS})]
    want = [steps(eager(model, *options[seed % 2]), seed) for seed in range(THREADS)]
    monkeypatch.setattr(MeetingDiT, "meets", threading.Barrier(THREADS))
    ready = [eager(model, *options[seed % 2]) for seed in range(THREADS)]
    got = together([partial(steps, cached, seed) for seed, cached in enumerate(ready)])
    assert all(map(same, got, want))
    assert untouched(model)


class Tally:
    """Counts apart from the model: what forward leaves on its modules is the model's state."""

    count = 0


class CountedDiT(ToyDiT):
    """Counts its forward's runs."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = Tally()

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        self.runs.count += 1
        return super().forward(x, timestep, text)


def test_a_graph_is_captured_once() -> None:
    alone, model = make(CountedDiT), make(CountedDiT)
    eager(alone, *OPTIONS[0])._captured((), inputs(0))
    cached = eager(model, *OPTIONS[0])
    found = together([lambda: cached._captured((), inputs(0))[0]] * THREADS)
    assert len({id(entry) for entry in found}) == 1
    assert model.runs.count == alone.runs.count > 0


def test_a_graph_is_seen_by_others_once_it_is_checked() -> None:
    """Each thread has to check a graph of its own; none gets an unchecked one."""
    engine = eager(make(ToyDiT), *OPTIONS[0])._engine
    call = engine._flat((), inputs(0))

    def fails() -> None:
        with pytest.raises(ZeroDivisionError):
            engine.graphs.find(call, input_key(call), lambda _: 1 / 0)

    together([fails] * THREADS)
    assert not engine.graphs.all()


def test_known_graphs_do_not_wait_for_a_capture() -> None:
    """While one shape is captured, another thread is answered for another one."""

    class Interrupted(ToyDiT):
        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
            if self.__dict__.get("meanwhile"):
                elsewhere(self.__dict__["meanwhile"])
            return super().forward(x, timestep, text)

    model = make(Interrupted)
    cached = eager(model, *OPTIONS[0])
    known = cached._captured((), inputs(0))[0]
    found: list[Any] = []
    vars(model)["meanwhile"] = lambda: found.append(cached._captured((), inputs(0))[0])
    other = cached._captured((), toy_inputs(900.0, size=1))[0]
    assert found
    assert all(entry is known for entry in found)
    assert other is not known


def test_shapes_of_masks_are_those_of_the_call() -> None:
    """Threads whose masks select other numbers of rows do not mix them up."""
    cached = eager(make(MaskedDiT), *OPTIONS[0])
    masks = (torch.tensor([[True] * n + [False] * (4 - n)]) for n in (3, 2))
    arguments = [{**inputs(0), "mask": mask} for mask in masks]
    for given in arguments:
        cached(**given)
    check: Any = pytest.fail
    engine = cached._engine

    def shapes(given: dict[str, Any]) -> set[Any]:
        call = engine._flat((), given)
        return {engine.graphs.find(call, input_key(call), check).shapes for _ in range(50)}

    first, second = together([partial(shapes, given) for given in arguments])
    assert len(first) == len(second) == 1
    assert first != second


# --- compiled once -------------------------------------------------------------------------------


def test_a_compiled_kind_of_step_is_compiled_once() -> None:
    cached, counting = eager(make(ToyDiT), *OPTIONS[0]), Counting()
    entry, call, _ = cached._captured((), inputs(0))
    compiler = StepCompiler({"backend": counting})
    step = Step(cached._engine.subject.strategy, Branch(), 0, entry.variants.cached)

    def run() -> Sequence[Tensor]:
        part = compiler.compiled(entry.variants).compute
        given = {**entry.inputs(call), **step.compiled_given(part.names)}
        return part.run(*part.operands(given))

    results = together([run] * THREADS)
    assert counting.count == 1
    assert all(same(result, results[0]) for result in results)


@pytest.mark.parametrize("apart", [False, True])
def test_one_graph_is_lowered_and_compiled_once(apart: bool) -> None:
    """Or, where there can be none, that of each kind of step."""
    cached, counting = eager(make(ToyDiT), *OPTIONS[0]), Counting()
    entry, call, _ = cached._captured((), inputs(0))
    entry.apart = apart
    strategy = cached._engine.subject.strategy
    watched: list[Any] = []

    @torch.compiler.disable
    def serving(callback: Any) -> Any:
        step = Step(strategy, Branch(), 0, entry.variants.cached)
        watched.append(entry.compiled_steps if apart else entry.one_graph)
        return execution.watched(entry, step, call, Compiler(callback))

    @not_a_compiled_frame
    def run() -> Any:
        return drive(serving(dynamo_callback()))

    compiled = torch.compile(run, backend=counting)
    results = together([compiled] * THREADS)
    assert counting.count == 1
    assert len({id(one) for one in watched}) == 1
    assert all(same(result, results[0]) for result in results)


def test_a_graph_of_the_backend_is_compiled_once() -> None:
    compiles: list[Any] = []
    graph = fx.Graph()
    graph.output((graph.call_function(torch.neg, (graph.placeholder("x"),)),))
    gm = fx.GraphModule(nn.Module(), graph)

    def compile_graph(given: fx.GraphModule, _: Any) -> Any:
        compiles.append(given)
        return given.forward

    first = _AtFirstCall(compile_graph, Part(gm, ("x",)), {})
    results = together([lambda: first(torch.ones(2))] * THREADS)
    assert len(compiles) == 1
    assert all(torch.equal(result[0], -torch.ones(2)) for result in results)


def test_what_the_backend_does_not_cache_is_compiled_once() -> None:
    model, counting = make(ToyDiT), Counting()
    cache = dit_cache_fx.backend("deepcache", no_cache_steps=STEPS, inner=counting)
    compiled = torch.compile(model, backend=cache)
    compiled(**inputs(0))
    before = counting.count
    cache.disable()
    results = together([lambda: compiled(**inputs(0))] * THREADS)
    assert counting.count == before + 1
    assert all(torch.equal(result, model(**inputs(0))) for result in results)


class NumberedDiT(ToyDiT):
    """Takes the timestep as a number."""

    def forward(self, x: Tensor, timestep: float, text: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, torch.full((1,), timestep), text)


def test_what_it_does_not_cache_is_compiled_once_for_each_number() -> None:
    model, counting = make(NumberedDiT), Counting()
    cache = dit_cache_fx.backend("deepcache", no_cache_steps=STEPS, inner=counting)
    compiled = torch.compile(model, backend=cache)
    calls = [{**inputs(0), "timestep": time} for time in (60.0, 50.0, 40.0)]
    for given in calls:
        compiled(**given)
    before = counting.count
    cache.disable()
    for times, given in enumerate(calls[1:], 1):
        results = together([partial(compiled, **given)] * THREADS)
        assert counting.count == before + times
        assert all(torch.equal(result, model(**given)) for result in results)


def test_a_second_graph_of_one_program_goes_on_from_the_first() -> None:
    """Dynamo makes a graph for each thread that waits for it; later calls get any of them."""
    model = make(ToyDiT)
    cache = dit_cache_fx.backend("deepcache", no_cache_steps=STEPS, inner="eager")
    given = [inputs(step) for step in range(2)]
    given[1]["text"] = given[0]["text"]
    alone = torch.compile(model, backend=cache)
    want = [alone(**arguments) for arguments in given]
    cache.reset_states()
    compiled = torch.compile(model, backend=cache)
    first = compiled(**given[0])
    torch._dynamo.reset()
    assert same([first, compiled(**given[1])], want)
    assert [r.action for r in cache.cache_report().timeline] == ["computed", "reused"]
    assert len(cache._lowered()) == 1


def test_a_first_run_goes_alone_until_it_succeeds() -> None:
    runs, firsts = FirstRuns(), list[bool]()

    def run(error: bool = False) -> None:
        with runs.alone("kind") as first:
            firsts.append(first)
            if error:
                raise ZeroDivisionError
            if first:
                threading.Event().wait(0.3)  # the others come meanwhile

    with pytest.raises(ZeroDivisionError):
        run(error=True)
    together([run] * THREADS)
    assert firsts == [True, True] + [False] * (THREADS - 1)
    with runs.alone("another kind") as first:
        assert first


# --- what a capture changes ----------------------------------------------------------------------


class OpenDiT(ToyDiT):
    """Runs something in each run of its own code: in each phase of a capture."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        if self.__dict__.get("look"):
            self.__dict__["look"]()
        return super().forward(x, timestep, text)


def looking(model: nn.Module, look: Callable[[], None]) -> int:
    """Capture `model`, and look in each phase; returns how often."""
    looks: list[None] = []
    vars(model)["look"] = lambda: (look(), looks.append(None))
    cached = eager(model, *OPTIONS[0])
    given = inputs(0)
    got = cached(**given)
    del vars(model)["look"]
    assert torch.equal(got, model(**given))
    assert len(looks) > 2
    assert untouched(model)
    return len(looks)


def test_a_capture_leaves_torch_as_it_is() -> None:
    seen: list[bool] = []

    def look() -> None:
        seen.append(nn.Module.__call__ is CALL)
        seen.append(not torch.fx._symbolic_trace._is_fx_tracing_flag)

    looking(make(OpenDiT), look)
    assert all(seen)


def test_a_capture_leaves_modules_as_they_are_while_their_graph_is_compiled() -> None:
    """Dynamo reads them for its guards again, after the graph is compiled."""
    model = make(ToyDiT)
    changed: list[bool] = []
    captures: list[Future[Any]] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        if not captures:
            captures.append(begun(lambda: called(0, 1)))
            deadline = time.monotonic() + 0.5
            while time.monotonic() < deadline and not captures[0].done():
                changed.append("_call_impl" in vars(model.blocks[0]))
                time.sleep(0.001)
        return gm.forward

    def called(step: int, size: int) -> Tensor:
        with torch.no_grad():
            given = toy_inputs(900.0 - 100 * step, size=size)
            return cached(**given)  # type: ignore[no-any-return]

    cached = eager(model, *OPTIONS[0])
    cached.compile_steps(backend=backend)
    want = [model(**toy_inputs(900.0, size=size)) for size in (0, 1)]
    got = [called(0, 0), captures[0].result(PATIENCE)]
    assert same(got, want)
    assert changed
    assert not any(changed)


@pytest.mark.parametrize("shared", [False, True])
def test_another_thread_compiles_during_a_capture(shared: bool) -> None:
    """Something else, or the very blocks that are captured."""
    model = make(OpenDiT)
    if shared:
        model.blocks[0].register_forward_hook(lambda *_: None)
    block = model.blocks[0] if shared else make(ToyDiT).blocks[0]
    h, c = torch.ones(1, 3, 8), torch.ones(1, 8)
    want = block(h, c)

    def compile_it() -> None:
        counting = Counting()
        got = torch.compile(block, backend=counting, fullgraph=True)(h, c)
        assert torch.equal(got, want)
        assert counting.count == 1

    looking(model, lambda: elsewhere(compile_it))


def test_another_thread_calls_the_modules_that_are_captured() -> None:
    model, calls = make(OpenDiT), list[Any]()
    block, h, c = model.blocks[0], torch.ones(1, 3, 8), torch.ones(1, 8)
    want = block(h, c)
    block.register_forward_hook(lambda *call: calls.append(call[-1]))
    looks = looking(model, lambda: calls.append(elsewhere(partial(block, h, c))))
    assert len([call for call in calls if torch.equal(call, want)]) == 2 * looks


def test_copies_made_during_a_capture_are_whole() -> None:
    model, copies = make(OpenDiT), list[nn.Module]()
    h, c = torch.ones(1, 3, 8), torch.ones(1, 8)
    want = model.blocks[0](h, c)

    def look() -> None:
        copies.append(copy.deepcopy(model.blocks))
        copies.append(pickle.loads(pickle.dumps(model.blocks)))

    looking(model, lambda: elsewhere(look))
    with torch.no_grad():
        for parameter in model.blocks[0].parameters():
            parameter.zero_()
    for blocks in copies:
        assert torch.equal(blocks[0](h, c), want)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_blocks_are_compiled_once_and_stay_compiled(fullgraph: bool) -> None:
    model, counting = make(ToyDiT), Counting()
    model.blocks[0].mix.register_forward_hook(lambda *_: None)
    for block in model.blocks:
        block.compile(backend=counting, fullgraph=fullgraph)
    impls = [block._compiled_call_impl for block in model.blocks]
    got = steps(eager(model, *OPTIONS[0]))
    made = counting.count
    assert made > 0
    assert [block._compiled_call_impl for block in model.blocks] == impls
    want = steps(eager(model, *OPTIONS[0]))
    assert same(got, want)
    assert counting.count == made
    assert untouched(model)


def test_a_capture_that_fails_leaves_the_modules_as_they_are() -> None:
    model = make(OpenDiT)
    model.head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        eager(model, *OPTIONS[0])(**inputs(0))
    assert untouched(model)


def test_a_compiled_function_in_the_models_own_code() -> None:
    """It is traced as what it computes, compiled before or not."""

    @torch.compile(backend="aot_eager")
    def shifted(c: Tensor) -> Tensor:
        return torch.sin(c) + 1

    class Shifted(ToyDiT):
        def condition(self, timestep: Tensor, text: Tensor) -> Tensor:
            return shifted(super().condition(timestep, text))

    model = make(Shifted)
    for _ in range(2):
        got = steps(eager(model, *OPTIONS[0]), number=3)
        want = steps(model, number=3)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[2], want[2])


# --- the patch of Dynamo -------------------------------------------------------------------------

SIGNATURES: Any = torch._dynamo.variables.functions.InspectSignatureVariable


def test_threads_share_one_patch_and_the_last_one_takes_it_out() -> None:
    before = vars(SIGNATURES)["call_function"]
    one, another = signatures_kept(), signatures_kept()
    one.__enter__()
    patch = vars(SIGNATURES)["call_function"]
    another.__enter__()
    assert vars(SIGNATURES)["call_function"] is patch is not before
    one.__exit__(None, None, None)
    assert vars(SIGNATURES)["call_function"] is patch
    another.__exit__(None, None, None)
    assert vars(SIGNATURES)["call_function"] is before


def test_dynamo_is_patched_only_while_it_compiles() -> None:
    before, patched = vars(SIGNATURES)["call_function"], list[bool]()

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        def run(*operands: Tensor) -> Any:
            patched.append(vars(SIGNATURES)["call_function"] is not before)
            return gm.forward(*operands)

        return run

    models = [make(ToyDiT) for _ in range(2)]
    ready = [torch.compile(eager(m, *OPTIONS[0]), backend=backend) for m in models]
    together([partial(steps, compiled, seed) for seed, compiled in enumerate(ready)])
    assert vars(SIGNATURES)["call_function"] is before
    patched.clear()
    for compiled in ready:
        compiled(**inputs(5))
    assert patched == [False, False]


class InspectsDiT(ToyDiT):
    """Its blocks look at a signature, as diffusers' attention does for its processor."""

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def process(self, h: Tensor, scale: float = 2.0) -> Tensor:
            return self.linear(h) * scale

        def forward(self, h: Tensor, c: Tensor) -> Tensor:
            known = set(inspect.signature(self.process).parameters.keys())
            return self.process(h) if "scale" in known else h.clone()

    def block(self) -> nn.Module:
        return self.Looks()


def test_what_is_compiled_again_later_is_compiled_with_the_patch() -> None:
    model = make(InspectsDiT)
    options = {"no_cache_steps": STEPS, "no_cache_block_id": {"blocks": {0}}}
    cached = eager(model, "deepcache", options)
    compiled = torch.compile(cached, backend="eager", fullgraph=True)
    want = steps(cached)
    cached.clear_states()
    got = steps(compiled, number=3)
    torch._dynamo.reset()
    got += [compiled(**inputs(step)) for step in range(3, 6)]
    assert same(got, want)


# --- flags of the process ------------------------------------------------------------------------


class Held:
    """A compilation or an export that stays under way in another thread."""

    def __init__(self, begin: Callable[[Callable[[], None]], Any]) -> None:
        self._begin = begin
        self._inside, self._go = threading.Event(), threading.Event()

    def _wait(self) -> None:
        self._inside.set()
        assert self._go.wait(PATIENCE)

    def _run(self) -> None:
        with torch.no_grad():
            self._begin(self._wait)

    def __enter__(self) -> None:
        self._future = begun(self._run)
        assert self._inside.wait(PATIENCE), self._future.exception(0)

    def __exit__(self, *_: Any) -> None:
        self._go.set()
        self._future.result(PATIENCE)


def compiling(wait: Callable[[], None]) -> None:
    def backend(gm: fx.GraphModule, _: Any) -> Any:
        wait()
        return gm.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))


def exporting(wait: Callable[[], None]) -> None:
    class Waits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            wait()
            return x + 1

    torch.export.export(Waits(), (torch.ones(1),), strict=False)


each_holder = pytest.mark.parametrize("holder", [compiling, exporting])


@each_holder
def test_a_thread_is_served_while_another_one_compiles(holder: Any) -> None:
    cached = eager(make(ToyDiT), *OPTIONS[0])
    want = steps(cached)
    cached.clear_states()
    with Held(holder):
        assert torch.compiler.is_compiling()
        got = steps(cached)
    assert same(got, want)
    assert [r.action == "computed" for r in cached.cache_report().timeline] == [
        step in STEPS for step in range(6)
    ]


@each_holder
def test_a_compiled_thread_is_served_while_another_one_compiles(holder: Any) -> None:
    model = make(ToyDiT)
    cached = eager(model, *OPTIONS[0])
    compiled = torch.compile(cached, backend="eager", fullgraph=True)
    want = steps(compiled)
    cached.clear_states()
    with Held(holder):
        got = steps(compiled)
    assert same(got, want)


@each_holder
def test_a_helpers_model_is_served_while_another_thread_compiles(holder: Any) -> None:
    model = make(ToyDiT)
    helper = DeepCacheHelper(model.blocks, no_cache_steps=STEPS, model=model)
    helper.enable()

    def generation() -> list[Tensor]:
        outputs = []
        helper.clear_states()
        for step in range(6):
            helper.cur_timestep = step
            outputs.append(model(**inputs(step)))
        return outputs

    want = generation()
    with Held(holder):
        got = generation()
    assert same(got, want)


def test_a_capture_while_another_thread_compiles() -> None:
    model = make(ToyDiT)
    want = steps(eager(model, *OPTIONS[0]))
    with Held(compiling):
        got = steps(eager(model, *OPTIONS[0]))
    assert same(got, want)


def test_a_helpers_model_answers_two_threads_from_its_cache() -> None:
    """While one thread is inside of the model, another thread's call is cached too."""
    model = make(ToyDiT)
    helper = DeepCacheHelper(model.blocks, no_cache_steps=STEPS, model=model)
    helper.enable()
    other = toy_inputs(900.0, size=1)
    for given in (inputs(0), other):
        model(**given)
    assert helper.cached is not None
    calls = helper.cached._engine.call_log.calls
    before = sum(calls.values())
    todo = [partial(model, **other)]

    def hook(*_: Any) -> None:
        if todo:
            elsewhere(todo.pop())

    model.head.register_forward_hook(hook)
    model(**inputs(0))
    assert not todo
    assert sum(calls.values()) == before + 2


def test_modules_are_listed_as_they_are_while_another_thread_exports() -> None:
    cached = eager(make(ToyDiT), *OPTIONS[0])
    cached(**inputs(0))
    names = [name for name, _ in cached.named_modules()]
    with Held(exporting):
        assert [name for name, _ in cached.named_modules()] == names


def test_gradients_are_wanted_while_another_thread_exports() -> None:
    """What this thread compiles is not an export, so gradients go through the model itself."""
    model = make(ToyDiT)
    cached = eager(model, *OPTIONS[0])
    cached(**inputs(0))

    @torch.compile(backend="eager", fullgraph=True)
    def loss(given: dict[str, Any]) -> Tensor:
        result: Tensor = cached(**given).sum()
        return result

    with Held(exporting), torch.enable_grad():
        loss(inputs(1)).backward()
    assert model.blocks[0].mix.weight.grad is not None


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_is_one_even_if_another_thread_has_cleared_its_flag(
    strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(ToyDiT)
    cached = eager(model, *OPTIONS[0])
    given = inputs(0)
    cached(**given)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cached = cached

        def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
            if not torch.compiler.is_dynamo_compiling():
                monkeypatch.setattr(torch.compiler, "_is_compiling_flag", False)
            result: Tensor = self.cached(x, timestep, text)
            return result

    program = torch.export.export(Outer(), tuple(given.values()), strict=strict)
    targets = {str(n.target) for n in program.graph.nodes}
    assert "cond" in targets


def test_a_call_in_one_graph_whose_count_of_frames_another_thread_has_begun_anew() -> None:
    """`fullgraph=True` counts the frames of all threads in one place."""

    def begin_anew() -> None:
        eval_frame.set_fullgraph_compiled_frame_count(-1)  # as a call does twice when it ends
        eval_frame.set_fullgraph_compiled_frame_count(0)

    def disturbed(gm: fx.GraphModule, given: Sequence[Tensor]) -> Callable[..., Any]:
        def run(*operands: Tensor) -> Any:
            elsewhere(begin_anew)
            return gm(*operands)

        return run

    cached = dit_cache_fx.apply(make(ToyDiT), "deepcache", no_cache_steps=STEPS)
    compiled = torch.compile(cached, backend=disturbed, fullgraph=True)
    want = dit_cache_fx.apply(make(ToyDiT), "deepcache", no_cache_steps=STEPS)
    assert same(steps(compiled), steps(want))
