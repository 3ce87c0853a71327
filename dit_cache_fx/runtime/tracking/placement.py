"""Determine the branch, generation and step of a call, by evidence.

`matching` finds the branch; a call that is known to differ is a new branch, which starts with
nothing. Order is no evidence. A branch whose timestep moves back has begun another generation; so
has one whose sample does not continue (`trajectory`). In doubt a call computes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dit_cache_fx.runtime.tracking.branches import Branch
from dit_cache_fx.runtime.tracking.generation import Generation, StepPosition
from dit_cache_fx.runtime.tracking.matching import CallEvidence, Match, find_branch
from dit_cache_fx.runtime.tracking.session import Session
from dit_cache_fx.runtime.tracking.step_count import StepCount
from dit_cache_fx.runtime.tracking.trajectory import Trajectory, Verdict
from dit_cache_fx.strategies import Course


@dataclass(slots=True)
class Placement:
    """The place of a call. Nothing is recorded before `settle`: a call that raises has no effect.

    `replaced`: the branch that `branch` replaces. `missed`: the steps of the branch between its
    newest answer and this call, which it did not see.
    """

    call: CallEvidence
    branch: Branch
    generation: Generation
    position: StepPosition
    trajectory: Trajectory
    course: Course  # the generation's steps as known now
    replaced: Branch | None = None
    new: bool = False  # the branch is new in this generation

    @property
    def index(self) -> int:
        """The step, counted from the generation's first."""
        return self.position.index

    @property
    def missed(self) -> list[int]:
        """The steps of the generation since the branch's newest answer.

        Steps that `cur_timestep` left out do not count.
        """
        since = range(self.branch.answered + 1, self.position.index)
        if not since or not self.branch.cached:
            return []
        return [step for step in since if step in self.generation.entered]

    def settle(self, session: Session, answered: bool) -> bool:
        """Record the call; `answered`: by a graph of the cache, not by the model itself.

        Returns whether the branch could keep its cached tensors.
        """
        call, branch, generation = self.call, self.branch, self.generation
        if self.new:
            _forget_others(session, call, generation)
        session.calls += 1
        session.forward_passes.note(call.value, call.hooked)
        session.newest = branch.generation = generation
        generation.course = self.course
        generation.enter(self.position, branch.identity)
        branch.conditioning, branch.trajectory = call.conditioning, self.trajectory
        branch.serial, branch.called = call.serial, session.calls
        if answered:
            branch.answered = self.index
        could_hold = session.add(branch, self.replaced, self.new)
        if self.new:
            branch.number = session.number_of(branch)
        return could_hold


def place(session: Session, call: CallEvidence, count: StepCount) -> Placement:
    """Find the place of a call; the session does not change."""
    found = find_branch(session, call)
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
    return Placement(
        call,
        branch,
        generation,
        position,
        trajectory,
        _course(call, generation, position, count),
        replaced,
    )


def _position(
    found: Match, call: CallEvidence, session: Session
) -> tuple[StepPosition, Generation] | None:
    """Return the step and the generation of a known branch; None if another generation begins."""
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


def _repeats(found: Match, call: CallEvidence) -> bool:
    """Return whether the call repeats the one before exactly: no step of a sampler.

    A first call that is repeated is a retry or a warm-up: a generation begins.
    """
    trajectory = found.branch.trajectory
    if found.judgement.change != 0 or not trajectory.stands_at(call.value):
        return False
    return trajectory.change > 0 or trajectory.move == 0


def _counted(generation: Generation, position: StepPosition, found: Match) -> StepPosition:
    """Return a step that counts the repetitions of the first call after all.

    If the sample stands still and the timestep moves by its rounding error, the repetitions were
    steps whose timesteps round to one value, without a sampler that moves the sample.
    """
    still = found.judgement.change == 0 and generation.is_rounded(position.value)
    if not (generation.repeats and still and position is not generation.position):
        return position
    return replace(position, index=position.index + generation.repeats)


def _apart(found: Match, call: CallEvidence) -> tuple[StepPosition, Generation] | None:
    """Return the step of a branch whose generation others have moved past this call's timestep.

    Then the others belong to another request, and the branch continues from its own newest step if
    its sample continues. Otherwise a generation begins.
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
    """Place a new branch: in the current step, in the next, or in a new generation.

    `left`: the generation that the call does not belong to, although its branch did.
    """
    call.conditioning.remember()
    trajectory = Trajectory(call.value, call.explicit, call.sample)
    branch = Branch(key=call.key, context=call.context, serial=call.serial)
    last = _last_of_caller(session, call)
    if last is not None and last.generation is not left:
        under_way = last.generation
        position = under_way.reached(call.value, call.explicit, branch.identity)
        if position is not None and _joins(session, last, position, call):
            course = _course(call, under_way, position, count)
            return Placement(call, branch, under_way, position, trajectory, course, new=True)
    position = StepPosition(call.value, explicit=call.explicit)
    session.end(count)  # learn its steps before the next one is planned
    generation = Generation.begun(position, count, session.timesteps)
    if (
        left is not None
        and left.position.index == 0
        and left.position.moved(call.value, False) == 0
    ):
        generation.repeats = left.repeats + 1
    course = _course(call, generation, position, count)
    return Placement(call, branch, generation, position, trajectory, course, new=True)


def _course(
    call: CallEvidence, generation: Generation, position: StepPosition, count: StepCount
) -> Course:
    """Return the generation's steps as known now."""
    if generation.course.timesteps is None:
        return generation.course
    now = generation.number(call.value)
    return count.on_way(generation.course, generation.values, position.index, now)


def _last_of_caller(session: Session, call: CallEvidence) -> Branch | None:
    """Return the branch called last within the same outer contexts, which tell requests apart."""
    own = [b for b in session.branches if b.context[:-1] == call.context[:-1]]
    return max(own, key=lambda b: b.called, default=None)


def _joins(session: Session, last: Branch, position: StepPosition, call: CallEvidence) -> bool:
    """Return whether an unknown branch belongs to the generation of the branch called `last`.

    At the same timestep it is another branch of the step. At one that moves on it belongs if its
    sample continues those of the generation, or it shares conditioning with them. In a session of
    one request it belongs unless its sample comes from elsewhere.
    """
    generation = last.generation
    if generation.over(position):
        return False
    if position is generation.position or call.explicit:
        return True
    jump = generation.jump(call.value)
    judgement = last.trajectory.judge(call.value, call.explicit, call.sample, True, jump)
    if judgement.verdict is not Verdict.CONTINUES:
        return False
    known = judgement.change is not None and last.trajectory.change > 0
    if known or generation.position.direction or session.of_one_request or call.context[:-1]:
        return True
    return call.conditioning.shares(last.conditioning) or last.trajectory.similar(call.sample)


def _forget_others(session: Session, call: CallEvidence, generation: Generation) -> None:
    """A generation has a new branch: drop the tensors that others hold for calls of this kind."""
    for other in session.of(call.key, call.context):
        if other.generation is not generation:
            other.forget()
