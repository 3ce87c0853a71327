"""Analyse Dynamo's graph: its blocks as calls, and the roles of its inputs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from dit_cache_fx._torch import CompiledFrame, depends_on_data, dynamo_source, is_subclass
from dit_cache_fx.capture import BlockList, flatten_call, guessed_timestep, named_timestep
from dit_cache_fx.capture.blocks import is_composite
from dit_cache_fx.capture.leaves import candidate_lists
from dit_cache_fx.dynamo.capture import Outlined
from dit_cache_fx.dynamo.outline import is_number, outline
from dit_cache_fx.dynamo.reads import cut, reads_of
from dit_cache_fx.dynamo.sources import argument_of, is_owned, path_of
from dit_cache_fx.errors import DiscoveryError, OptionError


def outlined_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    blocks: Sequence[str | nn.ModuleList] | None,
    timestep: str | None,
    whole: bool,
    frame: CompiledFrame,
) -> Outlined:
    """Return Dynamo's graph with its blocks as calls, and the names of its inputs.

    Raises `OptionError` if a `whole` graph lacks the lists that the user named.
    """
    places = gm.graph.find_nodes(op="placeholder")
    numbers = {i for i, node in enumerate(places) if node.users and all(map(is_number, node.users))}
    all_tensors = {i for i, v in enumerate(example_inputs) if isinstance(v, torch.Tensor)}
    scalars = {*range(len(places))} - (all_tensors - numbers)
    number_step = _number_step({argument_of(places[i]): i for i in sorted(scalars)}, timestep)
    tensors = [i for i in range(len(places)) if i not in scalars or i == number_step]
    origins = [places[i] for i in tensors]
    own = {i for i in tensors if is_owned(places[i], example_inputs[i])}
    names = _names(origins, {places[i] for i in own})
    given = {
        n: torch.zeros([]) if i == number_step else example_inputs[i]
        for n, i in zip(names, tensors, strict=True)
        if i not in own
    }
    step = _timestep(given, timestep, whole)
    named = timestep or named_timestep([*frame.numbers], None)
    moving = None if step is None else origins[names.index(step)]
    read_apart, reads = cut(gm, {places[i] for i in numbers}, moving)
    read = 0 if reads is None else reads.count
    subclasses = {places[i].name for i in own if is_subclass(example_inputs[i])}
    opaque = [n for n in read_apart.graph.nodes if n.name in subclasses]
    outlined, found = outline(read_apart, opaque)
    lists, others = _trunk_lists(found, gm, example_inputs, blocks, whole, frame)
    asks = any(not is_number(n) for n in reads_of(gm.graph))
    return Outlined(
        dynamos=gm,
        gm=outlined,
        lists=tuple(lists),
        chosen=blocks is not None,
        elsewhere=others,
        order=frame.arguments,
        tensors=tuple(tensors),
        names=tuple(names),
        origins=tuple(origins),
        owned=frozenset(n for n, i in zip(names, tensors, strict=True) if i in own),
        numbers=tuple(sorted(numbers - {number_step})),
        number_step=number_step,
        given=tuple(i for i in range(len(example_inputs) + read) if i not in own),
        dynamic=len(tensors) < len(example_inputs) + read,
        timestep_argument=step,
        constant=None if step is not None or named is None else frame.numbers.get(named),
        numbers_beside=frozenset((n, v) for n, v in frame.numbers.items() if n != named),
        reads=reads,
        asks=asks,
        only_now=asks or depends_on_data(gm.graph),
    )


def _trunk_lists(
    lists: list[BlockList],
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    blocks: Sequence[str | nn.ModuleList] | None,
    whole: bool,
    frame: CompiledFrame,
) -> tuple[list[BlockList], dict[str, int]]:
    """Return a graph's lists that may be cached, and the model's lists in other pieces."""
    others: dict[str, int] = {}
    if not whole and frame.outer is not None:
        others = _other_lists(frame.outer, lists, gm, example_inputs)
        if blocks is None and not _holds_trunk(frame.outer, lists, gm, example_inputs):
            lists = []
    if blocks is not None:
        lists = _chosen(lists, blocks, gm, example_inputs, whole)
    return lists, others


def _names(origins: Sequence[fx.Node], owned: set[fx.Node]) -> list[str]:
    """Return a name for each input: its argument; for the model's own, Dynamo's name."""
    names: list[str] = []
    for node in origins:
        name = node.name if node in owned else re.sub(r"\W", "_", argument_of(node))
        names.append(name if name.isidentifier() and name not in names else node.name)
    return names


def _number_step(scalars: Mapping[str, int], timestep: str | None) -> int | None:
    """Return the index of the timestep among the inputs that are numbers."""
    name = timestep or named_timestep([*scalars], None)
    return None if name is None else scalars.get(name)


def _timestep(given: Mapping[str, torch.Tensor], timestep: str | None, whole: bool) -> str | None:
    """Return the name of the timestep among a graph's inputs; None if it is not among them."""
    if timestep is not None:
        return timestep if timestep in given else None
    name = named_timestep(list(given), None)
    if name is None and whole:
        try:
            return guessed_timestep(flatten_call(dict(given), None))
        except DiscoveryError:
            return None
    return name


def _holds_trunk(
    model: nn.Module, lists: Sequence[BlockList], gm: fx.GraphModule, example_inputs: Sequence[Any]
) -> bool:
    """Return whether a piece of the model has blocks of its largest list, or this is unknown."""
    if not any(isinstance(value, nn.Parameter) for value in example_inputs):
        return True
    found = [(_size(b), b) for b in candidate_lists(model) if is_composite(b)]
    main = max(found, key=lambda pair: pair[0], default=(0, None))[1]
    return main is None or _name_of(main.modules, lists, gm, example_inputs) is not None


def _size(blocks: BlockList) -> int:
    return sum(p.numel() for module in blocks.modules for p in module.parameters())


def _other_lists(
    model: nn.Module, lists: Sequence[BlockList], gm: fx.GraphModule, example_inputs: Sequence[Any]
) -> dict[str, int]:
    """Return the model's lists without blocks in this piece: name -> number of blocks."""
    return {
        b.name: len(b.modules)
        for b in candidate_lists(model)
        if _name_of(b.modules, lists, gm, example_inputs) is None
    }


def _chosen(
    lists: Sequence[BlockList],
    blocks: Iterable[str | nn.ModuleList],
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    whole: bool,
) -> list[BlockList]:
    """Return the lists that the user passed, by name or as objects."""
    found = []
    for item in blocks:
        name = item if isinstance(item, str) else _name_of([item], lists, gm, example_inputs)
        match = [b for b in lists if b.name == name or f".{b.name}".endswith(f".{name}")]
        if len(match) == 1:
            found.append(match[0])
        elif whole:
            what = item if isinstance(item, str) else type(item).__name__
            known = [b.name for b in lists]
            raise OptionError("blocks", what, f"the compiled graph has the block lists {known}")
    return found


def _name_of(
    modules: Iterable[nn.Module],
    lists: Sequence[BlockList],
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
) -> str | None:
    """Return the name of the list that has the parameters of these modules."""
    own = {id(p) for module in modules for p in module.parameters()}
    places = gm.graph.find_nodes(op="placeholder")
    paths = [
        ".".join(path_of(dynamo_source(node))[start:]) + "."
        for node, value in zip(places, example_inputs, strict=True)
        if id(value) in own
        for start in (0, 1)  # a list's name has the local variable if there are several
    ]
    names = [b.name for b in lists if any(path.startswith(f"{b.name}.") for path in paths)]
    return max(names, key=len, default=None)
