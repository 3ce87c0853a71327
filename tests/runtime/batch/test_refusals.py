"""What cannot be a batch is refused by the package's own errors, or told to be shared."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_cache_fx import CaptureError, DeepCache, OptionError, TaylorCache
from dit_cache_fx.values.rows import CallRows
from tests.runtime.batch.serving import Serving, joined, near, row_of
from tests.toys import DIM, TOKENS, Block, ToyDiT, make, toy_inputs


def serving_of(model: Any = None, requests: int = 3, **options: Any) -> Serving:
    strategy = DeepCache(no_cache_steps={0, 2})
    return Serving(model or make(ToyDiT), strategy, requests=requests, **options)


def call_of(serving: Serving) -> dict[str, Any]:
    return joined([serving.inputs(request) for request in range(len(serving.sessions))])


def test_sessions_that_cannot_be_a_batch() -> None:
    serving, other = serving_of(), serving_of()
    cached, (first, second, third) = serving.cached, serving.sessions
    third.close()
    refused = [
        ([], r"sessions=\[\]: at least one session"),
        (first, "sessions=<Session, 0 bytes held>: a list of sessions, one for each row"),
        ([first, other.sessions[0]], r"sessions\[1\]=<Session.*a session of this model"),
        ([first, "second"], r"sessions\[1\]='second': a session of this model"),
        ([first, second, first], r"sessions\[2\]=.*a session is one row of a call. Give each br"),
    ]
    for sessions, text in refused:
        with pytest.raises(OptionError, match=text):
            cached.batch(sessions)
    with (
        pytest.raises(OptionError, match=r"sessions\[1\]=<Session, closed>: a session that is not"),
        cached.batch([first, third]),
    ):
        pass


def test_a_session_that_is_closed_meanwhile() -> None:
    serving = serving_of()
    with serving.cached.batch(serving.sessions):
        serving.sessions[1].close()
        with pytest.raises(OptionError, match=r"sessions\[1\]=<Session, closed>"):
            serving.cached(**call_of(serving))


def test_another_number_of_rows() -> None:
    serving = serving_of(requests=4)
    inputs = toy_inputs(1000.0, batch=3)
    text = re.escape(
        "sessions='4 of them': one for each row of the call, and no argument has as many rows: "
        "x is [3, 6, 8], timestep is [3], text is [3, 4, 8]"
    )
    with serving.cached.batch(serving.sessions), pytest.raises(OptionError, match=text):
        serving.cached(**inputs)


@pytest.mark.parametrize("shared", ["text", [3]])
def test_shared_are_names(shared: Any) -> None:
    serving = serving_of()
    with pytest.raises(OptionError, match=r"names of arguments, such as \('img_ids',\)"):
        serving.cached.batch(serving.sessions, shared=shared)


def test_shared_are_arguments_of_the_call() -> None:
    serving = serving_of()
    text = r"shared=\['ids'\]: the names of the call's arguments: \['x', 'timestep', 'text'\]"
    with (
        serving.cached.batch(serving.sessions, shared=("ids",)),
        pytest.raises(OptionError, match=text),
    ):
        serving.cached(**call_of(serving))


def test_the_step_cannot_be_set_for_a_batch() -> None:
    serving = serving_of()
    with (
        serving.cached.batch(serving.sessions),
        pytest.raises(OptionError, match="cur_timestep=3: None here: set it in each session"),
    ):
        serving.cached.cur_timestep = 3


# --- arguments that happen to be as long as there are rows -----------------------------------


class PlacesDiT(ToyDiT):
    """Takes a place for each token, which has no rows."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor, ids: Tensor) -> Any:  # type: ignore[override]
        c = self.condition(timestep, text)
        return self.head(self.trunk(self.embed(x) + ids.cos(), c))


def places_call(serving: Serving, ids: Tensor) -> dict[str, Any]:
    return call_of(serving) | {"ids": ids}


def test_an_argument_that_only_looks_as_if_it_had_rows() -> None:
    """As many tokens as sessions: split, each row would have one token's place for all tokens."""
    serving = serving_of(make(PlacesDiT), requests=TOKENS)
    ids = torch.arange(TOKENS)[:, None] * torch.ones(DIM)
    with (
        serving.cached.batch(serving.sessions),
        pytest.raises(CaptureError, match=r"Split are \['x', 'timestep', 'text', 'ids'\]"),
    ):
        serving.cached(**places_call(serving, ids))
    with serving.cached.batch(serving.sessions, shared=("ids",)):
        got = serving.cached(**places_call(serving, ids))
    for row in range(TOKENS):
        with serving.own[row]:
            want = serving.alone(**serving.inputs(row), ids=ids)
        assert near(row_of(got, row), want.flatten())


