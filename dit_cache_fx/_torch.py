"""Access to torch's internals, all in one file; `tests/test_torch_internals.py` checks it.

`opaque` is an operator that `make_fx` and `functionalize` do not trace into: it becomes one node of
the graph, whatever runs behind it. It uses the same mechanism as torch's own higher-order
operators.

Importing the compiler takes a second longer than `import torch`: modules of Dynamo, of Inductor and
of symbolic shapes are imported where they are used.
"""

from __future__ import annotations

import inspect
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from os import PathLike
from types import FunctionType, MappingProxyType, MethodType
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import fx, nn
from torch._C._dynamo import eval_frame
from torch._C._dynamo.eval_frame import (
    _FrameAction,
    _FrameExecStrategy,
    get_eval_frame_callback,
    set_code_exec_strategy,
    set_eval_frame,
)
from torch._guards import TracingContext, active_fake_mode, tracing
from torch._logging._internal import trace_structured
from torch._ops import HigherOrderOperator
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    is_fake,
)
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.proxy_tensor import (
    ProxyTorchDispatchMode,
    PythonKeyTracer,
    disable_autocast_cache,
    disable_proxy_modes_tracing,
    get_proxy_mode,
    track_tensor,
    track_tensor_tree,
)
from torch.nn.attention import SDPBackend, _sdpa_kernel
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,
    _get_current_function_mode_stack,
    _pop_mode_temporarily,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import (
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
    is_traceable_wrapper_subclass,
)
from torch.utils.hooks import RemovableHandle

from dit_cache_fx.values.tensor_spec import TensorSpec
from dit_cache_fx.values.wrapped import PLAIN_TENSORS

_PROXY, _FAKE = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FAKE

_NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool)

_F = TypeVar("_F", bound=Callable[..., Any])


# --- operators that tracing does not look into ---------------------------------------------------


class OpaqueCall(Protocol):
    """The function behind a call of `opaque`, and its form in the graph."""

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the outputs, as new tensor objects."""

    def emit(
        self, graph: Emitter, inputs: Sequence[Any], outputs: Sequence[torch.Tensor]
    ) -> Sequence[Any]:
        """Add nodes for the call; return one proxy for each of the `outputs` of `run`."""


class Emitter:
    """Adds nodes to the graph that is being traced."""

    def __init__(self, tracer: Any) -> None:
        self._tracer = tracer

    def call(self, target: Callable[..., Any], args: Any, kwargs: Any, name: str) -> fx.Proxy:
        proxy: fx.Proxy = self._tracer.create_proxy(
            "call_function", target, args, kwargs, name=name
        )
        return proxy

    def attribute(self, name: str, value: object) -> fx.Proxy:
        """Add a node for `value`, which becomes an attribute of the traced module."""
        setattr(self._tracer.root, name, value)
        proxy: fx.Proxy = self._tracer.create_proxy("get_attr", name, (), {})
        return proxy


class _Opaque(HigherOrderOperator):
    def __init__(self) -> None:
        super().__init__("dit_cache_fx_opaque")

    def __call__(self, call: OpaqueCall, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        result: list[torch.Tensor] = super().__call__(call, tensors)
        return result


opaque = _Opaque()


@opaque.py_impl(torch._C.DispatchKey.CompositeExplicitAutograd)
def _run(call: OpaqueCall, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return call.run(tensors)


@opaque.py_impl(ProxyTorchDispatchMode)
def _trace(mode: Any, call: OpaqueCall, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    with disable_proxy_modes_tracing(), tracing(None):
        outputs = call.run(tensors)
    inputs = [mode.tracer.unwrap_proxy(t) for t in tensors]
    proxies = call.emit(Emitter(mode.tracer), inputs, outputs)
    for tensor, proxy in zip(outputs, proxies, strict=True):
        track_tensor(tensor, proxy, constant=None, tracer=mode.tracer)
    return outputs


@opaque.py_functionalize_impl
def _functionalize(ctx: Any, call: OpaqueCall, tensors: list[torch.Tensor]) -> Any:
    inner = ctx.unwrap_tensors(tensors)
    with ctx.redispatch_to_next():
        outputs = opaque(call, inner)
    return ctx.wrap_tensors(outputs)


@opaque.py_impl(torch._C.DispatchKey.Autograd)
def _below_autograd(call: OpaqueCall, tensors: list[torch.Tensor]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return opaque(call, tensors)


def emit_node(target: Callable[..., Any], args: Any, kwargs: Any, name: str) -> bool:
    """Add a node that reads tensors (which appear in `args`) to the graph being traced.

    Returns False, without a node, if no tensor is a value of the graph (constants).
    """
    mode = _proxy_mode()
    if mode is None:
        return False
    tracer: Any = mode.tracer
    args, kwargs = pytree.tree_map_only(torch.Tensor, tracer.unwrap_proxy, (args, kwargs))
    if not any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
        return False
    Emitter(tracer).call(target, args, kwargs, name)
    return True


# --- graphs --------------------------------------------------------------------------------------

#: a GraphModule that generates its code when it first runs: most graphs of a capture never do
LazyGraphModule = _LazyGraphModule


def generate_code(gm: fx.GraphModule) -> None:
    """Generate the code of a graph now: Dynamo cannot trace a `LazyGraphModule` without it."""
    LazyGraphModule.force_recompile(gm)  # drops that of the graphs in it
    for child in gm.children():
        if isinstance(child, LazyGraphModule):
            generate_code(child)


# --- tracing -------------------------------------------------------------------------------------


def reads_data() -> tuple[type[Exception], ...]:
    """Return the errors of code that reads values of tensors without data (`trace_shapes`)."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode


