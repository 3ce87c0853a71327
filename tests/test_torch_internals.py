"""`dit_cache_fx/_torch.py` is the one place that reaches into torch: this says when torch moves."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from inspect import signature
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._C._dynamo import eval_frame
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd import frontend_utils
from torch._guards import TracingContext
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import dit_cache_fx
from dit_cache_fx import _torch
from dit_cache_fx._torch import (
    CompiledFrame,
    Emitter,
    LazyGraphModule,
    Piece,
    all_gathered,
    all_reduced,
    aoti_load,
    aoti_package,
    attention_backends,
    beside_distributed,
    between_compilations,
    breaks_raise,
    broadcast,
    cannot_compile,
    compiled_frame,
    constant_result,
    depends_on_data,
    dynamo_callback,
    dynamos_tensor,
    emit_autocast,
    emit_end_of_autocast,
    emit_node,
    exporting,
    fakes,
    frame_is_compiled,
    generate_code,
    inductor_compiler,
    is_sized_by_data,
    is_subclass,
    like_dynamos,
    look_again,
    members,
    modes,
    not_a_compiled_frame,
    opaque,
    piece_of,
    reads_data,
    signatures_kept,
    sizes_are_captured,
    trace_functional,
    trace_shapes,
    trace_text,
    traced_here,
    unseen,
    untraced,
    use_attention_backends,
    wants_one_graph,
    with_code_of_its_own,
    without_mode,
)
from dit_cache_fx.capture.intercept import intercepted
from dit_cache_fx.values.tensor_spec import TensorSpec
from tests.pipelines.int8 import Int8Weight

PACKAGE = Path(dit_cache_fx.__file__).parent


def double(tensor: torch.Tensor) -> torch.Tensor:
    raise AssertionError("a node's target, never run")


class Doubling:
    """An opaque call that doubles a tensor."""

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [tensors[0] * 2]

    def emit(self, graph: Emitter, inputs: Sequence[Any], outputs: Any) -> Sequence[Any]:
        return [graph.call(double, tuple(inputs), {}, "double")]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_opaque_call_is_one_node_under_make_fx_and_functionalize(mode: Any) -> None:
    def function(x: torch.Tensor) -> list[torch.Tensor]:
        (y,) = opaque(Doubling(), [x + 1])
        y += 1
        return [y]

    x = torch.ones(3)
    with mode():
        gm = trace_functional(function, [x])
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert targets == [torch.ops.aten.add.Tensor, double, torch.ops.aten.add.Tensor]


def test_opaque_call_runs_outside_of_tracing() -> None:
    assert torch.equal(opaque(Doubling(), [torch.ones(2)])[0], torch.full((2,), 2.0))
    x = torch.ones(2, requires_grad=True)
    assert torch.equal(opaque(Doubling(), [x])[0], torch.full((2,), 2.0))


def test_functional_trace_has_no_in_place_operators() -> None:
    def function(x: torch.Tensor) -> list[torch.Tensor]:
        y = x.clone()
        y[:, 1:] += 1
        return [y.relu_()]

    gm = trace_functional(function, [torch.ones(2, 3)])
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert not [t for t in targets if t._schema.is_mutable]
    assert torch.equal(gm(torch.ones(2, 3))[0], torch.tensor([[1.0, 2, 2], [1, 2, 2]]))


def test_a_trace_makes_one_fake_mode_for_its_stand_ins() -> None:
    gm = trace_functional(lambda x: opaque(Doubling(), [x + 1]), [torch.ones(2)])
    nodes = [n for n in gm.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    assert len({n.meta["val"].fake_mode for n in nodes}) == 1 < len(nodes)


def test_an_opaque_call_sees_nothing_of_the_trace() -> None:
    """A compiled block compiles as it does elsewhere."""

    class Looking(Doubling):
        def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            assert TracingContext.try_get() is None
            return super().run(tensors)

    trace_functional(lambda x: opaque(Looking(), [x]), [torch.ones(2)])
    assert TracingContext.try_get() is None


def test_a_lazy_graph_has_code_when_it_is_needed(generated: list[fx.Graph]) -> None:
    gm = trace_functional(lambda x: [x + 1], [torch.ones(2)])
    assert isinstance(gm, LazyGraphModule)
    assert not generated
    assert torch.equal(gm(torch.ones(2))[0], torch.full((2,), 2.0))
    gm(torch.ones(2))
    assert len(generated) == 1
    outer_graph = fx.Graph()
    root = nn.Module()
    root.inner = trace_functional(lambda x: [x + 1], [torch.ones(2)])
    outer_graph.output(outer_graph.call_module("inner", (outer_graph.placeholder("x"),)))
    outer = LazyGraphModule(root, outer_graph)
    generate_code(outer)
    assert len(generated) == 3
    compiled = torch.compile(outer.forward, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2))[0], torch.full((2,), 2.0))


class Reads(TorchDispatchMode):
    """Adds a node beside every addition."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.add.Tensor:
            assert emit_node(read, (args[0],), {}, "read")
        return func(*args, **(kwargs or {}))


