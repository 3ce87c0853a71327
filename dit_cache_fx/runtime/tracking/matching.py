"""Find the branch of a call.

A branch is identified by its signature, its cache contexts and its conditioning: the same tensors,
or the same values. If several branches match, or the conditioning varies, the sample decides.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from dit_cache_fx.runtime.tracking.branches import Branch
from dit_cache_fx.runtime.tracking.generation import Jump
from dit_cache_fx.runtime.tracking.hooks import NO_HOOKS, Hooked
from dit_cache_fx.runtime.tracking.session import Session
from dit_cache_fx.runtime.tracking.timestep_value import TimestepValue, way_of
from dit_cache_fx.runtime.tracking.trajectory import Judgement, SampleProbe, Verdict
from dit_cache_fx.values.identity import TensorIdentity

#: a sample belongs to the nearest branch if it is nearer than this share of the next distance
NEARER = 0.5


class CallEvidence(NamedTuple):
    """The evidence for a call's branch.

    `key`: its signature. `serial`: the graph that answers it. `context`: its cache contexts.
    `explicit`: `value` is a step index that the user has set. `derived`: it calls a piece of a
    model, so its conditioning may be computed from the timestep. `hooked`: the hooks on the model.
    """

    key: Hashable
    serial: int
    context: tuple[str, ...]
    value: TimestepValue
    explicit: bool
    conditioning: TensorIdentity
    sample: SampleProbe | None = None
    derived: bool = False
    hooked: Hooked = NO_HOOKS


class Match(NamedTuple):
    """A branch that a call may belong to. `usable`: its cached tensors may answer the call."""

    branch: Branch
    judgement: Judgement
    varying: frozenset[int]
    usable: bool = True


def find_branch(session: Session, call: CallEvidence) -> Match | None:
    """Return the branch of a call, if the evidence identifies one."""
    alike = _of_conditioning(session.of(call.key, call.context), call)
    ahead = [(b, varying) for b, varying in alike if _moves_on(b, call)]
    if len(ahead) > 1 and any(
        b.cached for b, _ in ahead
    ):  # emptied branches of earlier generations do not count
        ahead = [p for p in ahead if p[0].cached or not p[0].trajectory.stands_at(call.value)]
    several = len(ahead) > 1
    matches = [m for b, varying in ahead if (m := _match(b, varying, call, several, session))]
    found = matches[0] if len(matches) == 1 else _nearest(session, call, matches)
    return None if found is None or _is_crowded(found, call) else found


def _of_conditioning(
    branches: Sequence[Branch], call: CallEvidence
) -> list[tuple[Branch, frozenset[int]]]:
    """Return the branches with the call's conditioning.

    In a cache context, and in a piece of a model, also those with the fewest changes of it.
    """
    given = call.conditioning
    objects = [(b, given.other_objects(b.conditioning)) for b in branches]
    same = [pair for pair in objects if not pair[1]]
    if any(b.cached for b, _ in same):  # emptied branches of earlier generations do not count
        return same
    values = [(b, given.other_values(b.conditioning, places)) for b, places in objects]
    equal = [(b, places) for b, places in values if not places]
    if any(b.cached for b, _ in equal) or not (call.context or call.derived):
        return equal
    others = [(b, places) for b, places in values if places]
    least = min((len(places) for _, places in others), default=0)
    return equal + [(b, places) for b, places in others if len(places) == least]


def _moves_on(branch: Branch, call: CallEvidence) -> bool:
    """Return whether the call's timestep does not move back from the branch's newest one."""
    trajectory = branch.trajectory
    if trajectory.value is None or trajectory.explicit != call.explicit:
        return False
    direction = branch.generation.position.direction
    return way_of(trajectory.value, call.value, direction, call.explicit) is not None


def _match(
    branch: Branch, varying: frozenset[int], call: CallEvidence, several: bool, session: Session
) -> Match | None:
    """Return the branch as a match, unless the call's sample does not continue it.

    Varying conditioning is no evidence: then the sample must continue the branch, and the first
    call of its kind computes. The conditioning of a piece of a model varies from its second call
    on, or never.
    """
    trajectory = branch.trajectory
    judgement = trajectory.judge(
        call.value,
        call.explicit,
        call.sample,
        wait=several or bool(varying),
        jump=_jump(branch, call, session),
    )
    if judgement.verdict is Verdict.OTHER:
        return None
    if not varying:
        return Match(branch, judgement, branch.varying if call.derived else varying)
    if trajectory.stands_at(call.value):  # another branch of the step
        return None
    known = varying <= branch.varying
    if call.derived:
        found = Match(branch, judgement, varying | branch.varying, usable=known)
        return found if known or trajectory.move == 0 else None
    if judgement.change is None or not trajectory.similar(call.sample):
        return None
    return Match(branch, judgement, varying, usable=known)


def _jump(branch: Branch, call: CallEvidence, session: Session) -> Jump:
    """Return the size of the timestep's move; a branch that missed steps moves as others do."""
    if call.explicit:
        return Jump.NONE
    jump, newest = branch.generation.jump(call.value), session.newest
    if jump is Jump.NONE or newest is None or newest is branch.generation:
        return jump
    return min(jump, newest.jump(call.value))


def _nearest(session: Session, call: CallEvidence, matches: Sequence[Match]) -> Match | None:
    """Return the branch whose sample is much nearer than the others'.

    If there is none, return the branch of the newest generation that was answered last, if it is
    unique.
    """
    if not matches:
        return None
    holding = [m for m in matches if m.branch.cached or m.branch.generation is session.newest]
    holding = holding or list(matches)
    first, second = sorted(matches, key=lambda m: _distance(m.judgement))[:2]
    nearer = _distance(first.judgement) < NEARER * _distance(second.judgement)
    if nearer and _is_open(first, call, holding):
        return first
    ranks = [(m.branch.generation is session.newest, m.branch.answered) for m in holding]
    latest = [m for m, rank in zip(holding, ranks, strict=True) if rank == max(ranks)]
    return latest[0] if len(latest) == 1 else None


def _is_crowded(match: Match, call: CallEvidence) -> bool:
    """Return whether the call may belong to a forgotten branch, and the sample does not decide."""
    trajectory = match.branch.trajectory
    told = match.judgement.change is not None and trajectory.change > 0
    return match.branch.generation.crowded and not told and not trajectory.similar(call.sample)


def _is_open(match: Match, call: CallEvidence, holding: Sequence[Match]) -> bool:
    """Return whether a call may belong to this branch although others hold tensors.

    A branch that holds nothing (a newer generation replaced its own) qualifies only if the others'
    tensors are too new to be judged by their sample, and its timestep moves on: the same seed gives
    the same sample again at the same timestep.
    """
    if match.branch.cached:
        return True
    young = all(m.branch.trajectory.change == 0 for m in holding)
    return young and not match.branch.trajectory.stands_at(call.value)


def _distance(judgement: Judgement) -> float:
    return float("inf") if judgement.change is None else judgement.change