def is_sized_by_data(error: Exception) -> bool:
    """Return whether it is the error of an operator whose result's size depends on values."""
    return isinstance(error, DynamicOutputShapeException)


def trace_shapes(
    function: Callable[..., Sequence[torch.Tensor]], specs: Sequence[TensorSpec]
) -> fx.GraphModule:
    """Trace a pure function for tensors of these specs, without data."""
    with without_dispatch_modes(), FakeTensorMode():
        inputs = [torch.empty(shape, dtype=dtype, device=d) for shape, dtype, d in specs]
        return _traced(function, inputs)


def trace_functional(
    function: Callable[..., list[torch.Tensor]], tensors: Sequence[torch.Tensor]
) -> fx.GraphModule:
    """Return the ATen graph of `function(*tensors)`, without in-place operations."""
    return _traced(torch.func.functionalize(function), tensors)


def _traced(
    function: Callable[..., Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor]
) -> fx.GraphModule:
    """Return the ATen graph of `function(*inputs)`, as traced by `make_fx`.

    `make_fx` also replaces `nn.Module.__call__` for all threads, and sets a flag that makes every
    compiled function of the process raise. Here only this thread's mode stack changes.
    """
    tracer: Any = PythonKeyTracer()
    tracer.root, tracer.tensor_attrs = nn.Module(), {}
    tracer.graph = fx.Graph(tracer_cls=PythonKeyTracer)
    with ProxyTorchDispatchMode(tracer, "real"), disable_autocast_cache(), _one_fake_mode():
        names = [f"input_{number}" for number in range(len(inputs))]
        proxies = [tracer.create_proxy("placeholder", name, (), {}) for name in names]
        with disable_proxy_modes_tracing():
            track_tensor_tree([*inputs], proxies, constant=None, tracer=tracer)
        results = [tracer.unwrap_proxy(t) for t in function(*inputs)]
        tracer.create_node("output", "output", (tracer.create_arg(results),), {})
    return LazyGraphModule(tracer.root, tracer.graph)


@contextmanager
def _one_fake_mode() -> Iterator[None]:
    """Provide the mode of the stand-ins in the nodes' metadata: otherwise each node makes one."""
    mode = active_fake_mode() or FakeTensorMode(allow_fallback_kernels=True)
    with tracing(TracingContext(mode)):
        yield