@fx.has_side_effect
def read(tensor: torch.Tensor) -> None:
    raise AssertionError("a node's target, never run")


def test_emit_node_adds_a_reader_of_traced_values_only() -> None:
    def function(x: torch.Tensor) -> list[torch.Tensor]:
        with Reads():
            return [x + 1]

    gm = trace_functional(function, [torch.ones(2)])
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert targets == [read, torch.ops.aten.add.Tensor]
    assert not emit_node(read, (torch.ones(2),), {}, "read")


class Naming(TorchFunctionMode):
    """Notes the functions that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_function_mode_can_be_left_for_a_while() -> None:
    with Naming() as mode:
        torch.zeros(1)
        with without_mode(Naming):
            torch.ones(1)
        with without_mode(TorchDispatchMode):  # another kind
            torch.full((1,), 2.0)
    assert mode.seen == ["zeros", "full"]


def test_values_that_are_not_there_have_errors_of_their_own() -> None:
    spec = TensorSpec(torch.Size([2]), torch.float32, torch.device("cpu"))
    for read in (lambda x: [x * float(x[0])], lambda x: [x if x.sum() > 0 else -x]):
        with pytest.raises(reads_data()):
            trace_shapes(read, [spec])
    with pytest.raises(reads_data()):
        trace_shapes(lambda x: [x.nonzero()], [spec])


def test_trace_shapes_needs_no_data() -> None:
    spec = TensorSpec(torch.Size([10**6, 10**6]), torch.float32, torch.device("cpu"))
    graph = trace_shapes(lambda x: [x * 2], [spec]).graph
    assert [n.target for n in graph.nodes if n.op == "call_function"] == [torch.ops.aten.mul.Tensor]


def test_trace_shapes_keeps_the_kind_of_every_tensor() -> None:
    cpu, meta = torch.device("cpu"), torch.device("meta")
    specs = [
        TensorSpec(torch.Size([2]), torch.bool, cpu),
        TensorSpec(torch.Size([]), torch.float64, meta),
    ]
    graph = trace_shapes(lambda a, b: [a.to(b.device), b + 1], specs).graph
    results: Any = graph.output_node().args[0]
    assert [TensorSpec.of(n.meta["val"]) for n in results] == [
        specs[0]._replace(device=meta),
        specs[1],
    ]


def test_untraced_operations_are_not_in_the_graph() -> None:
    def function(x: torch.Tensor) -> list[torch.Tensor]:
        with untraced():
            torch.ones(2) * 2
        return [x + 1]

    gm = trace_functional(function, [torch.ones(2)])
    targets = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert targets == [torch.ops.aten.add.Tensor]


def test_a_trace_replaces_nothing_for_other_threads() -> None:
    call, seen = nn.Module.__call__, []

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        flag = torch.fx._symbolic_trace._is_fx_tracing_flag
        seen.append(nn.Module.__call__ is call and not flag)
        return [x + 1]

    trace_functional(function, [torch.ones(2)])
    trace_shapes(function, [TensorSpec.of(torch.ones(2))])
    assert seen == [True, True]


def test_a_trace_has_constants_of_its_own() -> None:
    """A parameter, a tensor and a result that is an input."""
    weight, shift = nn.Parameter(torch.ones(2)), torch.full((2,), 3.0)
    with torch.no_grad():
        gm = trace_functional(lambda x, y: [x * weight + shift, y], [torch.ones(2), torch.ones(1)])
        got = gm(torch.full((2,), 2.0), torch.zeros(1))
    assert torch.equal(got[0], torch.full((2,), 5.0))
    assert torch.equal(got[1], torch.zeros(1))
    constants = [getattr(gm, str(n.target)) for n in gm.graph.nodes if n.op == "get_attr"]
    assert any(value is weight for value in constants)


def test_a_call_is_known_to_be_traced_by_its_thread_and_its_values() -> None:
    seen: list[bool] = []

    def function(x: torch.Tensor) -> list[torch.Tensor]:
        seen.append(traced_here(()))
        return [x + 1]

    x = torch.ones(2)
    assert not traced_here((x, None))
    trace_functional(function, [x])
    with fakes([x]) as (fake,):
        function(fake)
    assert seen == [True, True]
    assert traced_here((None, fake))
    assert not traced_here((x,))


# --- Dynamo --------------------------------------------------------------------------------------


class Frames:
    """A backend that notes the operations of the graphs it is given."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def __call__(self, gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        calls = ("call_function", "call_method")
        self.seen.append([n.name for n in gm.graph.nodes if n.op in calls])
        return gm.forward


