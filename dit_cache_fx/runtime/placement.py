"""Which branch, generation and step a call belongs to, by evidence.

A branch is known by its signature, its cache contexts and its conditioning: the same tensors, or
the same values. What is known to differ is another branch, which starts with nothing. Order is no
evidence. A branch whose timestep moves back has begun another generation; so has one whose sample
comes from elsewhere (`trajectory`). In doubt a call computes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from dit_cache_fx.runtime.branches import Branch
from dit_cache_fx.runtime.generation import (
    Generation,
    Jump,
    StepPosition,
    TimestepValue,
)
from dit_cache_fx.runtime.session import Session
from dit_cache_fx.runtime.step_count import StepCount
from dit_cache_fx.runtime.trajectory import Judgement, SampleProbe, Trajectory, Verdict
from dit_cache_fx.strategies import Course
from dit_cache_fx.values.identity import TensorIdentity

#: a sample that is nearer than this share of the next one's distance belongs to a branch
NEARER = 0.5


@dataclass(frozen=True)
class CallEvidence:
    """What is known of a call.

    `key`: its signature. `serial`: the graph that answers it. `context`: the cache contexts that it
    is in. `explicit`: `value` is a step index that the user has set. `derived`: it is of a piece of
    a model, so its conditioning may be made from the timestep.
    """

    key: Hashable
    serial: int
    context: tuple[str, ...]
    value: TimestepValue
    explicit: bool
    conditioning: TensorIdentity
    sample: SampleProbe | None = None
    derived: bool = False


@dataclass(frozen=True)
class Placement:
    """Where a call belongs. Nothing is noted before `settle`: a call that raises leaves no trace.

    `replaced`: the branch that `branch` takes the place of. `missed`: steps of the branch between
    its newest answer and this call, which it did not see.
    """

    call: CallEvidence
    branch: Branch
    generation: Generation
    position: StepPosition
    trajectory: Trajectory
    replaced: Branch | None = None
    course: Course | None = None  # what is known of the generation's steps by now
    new: bool = False  # nothing was known of the branch in this generation
    begins: bool = False  # the generation begins

    @property
    def index(self) -> int:
        """The step, counted from the generation's first."""
        return self.position.index

    @property
    def missed(self) -> list[int]:
        """The steps of the generation since the branch was answered last.

        Those that `cur_timestep` left out are none.
        """
        if not self.branch.held:
            return []
        since = range(self.branch.answered + 1, self.index)
        return [step for step in since if step in self.generation.entered]

    def settle(self, session: Session, answered: bool) -> bool:
        """The call is done; `answered`: by a graph of the cache, not by the model itself.

        Returns whether the branch could keep what it holds.
        """
        call, branch, generation = self.call, self.branch, self.generation
        if self.new:
            _forget_others(session, call, generation)
        session.calls += 1
        session.newest = branch.generation = generation
        generation.course = self.course or generation.course
        generation.enter(self.position, branch.identity)
        branch.conditioning, branch.trajectory = call.conditioning, self.trajectory
        branch.serial, branch.called = call.serial, session.calls
        if answered:
            branch.answered = self.index
        return session.add(branch, self.replaced, self.new)


def place(session: Session, call: CallEvidence, count: StepCount) -> Placement:
    """Find where a call belongs; nothing of the session is changed."""
    found = _find(session, call)
    if found is None:
        return _new_branch(session, call, count)
    branch, judgement, usable = found.branch, found.judgement, found.usable
    at = _position(found, call, session)
    if at is None:
        return _new_branch(session, call, count, left=branch.generation)
    position, generation = at
    if not usable or judgement.verdict is Verdict.DOUBTFUL or branch.serial != call.serial:
        branch = replace(branch.emptied(), varying=found.varying)
    elif found.varying != branch.varying:
        branch = replace(branch, varying=found.varying)
    call.conditioning.keep(found.branch.conditioning)
    trajectory = found.branch.trajectory.after(
        call.value, call.explicit, call.sample, judgement.change
    )
    replaced = found.branch if branch is not found.branch else None
    return Placement(call, branch, generation, position, trajectory, replaced)


@dataclass(frozen=True)
class _Match:
    """A branch that a call may belong to. `usable`: what it holds may answer the call."""

    branch: Branch
    judgement: Judgement
    varying: frozenset[int]
    usable: bool = True


# --- the branch ----------------------------------------------------------------------------------


def _find(session: Session, call: CallEvidence) -> _Match | None:
    """The branch of a call, where the evidence tells one."""
    alike = _of_conditioning(session.of(call.key, call.context), call)
    ahead = [(b, varying) for b, varying in alike if _moves_on(b, call)]
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
    value = branch.trajectory.value
    if value is None:
        return False
    direction = branch.generation.position.direction
    at = StepPosition(value, direction, explicit=branch.trajectory.explicit)
    return at.moved(call.value, call.explicit) is not None


def _match(
    branch: Branch, varying: frozenset[int], call: CallEvidence, several: bool, session: Session
) -> _Match | None:
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
        return _Match(branch, judgement, branch.varying if call.derived else varying)
    if trajectory.stands_at(call.value):  # another branch of the step
        return None
    known = varying <= branch.varying
    if call.derived:
        found = _Match(branch, judgement, varying | branch.varying, usable=known)
        return found if known or trajectory.move == 0 else None
    if judgement.change is None or not trajectory.similar(call.sample):
        return None
    return _Match(branch, judgement, varying, usable=known)