@contextmanager
def fakes(values: Sequence[Any]) -> Iterator[list[Any]]:
    """Replace the tensors among `values` by stand-ins without data; code inside computes nothing.

    Their shapes are fixed. Other values remain.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        yield [mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in values]


# --- compilers -----------------------------------------------------------------------------------


def like_dynamos(
    gm: fx.GraphModule, dynamos: fx.GraphModule, inputs: Mapping[str, fx.Node]
) -> fx.GraphModule:
    """Mark a graph as derived from Dynamo's: some of its inputs are inputs of that one.

    Then a compiler recognises its parameters, whose memory does not move (CUDA graphs need not copy
    them). AOTAutograd requires a source for every tensor that the graph itself holds (constants of
    the model's code): each gets one of its own.
    """
    from torch._dynamo.source import ConstantSource

    gm.meta.update(dynamos.meta)
    held = [n for n, _ in gm.named_parameters(remove_duplicate=False)]
    held += [n for n, _ in gm.named_buffers(remove_duplicate=False)]
    sources: Any = {name: ConstantSource(name) for name in held}
    gm._param_name_to_source = sources
    for node in gm.graph.find_nodes(op="placeholder"):
        origin = inputs.get(str(node.target))
        node._dynamo_source = getattr(origin, "_dynamo_source", None)
        if origin is not None and "tensor_dict" in origin.meta:
            node.meta["tensor_dict"] = origin.meta["tensor_dict"]
    return gm


def inductor_compiler(mode: str | None, options: dict[str, Any]) -> Callable[..., Any]:
    """Return Inductor as `torch.compile` calls it, with its checks of mode and options."""
    compiler: Callable[..., Any] = torch._TorchCompileInductorWrapper(mode, options, None)
    return compiler


def known_backends() -> list[str]:
    """Return every backend name that `torch.compile` takes."""
    import torch._dynamo

    return list(torch._dynamo.list_backends(exclude_tags=()))


def lookup_backend(backend: Any) -> Callable[..., Any]:
    """Return the backend of a name; a callable is a backend itself."""
    import torch._dynamo

    function: Callable[..., Any] = torch._dynamo.lookup_backend(backend)
    return function


# --- what Dynamo knows of a graph and its frame --------------------------------------------------


class Piece(NamedTuple):
    """The part of the compiled function that Dynamo's graph covers.

    `whole`: all of it; otherwise a graph break splits it. `first`: no other part precedes it.
    `function`: the file and name of the function.
    """

    whole: bool
    first: bool
    function: tuple[str, str]


_RESUMED = re.compile(r"^torch_dynamo_resume_in_(.+)_at_\d+$")


def piece_of(gm: fx.GraphModule) -> Piece:
    """Return the part of a graph that Dynamo has just passed to a backend."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    stack = getattr(reason, "user_stack", None) or []
    file, name = (stack[0].filename, stack[0].name) if stack else ("", "")
    resumed = _RESUMED.match(name)
    whole = not getattr(reason, "graph_break", False) and resumed is None
    return Piece(whole, resumed is None, (file, resumed[1] if resumed else name))


class CompiledFrame(NamedTuple):
    """The call that Dynamo is compiling.

    `arguments`: the function's, in order, then those of the module's forward. `outer`: the module
    that was passed to `torch.compile`; None for a function. `inner`: the function is one that this
    module calls. `numbers`: the arguments that are numbers.
    """

    arguments: tuple[str, ...]
    outer: nn.Module | None
    inner: bool
    numbers: Mapping[str, float]


def compiled_frame() -> CompiledFrame:
    """Return the call that Dynamo is compiling while it calls a backend; empty at other times."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        tx: Any = InstructionTranslator.current_tx().output.root_tx
    except AttributeError:
        return CompiledFrame((), None, False, {})
    code, outer = tx.f_code, _outermost_module()
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    if outer is not None:  # a wrapper may pass all of them in **kwargs
        arguments = (*arguments, *inspect.signature(outer.forward).parameters)
    owner = tx.f_locals.get("self")
    resumed = owner is None and _RESUMED.match(code.co_name) is not None
    its_own = owner is outer and code in _codes(getattr(outer, "forward", None))
    inner = outer is not None and not its_own and not resumed
    return CompiledFrame(arguments, outer, inner, _numbers(tx.f_locals))


def _codes(function: Any) -> list[Any]:
    """Return the code of a function, and of the functions that it wraps."""
    found = []
    while function is not None:
        found.append(getattr(function, "__code__", None))
        function = getattr(function, "__wrapped__", None) or getattr(function, "func", None)
    return found


def _numbers(given: Mapping[str, Any]) -> dict[str, float]:
    inside = [value for name, value in given.items() if name.endswith("kwargs")]
    known = dict(given)
    for named in inside:
        known |= named if isinstance(named, dict) else {}
    return {n: float(v) for n, v in known.items() if type(v) in (int, float)}


def _outermost_module() -> nn.Module | None:
    """Return the first module that was called after `torch.compile`'s own call."""
    found, frame = None, inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        owner = frame.f_locals.get("self")
        found = owner if isinstance(owner, nn.Module) else found
        frame = frame.f_back
    return None if frame is None else found


def dynamo_source(node: fx.Node) -> str:
    """Return the access path of an input of Dynamo's graph; empty if unknown."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def depends_on_data(graph: fx.Graph) -> bool:
    """Return whether a size or a number in Dynamo's graph depends on values of tensors."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    known = (node.meta.get("example_value") for node in graph.nodes)
    return any(free_unbacked_symbols(v) for v in known if isinstance(v, (torch.Tensor, *_NUMBERS)))


def dynamos_tensor() -> Callable[..., torch.Tensor]:
    """Return the operator that represents `torch.tensor` of a varying number in Dynamo's graph."""
    import torch._refs

    made: Callable[..., torch.Tensor] = torch._refs.tensor
    return made


# --- functions under torch.compile ---------------------------------------------------------------


def not_a_compiled_frame(function: _F) -> _F:
    """Exclude a function from compilation by `torch.compile`, but not the functions that it calls.

    As for `Module.__call__`, this concerns frames: inside another compiled function it is traced.
    """
    code: Any = function.__code__
    set_code_exec_strategy(code, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.DEFAULT))
    return function