@pytest.fixture
def _new_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


new_compiler = pytest.mark.usefixtures("_new_compiler")


@new_compiler
def test_what_is_not_a_compiled_frame_calls_compiled_ones() -> None:
    def inner(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    @not_a_compiled_frame
    def outer(x: torch.Tensor) -> torch.Tensor:
        return inner(x + 1).cos()

    frames, x = Frames(), torch.ones(2)
    assert torch.equal(torch.compile(outer, backend=frames)(x), (x + 1).sin().cos())
    assert frames.seen == [["sin"]]


@new_compiler
def test_what_is_not_a_compiled_frame_is_traced_within_another_one() -> None:
    @not_a_compiled_frame
    def inner(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    def outer(x: torch.Tensor) -> torch.Tensor:
        return inner(x).cos()

    frames = Frames()
    torch.compile(outer, backend=frames, fullgraph=True)(torch.ones(2))
    assert frames.seen == [["sin", "cos"]]


@new_compiler
def test_what_is_unseen_runs_as_it_is_with_all_that_it_calls() -> None:
    def inner(x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    def hidden(x: torch.Tensor) -> torch.Tensor:
        return inner(x) + 1

    @not_a_compiled_frame
    def outer(x: torch.Tensor) -> torch.Tensor:
        return inner(unseen(hidden)(x))

    frames, x = Frames(), torch.ones(2)
    assert torch.equal(torch.compile(outer, backend=frames)(x), (x.sin() + 1).sin())
    assert frames.seen == [["sin"]]
    assert unseen(hidden) is unseen(hidden)


@new_compiler
def test_a_constant_result_is_asked_for_while_a_graph_is_made() -> None:
    calls: list[str] = []

    @constant_result
    def name() -> str:
        calls.append("asked")
        return "sin"

    def function(x: torch.Tensor) -> torch.Tensor:
        return x.sin() if name() == "sin" else x.cos()

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), torch.ones(2).sin())
    asked = len(calls)
    compiled(torch.ones(2))
    assert len(calls) == asked > 0


@new_compiler
@pytest.mark.parametrize("fullgraph", [False, True])
def test_the_callback_tells_who_looks_on(fullgraph: bool) -> None:
    seen: list[Any] = []

    @torch.compiler.disable
    def look() -> None:
        seen.append(dynamo_callback())

    def compiled(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    @not_a_compiled_frame
    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(dynamo_callback())
        look()
        return compiled(x)

    assert dynamo_callback() is None
    torch.compile(function, backend="eager", fullgraph=fullgraph)(torch.ones(2))
    looks_on, disabled = seen
    assert looks_on is not None
    assert wants_one_graph(looks_on) == fullgraph
    assert not disabled  # None, or False where only compiled code may run
    assert not wants_one_graph(None)


def _breaks(x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return x + 1


def _branch_breaks(x: torch.Tensor) -> torch.Tensor:
    return torch.cond(x.sum() > 0, _breaks, torch.clone, (x,))


def _wrong_shapes(x: torch.Tensor) -> torch.Tensor:
    return x @ torch.ones(7, 7)


def _refuses(gm: fx.GraphModule, inputs: Any) -> Any:
    raise ZeroDivisionError


@new_compiler
@pytest.mark.parametrize(
    ("function", "backend"),
    [
        (_breaks, "eager"),
        (_branch_breaks, "eager"),
        (_wrong_shapes, "eager"),
        (torch.nn.functional.relu, _refuses),
    ],
    ids=["break", "break in a branch", "wrong operation", "backend"],
)
def test_what_cannot_be_compiled_raises_one_of_these(function: Any, backend: Any) -> None:
    with pytest.raises(cannot_compile()):
        torch.compile(function, backend=backend, fullgraph=True)(torch.ones(2, 3))


@new_compiler
def test_a_break_raises_without_fullgraph() -> None:
    compiled = torch.compile(_breaks, backend="eager")
    with pytest.raises(cannot_compile()), breaks_raise():
        compiled(torch.ones(2))
    torch._dynamo.reset()
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))


class _Inspects(nn.Module):
    """Looks at a signature within a branch, as diffusers' attention does for its processor."""

    def process(self, x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        return x * scale

    def side(self, x: torch.Tensor) -> torch.Tensor:
        known = set(signature(self.process).parameters.keys())
        return self.process(x) if "scale" in known else x.clone()

    def forward(self, flag: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(flag, self.side, self.side, (x,))


def _compile_both_branches() -> torch.Tensor:
    torch._dynamo.reset()
    compiled = torch.compile(_Inspects(), backend="eager", fullgraph=True)
    result: torch.Tensor = compiled(torch.tensor(True), torch.ones(2))
    return result


@new_compiler
def test_signatures_are_kept_apart_in_the_branches_of_cond() -> None:
    with signatures_kept():
        assert torch.equal(_compile_both_branches(), torch.full((2,), 2.0))


@new_compiler
def test_signatures_kept_is_still_needed() -> None:
    """When this fails, torch has been mended: `signatures_kept` can go once 2.13 is not served."""
    with pytest.raises(cannot_compile()):
        _compile_both_branches()


def test_signatures_kept_puts_back_what_it_changes() -> None:
    variable: Any = torch._dynamo.variables.functions.InspectSignatureVariable
    before = vars(variable)["call_function"]
    with suppress(ZeroDivisionError), signatures_kept():
        assert vars(variable)["call_function"] is not before
        raise ZeroDivisionError
    assert vars(variable)["call_function"] is before


# --- export --------------------------------------------------------------------------------------


class _Listed(nn.Module):
    """Notes whether an export is at work when its modules are listed, and when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.listed: list[bool] = []

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        self.listed.append(exporting())
        return super().named_modules(*args, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if exporting() else self.linear(x) * 0


@new_compiler
@pytest.mark.parametrize("strict", [False, True])
def test_exporting(strict: bool) -> None:
    model, x = _Listed().eval(), torch.ones(1, 2)
    assert not exporting()
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=strict)
        assert any(model.listed)
        assert torch.equal(program.module()(x), model.linear(x))
        assert not exporting()
        model.listed.clear()
        list(model.named_modules())
        assert not any(model.listed)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method.:DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")
def test_a_package_carries_metadata(tmp_path: Path) -> None:
    model, x = nn.Linear(2, 2).eval(), torch.ones(1, 2)
    path = tmp_path / "linear.pt2"
    with torch.no_grad():
        aoti_package(torch.export.export(model, (x,)), path, {"who": "we"}, {"max_autotune": False})
        function, metadata = aoti_load(path)
        assert torch.allclose(function(x), model(x))
    assert metadata["who"] == "we"


def test_module_calls_pass_through_module_call() -> None:
    layer, seen = nn.Linear(2, 2), []

    def handle(module: nn.Module, name: str, call: Any, args: Any, kwargs: Any) -> Any:
        seen.append(name)
        return call(module, *args, **kwargs)

    original = nn.Module.__call__
    with intercepted({layer: "layer"}, handle):
        nn.Sequential(layer)(torch.ones(1, 2))
    assert seen == ["layer"]
    assert nn.Module.__call__ is original


def test_module_call_is_restored_after_an_error() -> None:
    original = nn.Module.__call__
    with pytest.raises(ZeroDivisionError), intercepted({}, lambda *_: None):
        raise ZeroDivisionError
    assert nn.Module.__call__ is original


class Listener(logging.Handler):
    """Keeps what torch's structured trace is given."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Any] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def test_trace_text_is_an_artifact_of_the_structured_trace() -> None:
    listener, trace_log = Listener(), logging.getLogger("torch.__trace")
    trace_log.addHandler(listener)
    try:
        trace_text("a_graph", lambda: "a text")
    finally:
        trace_log.removeHandler(listener)
    (record,) = listener.records
    assert record.metadata["artifact"] == {"name": "a_graph", "encoding": "string"}
    assert record.payload == "a text"


def test_trace_text_makes_no_text_where_nobody_listens() -> None:
    trace_text("a_graph", lambda: "a text")  # torch's own handler takes itself away
    trace_text("a_graph", lambda: pytest.fail("called"))


def test_no_other_file_imports_private_torch_modules() -> None:
    private = re.compile(
        r"^\s*(from torch\.(_\w+|fx\.experimental|utils\._pytree)|import torch\._)", re.M
    )
    allowed = {PACKAGE / "_torch.py"}
    found = [p.name for p in PACKAGE.rglob("*.py") if private.search(p.read_text())]
    assert found == [p.name for p in allowed]


def test_the_parameters_of_dynamos_graph_are_known_in_one_made_from_it() -> None:
    """CUDA graphs copy every input but those whose memory stays where it is."""
    kept: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> fx.GraphModule:
        kept.append(gm)
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(nn.Linear(2, 2), backend=keep)(torch.ones(1, 2))
    dynamos = kept[0]
    origins = {n.name: n for n in dynamos.graph.nodes if n.op == "placeholder"}
    parameters = [name for name in origins if "parameters" in name]
    graph = fx.Graph()
    for name in ("held", *origins):
        graph.placeholder(name)
    graph.output(())
    gm = like_dynamos(fx.GraphModule(nn.Module(), graph), dynamos, origins)
    names = [str(n.target) for n in gm.graph.nodes if n.op == "placeholder"]
    _, static = frontend_utils._try_get_metadata_from_dynamo(gm, {}.keys(), len(names), [])
    assert [names[i] for i in static] == parameters
    assert len(parameters) == 2


def test_dynamo_says_which_piece_a_graph_is() -> None:
    pieces: list[Piece] = []

    def note(gm: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> fx.GraphModule:
        pieces.append(piece_of(gm))
        return gm

    def broken(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    def unbroken(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    torch._dynamo.reset()
    torch.compile(broken, backend=note)(torch.ones(1))
    torch.compile(unbroken, backend=note)(torch.ones(1))
    assert [(p.whole, p.first, p.function[1]) for p in pieces] == [
        (False, True, "broken"),
        (False, False, "broken"),
        (True, True, "unbroken"),
    ]


def test_inductor_takes_and_checks_mode_and_options() -> None:
    assert callable(inductor_compiler("reduce-overhead", {"max_autotune": False}))
    with pytest.raises(RuntimeError, match="nothing_such"):
        inductor_compiler(None, {"nothing_such": 1})


def test_backends_compile_real_tensors_for_the_shapes_that_they_have() -> None:
    seen: list[bool] = []

    def compiler(gm: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Any:
        seen.append(all(isinstance(size, int) for t in inputs for size in t.shape))
        return make_boxed_func(gm.forward)

    graph = fx.Graph()
    graph.output((graph.call_function(torch.neg, (graph.placeholder("x"),)),))
    gm = fx.GraphModule(nn.Module(), graph)
    with torch.no_grad():
        run = aot_autograd(fw_compiler=compiler)(gm, [torch.ones(5)])
        assert torch.equal(run(torch.ones(5))[0], -torch.ones(5))
    assert seen == [True]


def test_the_frame_that_dynamo_compiles() -> None:
    frames: list[CompiledFrame] = []

    def note(gm: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> fx.GraphModule:
        frames.append(compiled_frame())
        return gm

    class Inner(nn.Module):
        def forward(self, y: torch.Tensor) -> torch.Tensor:
            return y * 2

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: torch.Tensor, scale: float, *, shift: torch.Tensor) -> torch.Tensor:
            for _ in range(2):  # a break in a loop: Dynamo leaves the whole forward
                torch._dynamo.graph_break()
                x = self.inner(x)
            return x * scale + shift

    whole = Inner()
    outer = Outer()
    torch._dynamo.reset()
    torch.compile(whole, backend=note)(torch.ones(1))
    torch._dynamo.reset()
    torch.compile(outer, backend=note)(torch.ones(1), 3.0, shift=torch.ones(1))
    assert [(f.outer, f.inner) for f in frames] == [(whole, False), (outer, True)]
    assert frames[0].arguments[:2] == ("self", "y")
    assert frames[1].arguments == ("self", "y", "x", "scale", "shift")
    torch._dynamo.reset()
    torch.compile(lambda x, t: x * t, backend=note)(torch.ones(1), 3)
    assert frames[2].numbers == {"t": 3.0}
    assert compiled_frame() == ((), None, False, {})


def test_a_tensor_of_a_number_that_varies_is_made_by_a_function_of_its_own() -> None:
    graphs: list[fx.GraphModule] = []

    def note(gm: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> fx.GraphModule:
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    function = torch.compile(lambda x, t: x * torch.tensor([t]), backend=note)
    for number in (1.5, 2.5):
        function(torch.ones(1), number)
    assert dynamos_tensor() in {n.target for n in graphs[-1].graph.nodes}
    assert dynamos_tensor()([torch.tensor(1.5, dtype=torch.float64)]).dtype is torch.float64


@pytest.mark.parametrize(
    ("function", "depends"),
    [
        (lambda x: x[x > 0] * 2, True),
        (lambda x: x * x.sum().item(), True),
        (lambda x: x[:, 0] * x.shape[0], False),
    ],
)
def test_sizes_from_data_in_dynamos_graph(function: Callable[..., Any], depends: bool) -> None:
    found: list[bool] = []

    def note(gm: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> fx.GraphModule:
        found.append(depends_on_data(gm.graph))
        return gm

    torch._dynamo.reset()
    torch.compile(function, backend=note, fullgraph=True, dynamic=True)(torch.ones(2, 3))
    assert found == [depends]


def test_whether_dynamo_takes_sizes_from_data() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x * (2 if sizes_are_captured() else 3)

    def factor(**options: Any) -> int:
        torch._dynamo.reset()
        return int(torch.compile(function, backend="eager", **options)(torch.ones(())))

    assert (factor(fullgraph=True), factor()) == (2, 3)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert factor() == 2


def test_the_error_of_a_size_from_data() -> None:
    x = torch.ones(2)
    with fakes([x]) as [fake], pytest.raises(reads_data()) as nonzero:
        fake.nonzero()
    with fakes([x]) as [fake], pytest.raises(reads_data()) as item:
        fake.sum().item()
    assert is_sized_by_data(nonzero.value)
    assert not is_sized_by_data(item.value)


def test_dynamo_stops_where_it_raises_unless_it_is_told() -> None:
    """So `look_again` is needed, and does it."""
    compiled: list[bool] = []

    def note(gm: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> fx.GraphModule:
        compiled.append(True)
        return gm

    def breaks(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x

    def works(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    @not_a_compiled_frame
    def outer(x: torch.Tensor, again: bool) -> torch.Tensor:
        callback = dynamo_callback()
        try:
            return breaks(x)
        except cannot_compile():
            if again:
                look_again(callback)
            return works(x)

    torch._dynamo.reset()
    run = torch.compile(outer, backend=note, fullgraph=True)
    with pytest.raises(RuntimeError, match="found no compiled frames"):
        run(torch.ones(1), again=False)
    assert run(torch.ones(1), again=True).item() == 2.0
    assert compiled == [True]
    assert dynamo_callback() is None


def test_aot_autograd_takes_tensors_that_a_graph_holds() -> None:
    """It wants a source for each of them, no two the same."""
    graphs: list[fx.GraphModule] = []

    def note(gm: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> fx.GraphModule:
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    torch.compile(lambda x: x + 1, backend=note)(torch.ones(2))
    graph = fx.Graph()
    x = graph.placeholder("x")
    sums = graph.call_function(torch.add, (x, graph.get_attr("a")))
    graph.output((graph.call_function(torch.add, (sums, graph.get_attr("b"))),))
    owner = nn.Module()
    owner.register_buffer("a", torch.ones(2))
    owner.register_buffer("b", owner.a)
    gm = like_dynamos(fx.GraphModule(owner, graph), graphs[0], {})
    run = aot_autograd(fw_compiler=lambda gm, _: make_boxed_func(gm.forward))(gm, [torch.ones(2)])
    with torch.no_grad():
        assert run(torch.ones(2))[0].tolist() == [3.0, 3.0]


# --- torch's own state ---------------------------------------------------------------------------


def test_attention_backends_are_read_and_set_in_their_order() -> None:
    before = attention_backends()
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True):
        assert attention_backends() == ("MATH", "FLASH_ATTENTION")
        use_attention_backends(("MATH",))
        assert attention_backends() == ("MATH",)
        use_attention_backends(before)
        assert attention_backends() == before
    assert set(attention_backends()) == set(before)
    use_attention_backends(before)


def test_torch_orders_its_kernels_before_their_order_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the first attention on some GPUs it puts another kernel first."""
    ordered: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(_torch, "_let_torch_order_attention", lambda: ordered.append(True))
    attention_backends()
    assert ordered == [True]


def test_every_hook_that_is_registered_counts() -> None:
    layer = nn.Linear(2, 2)
    before = _torch.hooks_registered()
    handle = layer.register_forward_pre_hook(lambda *_: None)
    assert _torch.hooks_registered() > before
    before = _torch.hooks_registered()
    layer.register_forward_hook(lambda *_: None)
    assert _torch.hooks_registered() > before
    before = _torch.hooks_registered()
    handle.remove()
    assert _torch.hooks_registered() == before


def test_every_attention_backend_has_a_name() -> None:
    every = [b.name for b in SDPBackend.__members__.values() if b is not SDPBackend.ERROR]
    with sdpa_kernel([SDPBackend.__members__[name] for name in every]):
        assert set(attention_backends()) == set(every)


def test_modes_are_those_that_see_what_runs() -> None:
    before = modes()
    with TorchDispatchMode(), torch.device("cpu"):
        assert sorted(modes()) == sorted([*before, "DeviceContext", "TorchDispatchMode"])
    assert modes() == before


def test_autocast_is_written_as_dynamo_writes_it() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    entered = emit_autocast(graph, "cpu", torch.bfloat16, True)
    product = graph.call_function(torch.mm, (x, x))
    emit_end_of_autocast(graph, entered)
    graph.output((product, graph.call_function(torch.mm, (x, x))))
    gm = fx.GraphModule(nn.Module(), graph)
    for run in (gm, fx.Interpreter(gm).run):
        inside, outside = run(torch.ones(2, 2))
        assert (inside.dtype, outside.dtype) == (torch.bfloat16, torch.float32)


def test_what_a_tensor_is_made_of_others_is() -> None:
    weight = Int8Weight.of(torch.ones(2, 2))
    assert is_subclass(weight)
    assert is_subclass(torch.nn.Parameter(weight, requires_grad=False))
    assert not is_subclass(torch.nn.Parameter(torch.ones(2)))
    assert not is_subclass(3)


def test_a_count_of_frames_is_set_where_there_is_none() -> None:
    count = eval_frame.set_fullgraph_compiled_frame_count
    assert [count(-1), count(0), count(2), count(-1)] == [-1, -1, 0, 0]
    frame_is_compiled()
    assert count(-1) == -1  # nobody counts
    for before, after in ((0, 1), (3, 3)):
        count(before)
        frame_is_compiled()
        assert count(-1) == after


# --- several processes ----------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path: Path) -> Iterator[str]:
    """The name of a group of this process alone."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch is built without torch.distributed, or without gloo")
    where = f"file://{tmp_path / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    yield torch.distributed.group.WORLD.group_name
    torch.distributed.destroy_process_group()


def test_collectives_are_functions_of_tensors(group: str) -> None:
    given = torch.tensor([1.0, 2.0])
    for reduce in ("sum", "max"):
        assert torch.equal(all_reduced(given, reduce, group), given)
    assert torch.equal(all_gathered(given, group), given)
    assert torch.equal(broadcast(given, group), given)
    assert torch.equal(given, torch.tensor([1.0, 2.0]))
    assert members(torch.distributed.group.WORLD) == [0]


def test_a_reduction_can_be_in_a_graph(group: str) -> None:
    spec = TensorSpec(torch.Size([2]), torch.float64, torch.device("cpu"))
    gm = trace_shapes(lambda t: [all_reduced(t, "sum", group)], [spec])
    targets = {str(node.target) for node in gm.graph.nodes}
    assert "_c10d_functional.all_reduce.default" in targets
    assert torch.equal(gm(torch.ones(2).double())[0], torch.ones(2).double())


def test_a_reduction_mapped_over_rows_is_one_of_all_rows(group: str) -> None:
    """torch would stack what was not waited for."""
    spec = TensorSpec(torch.Size([3, 2]), torch.float64, torch.device("cpu"))
    rows = torch.arange(6.0).double().view(3, 2)
    for each in (lambda t: all_reduced(t, "max", group), lambda t: broadcast(t, group)):
        gm = trace_shapes(lambda t, each=each: [torch.vmap(each)(t)], [spec])
        sent = [n for n in gm.graph.nodes if "_c10d_functional" in str(n.target)]
        assert len(sent) == 2  # the collective, and the wait for it
        assert torch.equal(gm(rows)[0], rows)
        assert torch.equal(torch.vmap(each, in_dims=1, out_dims=1)(rows), rows)


def test_plain_tensors_beside_distributed_ones(group: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    spread = distribute_tensor(torch.ones(2), mesh, [Replicate()])
    with pytest.raises(RuntimeError, match="got mixed"):
        spread + torch.ones(2)
    with beside_distributed():
        assert torch.equal((spread + torch.ones(2)).full_tensor(), torch.full((2,), 2.0))


def test_a_compilation_can_be_waited_for() -> None:
    entered: list[str] = []

    def enter(wait: bool) -> None:
        with between_compilations(wait):
            entered.append("waited" if wait else "not waited")

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        threads.append(Thread(target=enter, args=(True,)))
        threads[0].start()
        other = Thread(target=enter, args=(False,))
        other.start()
        other.join()
        entered.append("compiled")
        return gm.forward

    threads = list[Thread]()
    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))
    threads[0].join()
    assert entered == ["not waited", "compiled", "waited"]


def test_a_method_with_code_of_its_own_is_compiled_anew() -> None:
    class Adds:
        def __init__(self) -> None:
            self.factor = 2.0

        def run(self, x: Tensor) -> Tensor:
            return x * self.factor

    counts: list[int] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        counts.append(1)
        return gm.forward

    adds = Adds()
    for method in (adds.run, adds.run, with_code_of_its_own(adds.run)):
        assert torch.compile(method, backend=backend)(torch.ones(1)).item() == 2.0
    assert len(counts) == 2