def test_with_another_number_of_sessions_it_has_none() -> None:
    serving = serving_of(make(PlacesDiT), requests=3)
    ids = torch.arange(TOKENS)[:, None] * torch.ones(DIM)
    with serving.cached.batch(serving.sessions):
        got = serving.cached(**places_call(serving, ids))
    with serving.own[2]:
        want = serving.alone(**serving.inputs(2), ids=ids)
    assert near(row_of(got, 2), want.flatten())


def test_where_a_row_alone_does_not_fit_the_model() -> None:
    class Strict(PlacesDiT):
        def forward(self, x: Tensor, timestep: Tensor, text: Tensor, ids: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x, timestep, text, ids.view(TOKENS, DIM))

    serving = serving_of(make(Strict), requests=TOKENS)
    text = r"shared=\[\]: the arguments without rows, and with .* the model does not take row 0"
    with serving.cached.batch(serving.sessions), pytest.raises(OptionError, match=text):
        serving.cached(**places_call(serving, torch.zeros(TOKENS, DIM)))


# --- models that cannot be split ---------------------------------------------------------------


class MixingDiT(ToyDiT):
    """Rows look at each other."""

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        return super().trunk(h + 0.1 * h.mean(dim=0, keepdim=True), c)


class MeanDiT(ToyDiT):
    """One of its outputs has no rows."""

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Any:
        out = super().forward(x, timestep, text)
        return {"sample": out, "loss": out.mean()}


class FlatDiT(ToyDiT):
    """Its blocks see the tokens of all rows in one dimension."""

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        rows = h.shape[0]
        flat = h.reshape(-1, 1, DIM)
        each = c.repeat_interleave(flat.shape[0] // rows, dim=0)
        return super().trunk(flat, each).reshape(rows, -1, DIM)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (MixingDiT, "Row 0 has another result in the call than by itself .*mixes rows"),
        (MeanDiT, r"output loss is \[\] for 3 rows and \[\] for fewer"),
        (FlatDiT, r"cached_\w+ is torch.float32\[6, 1, 8\] on cpu for one session and "
         r"torch.float32\[12, 1, 8\] on cpu for 2: it has no dimension of sessions"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_models_that_cannot_be_split(kind: type, text: str) -> None:
    serving = serving_of(make(kind))
    with serving.cached.batch(serving.sessions), pytest.raises(CaptureError, match=text):
        serving.cached(**call_of(serving))
    assert serving.cached.cache_report().calls_computed == 0


def test_what_mixes_rows_is_refused_with_every_number_of_them() -> None:
    serving = serving_of(make(MixingDiT), requests=16)
    with serving.cached.batch(serving.sessions), pytest.raises(CaptureError, match="mixes rows"):
        serving.cached(**call_of(serving))


class TokensFirstBlock(Block):
    """Tokens are its first dimension, rows its second."""

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return super().forward(h.transpose(0, 1), c).transpose(0, 1)


class TokensFirstDiT(ToyDiT):
    def block(self) -> nn.Module:
        return TokensFirstBlock()

    def trunk(self, h: Tensor, c: Tensor) -> Tensor:
        return super().trunk(h.transpose(0, 1), c).transpose(0, 1)


def test_rows_in_another_dimension_of_what_is_held() -> None:
    serving = Serving(make(TokensFirstDiT), TaylorCache(no_cache_steps={0, 2}), requests=3)
    serving.staggered(ticks=8)
    assert serving.same_counts() == (6, 12)


# --- other graphs around it -------------------------------------------------------------------


def test_a_batch_is_no_part_of_another_compiled_function() -> None:
    serving = serving_of()
    cached = serving.cached
    with cached.batch(serving.sessions):
        cached(**call_of(serving))

    def within(**call: Any) -> Any:
        return 2 * cached(**call)

    with (
        cached.batch(serving.sessions),
        pytest.raises(Exception, match="a batch of sessions cannot be part of"),
    ):
        torch.compile(within, backend="eager", fullgraph=True)(**call_of(serving))


def test_lists_have_rows_and_tuples_have_none() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    call = {"x": x, "shapes": [(1, 2), (3, 4)], "size": (8, 8), "nested": {"a": [x, x], "b": 1}}
    rows = CallRows(call, 2, ())
    assert rows.names == ["x", "shapes", "nested"]
    taken = rows.taken([1])
    assert taken["shapes"] == [(3, 4)]
    assert taken["size"] == (8, 8)
    assert torch.equal(taken["nested"]["a"][1], x[1:])
    assert torch.equal(rows.taken([1, 0, 1])["x"], x[[1, 0, 1]])
    assert rows.taken([0, 1])["x"] is x