def constant_result(function: _F) -> _F:
    """Mark a function whose result is a constant for `torch.compile`.

    Like `torch.compiler.assume_constant_result`, which imports Dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@cache
@not_a_compiled_frame
def unseen(function: _F) -> _F:
    """Hide a function from `torch.compile`, with everything that it calls; not for methods.

    The hidden function is made at the first call, since that imports Dynamo, and only once.
    """
    hidden: _F = torch.compiler.disable(function)
    return hidden


def cannot_compile() -> tuple[type[Exception], ...]:
    """Return the errors of `torch.compile` for a graph that it, or its backend, cannot compile."""
    from torch._dynamo import exc

    return (
        exc.Unsupported,
        exc.UncapturedHigherOrderOpError,
        exc.UserError,
        exc.TorchRuntimeError,
        exc.BackendCompilerFailed,
    )


#: the callback of `torch.compile` that looks at frames; None outside of it
dynamo_callback = get_eval_frame_callback


@contextmanager
def between_compilations(wait: bool) -> Iterator[None]:
    """Let no compilation of another thread begin; `wait` for one that is under way."""
    dynamo = sys.modules.get("torch._dynamo.convert_frame")  # not imported: nothing compiles
    lock: Any = getattr(dynamo, "compile_lock", None)
    held = lock is not None and lock.acquire(blocking=wait)
    try:
        yield
    finally:
        if held:
            lock.release()


def breaks_raise() -> Any:
    """Return a context in which `torch.compile` raises at a graph break.

    `fullgraph=True` does that too, but counts the frames of all threads together: concurrent calls
    from several threads can then fail ("found no compiled frames"; see `frame_is_compiled`).
    """
    import torch._dynamo

    return torch._dynamo.error_on_graph_break(True)


@not_a_compiled_frame
def frame_is_compiled() -> None:
    """Tell `torch.compile(fullgraph=True)` that a frame of the current call was compiled.

    It counts the frames of all threads together, so the end of one call can reset the count of
    another one, which then raises ("found no compiled frames").
    """
    count = getattr(eval_frame, "set_fullgraph_compiled_frame_count", None)
    if count is None:
        return
    before = count(-1)  # takes a number only if nobody counts (-1)
    if before >= 0:
        count(max(before, 1))


def wants_one_graph(callback: object) -> bool:
    """Return whether it is the callback of `torch.compile(fullgraph=True)`."""
    return getattr(callback, "_one_graph", False) is True


#: held while a patch of torch is applied or removed
_PATCHING = threading.Lock()


@contextmanager
def signatures_kept() -> Iterator[None]:
    """Prevent Dynamo from mixing up signatures between the branches of `cond`.

    Up to torch 2.13 it remembers the result of `inspect.signature` from one branch, but drops its
    knowledge of that object's attributes with the branch. The other branch then fails with
    "'Signature' object has no attribute '_parameters'".

    This patches a class of Dynamo, for all threads: enter it only to compile. Threads that are
    inside at the same time share one patch; the last one to leave removes it.
    """
    from torch._dynamo.variables import functions as dynamo_functions

    variable = getattr(dynamo_functions, "InspectSignatureVariable", None)
    if variable is None or "call_function" not in vars(variable):
        yield
        return
    with _PATCHING:
        patch = variable.call_function
        if not hasattr(patch, "users"):
            patch = variable.call_function = _signatures_apart(patch)
        patch.users += 1
    try:
        yield
    finally:
        with _PATCHING:
            patch.users -= 1
            if not patch.users:
                variable.call_function = patch.before


def _signatures_apart(remembered: Callable[..., Any]) -> Any:
    """Return Dynamo's `inspect.signature` without memory inside a branch."""

    from torch._dynamo.variables import functions as dynamo_functions

    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        within = tx.output.current_tracer.parent is not None
        plain = dynamo_functions.UserFunctionVariable.call_function
        return (plain if within else remembered)(self, tx, args, kwargs)

    patch: Any = call_function
    patch.users, patch.before = 0, remembered
    return patch


