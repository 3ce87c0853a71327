"""Which branch a call belongs to.

A branch is known by its signature, its cache contexts and its conditioning: the same tensors, or
the same values. Where several have those, or conditioning varies, the sample decides.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from dit_cache_fx.runtime.branches import Branch
from dit_cache_fx.runtime.generation import Jump, way_of
from dit_cache_fx.runtime.hooked import NO_HOOKS, Hooked
from dit_cache_fx.runtime.session import Session
from dit_cache_fx.runtime.timestep_value import TimestepValue
from dit_cache_fx.runtime.trajectory import Judgement, SampleProbe, Verdict
from dit_cache_fx.values.identity import TensorIdentity

#: a sample that is nearer than this share of the next one's distance belongs to a branch
NEARER = 0.5


class CallEvidence(NamedTuple):
    """What is known of a call.

    `key`: its signature. `serial`: the graph that answers it. `context`: the cache contexts that it
    is in. `explicit`: `value` is a step index that the user has set. `derived`: it is of a piece of
    a model, so its conditioning may be made from the timestep. `hooked`: the hooks that it finds.
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
    """A branch that a call may belong to. `usable`: what it holds may answer the call."""

    branch: Branch
    judgement: Judgement
    varying: frozenset[int]
    usable: bool = True


def find_branch(session: Session, call: CallEvidence) -> Match | None:
    """The branch of a call, where the evidence tells one."""
    alike = _of_conditioning(session.of(call.key, call.context), call)
    ahead = [(b, varying) for b, varying in alike if _moves_on(b, call)]
    if any(b.held for b, _ in ahead):  # what a generation before left empty here is not meant
        ahead = [p for p in ahead if p[0].held or not p[0].trajectory.stands_at(call.value)]
    several = len(ahead) > 1
    matches = [m for b, varying in ahead if (m := _match(b, varying, call, several, session))]
    found = matches[0] if len(matches) == 1 else _nearest(session, call, matches)
    return None if found is None or _is_crowded(found, call) else found


def _of_conditioning(
    branches: Sequence[Branch], call: CallEvidence
) -> list[tuple[Branch, frozenset[int]]]:
    """The branches with the call's conditioning.

    In a cache context, and in a piece of a model, also those where the least of it varies.
    """
    given = call.conditioning
    objects = [(b, given.other_objects(b.conditioning)) for b in branches]
    same = [(b, places) for b, places in objects if not places]
    if any(b.held for b, _ in same):  # what a generation before left is no reason to stop here
        return same
    values = [(b, given.other_values(b.conditioning, places)) for b, places in objects]
    equal = [(b, places) for b, places in values if not places]
    if any(b.held for b, _ in equal) or not (call.context or call.derived):
        return equal
    others = [(b, places) for b, places in values if places]
    least = min((len(places) for _, places in others), default=0)
    return equal + [(b, places) for b, places in others if len(places) == least]


def _moves_on(branch: Branch, call: CallEvidence) -> bool:
    """Whether the call's timestep does not move back from the branch's newest one."""
    trajectory = branch.trajectory
    if trajectory.value is None or trajectory.explicit != call.explicit:
        return False
    direction = branch.generation.position.direction
    return way_of(trajectory.value, call.value, direction, call.explicit) is not None


def _match(
    branch: Branch, varying: frozenset[int], call: CallEvidence, several: bool, session: Session
) -> Match | None:
    """A branch, unless the call's sample comes from elsewhere.

    Conditioning that varies is no evidence: there the sample must go on, and the first call of its
    kind computes. What a piece of a model is given varies from its second call on, or not at all.
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
    """How far the timestep moves: a branch that was left out for some steps moves as others do."""
    if call.explicit:
        return Jump.NONE
    jump, newest = branch.generation.jump(call.value), session.newest
    if jump is Jump.NONE or newest is None or newest is branch.generation:
        return jump
    return min(jump, newest.jump(call.value))


def _nearest(session: Session, call: CallEvidence, matches: Sequence[Match]) -> Match | None:
    """Of several branches the one whose sample is much nearer than the others'.

    Where none is, the one that was answered last in the newest generation; if that is not one
    alone, nothing tells.
    """
    if not matches:
        return None
    holding = [m for m in matches if m.branch.held or m.branch.generation is session.newest]
    holding = holding or list(matches)
    first, second = sorted(matches, key=lambda m: _distance(m.judgement))[:2]
    nearer = _distance(first.judgement) < NEARER * _distance(second.judgement)
    if nearer and _is_open(first, call, holding):
        return first
    ranks = [(m.branch.generation is session.newest, m.branch.answered) for m in holding]
    latest = [m for m, rank in zip(holding, ranks, strict=True) if rank == max(ranks)]
    return latest[0] if len(latest) == 1 else None


def _is_crowded(match: Match, call: CallEvidence) -> bool:
    """Whether a branch that is not known any more may be meant, and the sample does not tell."""
    trajectory = match.branch.trajectory
    told = match.judgement.change is not None and trajectory.change > 0
    return match.branch.generation.crowded and not told and not trajectory.similar(call.sample)


def _is_open(match: Match, call: CallEvidence, holding: Sequence[Match]) -> bool:
    """Whether a branch may be meant although others hold something.

    One that holds nothing (its generation gave way to another one) is only meant where what is
    held is too young to be told by its sample, and where its timestep moves on: the same seed
    gives the same sample at the same timestep once more.
    """
    if match.branch.held:
        return True
    young = all(m.branch.trajectory.change == 0 for m in holding)
    return young and not match.branch.trajectory.stands_at(call.value)


def _distance(judgement: Judgement) -> float:
    return float("inf") if judgement.change is None else judgement.change