def _jump(branch: Branch, call: CallEvidence, session: Session) -> Jump:
    """How far the timestep moves: a branch that was left out for some steps moves as others do."""
    if call.explicit:
        return Jump.NONE
    generations = {branch.generation, session.newest or branch.generation}
    return min(generation.jump(call.value) for generation in generations)


def _nearest(session: Session, call: CallEvidence, matches: Sequence[_Match]) -> _Match | None:
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


def _is_crowded(match: _Match, call: CallEvidence) -> bool:
    """Whether a branch that is not known any more may be meant, and the sample does not tell."""
    trajectory = match.branch.trajectory
    told = match.judgement.change is not None and trajectory.change > 0
    return match.branch.generation.crowded and not told and not trajectory.similar(call.sample)


def _is_open(match: _Match, call: CallEvidence, holding: Sequence[_Match]) -> bool:
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


# --- the step ------------------------------------------------------------------------------------


def _position(
    found: _Match, call: CallEvidence, session: Session
) -> tuple[StepPosition, Generation] | None:
    """The step of a known branch, and its generation; None where another one begins."""
    branch = found.branch
    if _repeats(found, call):
        again = branch.generation
        same = again.position.moved(call.value, call.explicit) == 0
        return (again.position, again) if same and branch.trajectory.change > 0 else None
    for generation in (branch.generation, session.newest):
        if generation is not None and branch.generation in (generation, generation.origin):
            position = generation.reached(call.value, call.explicit, branch.identity)
            if position is not None:
                position = _counted(generation, position, found)
                return None if generation.over(position) else (position, generation)
    return _apart(found, call)


def _repeats(found: _Match, call: CallEvidence) -> bool:
    """Whether it is the very call of before, made once more: no step of a sampler.

    A first call that comes again is a retry, or a warm-up: a generation begins.
    """
    trajectory = found.branch.trajectory
    if found.judgement.change != 0 or not trajectory.stands_at(call.value):
        return False
    return trajectory.change > 0 or trajectory.move == 0


def _counted(generation: Generation, position: StepPosition, found: _Match) -> StepPosition:
    """A step, with the first calls that came again counted after all.

    Where the sample stands still and the timestep moves by what it may be rounded by, they were
    steps whose timesteps round to one value, and no sampler is there to move the sample.
    """
    still = found.judgement.change == 0 and generation.is_rounded(position.value)
    if not (generation.repeats and still and position is not generation.position):
        return position
    return replace(position, index=position.index + generation.repeats)


def _apart(found: _Match, call: CallEvidence) -> tuple[StepPosition, Generation] | None:
    """The step of a branch whose generation other branches have moved past this call's timestep.

    They are another request's then, and the branch goes on from its own newest step: where its
    sample says so. Else a generation begins.
    """
    branch, trajectory = found.branch, found.branch.trajectory
    if not found.judgement.change or not trajectory.change or trajectory.value is None:
        return None
    own = branch.generation.position
    last = StepPosition(trajectory.value, own.direction, max(branch.answered, 0), own.explicit)
    generation = branch.generation.apart(last, branch.identity)
    position = generation.reached(call.value, call.explicit, branch.identity)
    return None if position is None else (position, generation)


def _new_branch(
    session: Session,
    call: CallEvidence,
    count: StepCount,
    left: Generation | None = None,
) -> Placement:
    """A branch that holds nothing: of the step under way, of the next, or a new generation's.

    `left`: the generation that the call is not of, though its branch was.
    """
    call.conditioning.remember()
    trajectory = Trajectory(call.value, call.explicit, call.sample)
    branch = Branch(key=call.key, context=call.context, serial=call.serial)
    newest = session.newest
    if newest is not None and newest is not left:
        position = newest.reached(call.value, call.explicit, branch.identity)
        if position is not None and _joins(session, newest, position, call):
            return Placement(call, branch, newest, position, trajectory, new=True)
    position = StepPosition(call.value, explicit=call.explicit)
    session.end(count)  # its steps are learnt before the next one is planned
    generation = Generation.begun(position, count)
    if (
        left is not None
        and left.position.index == 0
        and left.position.moved(call.value, False) == 0
    ):
        generation.repeats = left.repeats + 1
    return Placement(call, branch, generation, position, trajectory, new=True, begins=True)


def _joins(
    session: Session, generation: Generation, position: StepPosition, call: CallEvidence
) -> bool:
    """Whether an unknown branch belongs to a generation under way.

    At the same timestep it is another branch of the step. At one that moves on it is, where its
    sample goes on from those of the generation, or it shares conditioning with them.
    """
    last = max(
        (b for b in session.branches if b.generation is generation),
        key=lambda b: b.called,
        default=None,
    )
    if generation.over(position) or last is None or last.context[:-1] != call.context[:-1]:
        return False
    if position is generation.position or call.explicit:
        return True
    jump = generation.jump(call.value)
    judgement = last.trajectory.judge(call.value, call.explicit, call.sample, True, jump)
    if judgement.verdict is not Verdict.CONTINUES:
        return False
    known = judgement.change is not None and last.trajectory.change > 0
    if known or generation.position.direction:
        return True
    return call.conditioning.shares(last.conditioning) or last.trajectory.similar(call.sample)


def _forget_others(session: Session, call: CallEvidence, generation: Generation) -> None:
    """A generation has a new branch: drop what others hold for calls of this kind."""
    for other in session.of(call.key, call.context):
        if other.generation is not generation:
            other.forget()