@not_a_compiled_frame
def look_again(callback: object) -> None:
    """Let `torch.compile` look at frames again: after an error it stops for good."""
    if callback is not None and dynamo_callback() is None:
        set_eval_frame(callback)  # type: ignore[arg-type]


# --- structured logs -----------------------------------------------------------------------------


def trace_text(name: str, text: Callable[[], str]) -> None:
    """Add an artifact to torch's structured trace (`TORCH_TRACE`), if there is one.

    `tlparse` shows it under `name`. `text` is called only for a trace.
    """
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=text,
        expect_trace_id=False,
    )


# --- what traces this thread ---------------------------------------------------------------------


@constant_result
def exporting() -> bool:
    """Return whether `torch.export` is running in this thread.

    `torch.compiler.is_exporting()` is a flag of the process: an export in another thread sets it,
    and may clear it too early. It is also not set yet when `torch.export` lists buffers.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "torch.export._trace":
            return True
    return False


@constant_result
def sizes_are_captured() -> bool:
    """Return whether Dynamo, which is tracing here, takes sizes that depend on data in its graph.

    Where it does not, it breaks the graph there, but never inside `cond`.
    """
    from torch._dynamo import config
    from torch._dynamo.symbolic_convert import InstructionTranslator

    one_graph: bool = InstructionTranslator.current_tx().one_graph
    return one_graph or config.capture_dynamic_output_shape_ops


@not_a_compiled_frame
def traced_here(values: Iterable[object]) -> bool:
    """Return whether this thread is tracing (`make_fx`, `torch.export`), or `values` are fake.

    `torch.compiler.is_compiling()` is a flag of the process: other threads set it while they
    compile. In code that Dynamo traces, check `torch.compiler.is_dynamo_compiling()` first.
    """
    if _proxy_mode() is not None or torch._C._get_dispatch_mode(_FAKE) is not None:
        return True
    for value in values:
        if isinstance(value, torch.Tensor) and type(value) not in PLAIN_TENSORS and is_fake(value):
            return True
    return False


@not_a_compiled_frame
def _proxy_mode() -> ProxyTorchDispatchMode | None:
    """Return this thread's tracer; for `pre_dispatch` torch keeps one mode for all threads."""
    here = torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
    mode = get_proxy_mode() if here else torch._C._get_dispatch_mode(_PROXY)
    return mode if isinstance(mode, ProxyTorchDispatchMode) else None


# --- attention kernels and autocast --------------------------------------------------------------

_ATTENTION: Mapping[str, Callable[[], bool]] = MappingProxyType(
    {
        "MATH": torch._C._get_math_sdp_enabled,
        "FLASH_ATTENTION": torch._C._get_flash_sdp_enabled,
        "EFFICIENT_ATTENTION": torch._C._get_mem_efficient_sdp_enabled,
        "CUDNN_ATTENTION": torch._C._get_cudnn_sdp_enabled,
        "OVERRIDEABLE": torch._C._get_overrideable_sdp_enabled,
    }
)
_BY_NUMBER = {int(getattr(SDPBackend, name)): name for name in _ATTENTION}


def attention_backends() -> tuple[str, ...]:
    """Return the names of the `SDPBackend`s that attention may use, the preferred one first."""
    if torch.cuda.is_initialized():
        _let_torch_order_attention()
    ordered = torch._C._get_sdp_priority_order()
    return tuple([name for n in ordered if _ATTENTION[name := _BY_NUMBER[n]]()])


@cache
@not_a_compiled_frame
def _let_torch_order_attention() -> None:
    """Let torch choose its order of attention kernels for this GPU.

    It does so at the process's first attention on one. Between two calls of a model that would look
    as if the user had set another order.
    """
    query = torch.zeros(1, 1, 1, 8, dtype=torch.float16, device="cuda")
    attend = torch.nn.functional.scaled_dot_product_attention
    with without_dispatch_modes(), torch.no_grad(), suppress(RuntimeError):  # all are disabled
        attend(query, query, query)


def use_attention_backends(names: Sequence[str]) -> None:
    """Enable these `SDPBackend`s, the preferred one first, and no others."""
    _sdpa_kernel([getattr(SDPBackend, name) for name in names], set_priority=True)


def emit_autocast(graph: fx.Graph, device: str, dtype: torch.dtype, cache: bool) -> fx.Node:
    """Add a node that enters autocast, as Dynamo does."""
    return graph.call_function(_enter_autocast, (device, dtype, True, cache))


def emit_end_of_autocast(graph: fx.Graph, entered: fx.Node) -> None:
    """Add the node that leaves autocast."""
    graph.call_function(_exit_autocast, (entered,))


# --- hooks, modes, tensor subclasses -------------------------------------------------------------


def hooks_registered() -> int:
    """Return the number of hooks that this process has registered, including removed ones."""
    return RemovableHandle.next_id


def is_subclass(value: object) -> bool:
    """Return whether a tensor wraps others and implements operators itself (int8)."""
    return isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value)


def modes() -> tuple[str, ...]:
    """Return the classes of the active modes, which see each function or operator."""
    function, dispatch = _get_current_function_mode_stack(), _get_current_dispatch_mode_stack()
    return tuple(type(mode).__name__ for mode in (*function, *dispatch))


def untraced() -> Any:
    """Return a context in which operations run without being added to the graph."""
    return disable_proxy_modes_tracing()


#: inside, observers of operators (a FLOP counter, a debugger) see nothing
without_dispatch_modes = _disable_current_modes


@contextmanager
def without_mode(kind: type[TorchFunctionMode]) -> Iterator[None]:
    """Disable the innermost `TorchFunctionMode`, if it is of this kind."""
    if isinstance(_get_current_function_mode(), kind):
        with _pop_mode_temporarily():
            yield
    else:
        yield


def with_code_of_its_own(method: Callable[..., Any]) -> Any:
    """Return a method that Dynamo compiles anew: it keeps what it compiles by the code object."""
    function: Any = method.__func__  # type: ignore[attr-defined]
    own = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    return MethodType(own, method.__self__)  # type: ignore[attr-defined]


# --- collectives ---------------------------------------------------------------------------------


def members(group: Any) -> list[int]:
    """Return the ranks of a group's processes."""
    return torch.distributed.get_process_group_ranks(group)


def all_reduced(tensor: torch.Tensor, how: str, group: str) -> torch.Tensor:
    """Return the sum ("sum") or maximum ("max") of each element over a group; works in a graph."""
    reduced: torch.Tensor = _EachElement.apply(
        tensor, torch.ops._c10d_functional.all_reduce, how, group
    )
    return reduced


def broadcast(tensor: torch.Tensor, group: str) -> torch.Tensor:
    """Return the tensor of a group's first process."""
    sent: torch.Tensor = _EachElement.apply(tensor, torch.ops._c10d_functional.broadcast, 0, group)
    return sent


class _EachElement(torch.autograd.Function):
    """A collective that treats each element by itself. `torch.vmap` sends all rows at once.

    torch has no vmap rule for it: it would send row by row, and stack the rows before they arrive.
    """

    @staticmethod
    def forward(
        tensor: torch.Tensor, collective: Callable[..., torch.Tensor], how: Any, group: str
    ) -> torch.Tensor:
        given = tensor.to(_reached(group, tensor.device))
        sent: torch.Tensor = torch.ops._c10d_functional.wait_tensor(collective(given, how, group))
        return sent.to(tensor.device)

    @staticmethod
    def setup_context(ctx: Any, _: Any, output: torch.Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def vmap(_: Any, in_dims: Any, tensor: torch.Tensor, *how: Any) -> tuple[Any, int | None]:
        return _EachElement.apply(tensor, *how), in_dims[0]


def all_gathered(tensor: torch.Tensor, group: str) -> torch.Tensor:
    """Return the concatenated tensors of a group's processes."""
    given = tensor.to(_reached(group, tensor.device))
    functional = torch.ops._c10d_functional
    size = len(members(_group_of(group)))
    gathered: torch.Tensor = functional.wait_tensor(
        functional.all_gather_into_tensor(given.contiguous(), size, group)
    )
    return gathered.to(tensor.device)


def gathered_objects(value: Any, group: str) -> list[Any]:
    """Return the objects of a group's processes."""
    processes = _group_of(group)
    found: list[Any] = [None] * len(members(processes))
    torch.distributed.all_gather_object(found, value, processes)
    return found


def beside_distributed() -> Any:
    """Return a context in which DTensors can be combined with tensors that all processes have."""
    from torch.distributed.tensor.experimental import implicit_replication

    return implicit_replication()


def _group_of(name: str) -> Any:
    c10d: Any = torch.distributed.distributed_c10d
    return c10d._resolve_process_group(name)


def _reached(group: str, device: torch.device) -> torch.device:
    """Return the device if the group's processes can send from there, otherwise one of theirs."""
    devices = {d.type for d in _group_of(group)._device_types}
    return device if device.type in devices or not devices else torch.device(sorted(devices)[0])


# --- packages of AOTInductor ---------------------------------------------------------------------


def aoti_package(
    program: torch.export.ExportedProgram,
    path: str | PathLike[str],
    metadata: dict[str, str],
    configs: dict[str, Any],
) -> None:
    """Compile a program with AOTInductor into a `.pt2` file, with metadata."""
    from torch import _inductor as inductor

    options = {**configs, "aot_inductor.metadata": metadata}
    inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)


def aoti_load(path: str | PathLike[str]) -> tuple[Any, dict[str, str]]:
    """Return the function in a `.pt2` file, and its metadata."""
    from torch import _inductor as inductor

    function = inductor.aoti_load_package(str(path))
    return function, dict(function.get_metadata())
