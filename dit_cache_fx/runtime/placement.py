"""Which branch, generation and step a call belongs to, by evidence.

The branch is told by `matching`; what is known to differ is another branch, which starts with
nothing. Order is no evidence. A branch whose timestep moves back has begun another generation; so
has one whose sample comes from elsewhere (`trajectory`). In doubt a call computes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dit_cache_fx.runtime.branches import Branch
from dit_cache_fx.runtime.generation import Generation, StepPosition
from dit_cache_fx.runtime.matching import CallEvidence, Match, find_branch
from dit_cache_fx.runtime.session import Session
from dit_cache_fx.runtime.step_count import StepCount
from dit_cache_fx.runtime.trajectory import Trajectory, Verdict
from dit_cache_fx.strategies import Course


@dataclass
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
    course: Course  # what is known of the generation's steps by now
    replaced: Branch | None = None
    new: bool = False  # nothing was known of the branch in this generation

    @property
    def index(self) -> int:
        """The step, counted from the generation's first."""
        return self.position.index

    @property
    def missed(self) -> list[int]:
        """The steps of the generation since the branch was answered last.

        Those that `cur_timestep` left out are none.
        """
        since = range(self.branch.answered + 1, self.position.index)
        if not since or not self.branch.held:
            return []
        return [step for step in since if step in self.generation.entered]

    def settle(self, session: Session, answered: bool) -> bool:
        """The call is done; `answered`: by a graph of the cache, not by the model itself.

        Returns whether the branch could keep what it holds.
        """
        call, branch, generation = self.call, self.branch, self.generation
        if self.new:
            _forget_others(session, call, generation)
        session.calls += 1
        session.passes.note(call.value, call.hooked)
        session.newest = branch.generation = generation
        generation.course = self.course
        generation.enter(self.position, branch.identity)
        branch.conditioning, branch.trajectory = call.conditioning, self.trajectory
        branch.serial, branch.called = call.serial, session.calls
        if answered:
            branch.answered = self.index
        kept = session.add(branch, self.replaced, self.new)
        if self.new:
            branch.number = session.number_of(branch)
        return kept


def place(session: Session, call: CallEvidence, count: StepCount) -> Placement:
    """Find where a call belongs; nothing of the session is changed."""
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


def _repeats(found: Match, call: CallEvidence) -> bool:
    """Whether it is the very call of before, made once more: no step of a sampler.

    A first call that comes again is a retry, or a warm-up: a generation begins.
    """
    trajectory = found.branch.trajectory
    if found.judgement.change != 0 or not trajectory.stands_at(call.value):
        return False
    return trajectory.change > 0 or trajectory.move == 0


def _counted(generation: Generation, position: StepPosition, found: Match) -> StepPosition:
    """A step, with the first calls that came again counted after all.

    Where the sample stands still and the timestep moves by what it may be rounded by, they were
    steps whose timesteps round to one value, and no sampler is there to move the sample.
    """
    still = found.judgement.change == 0 and generation.is_rounded(position.value)
    if not (generation.repeats and still and position is not generation.position):
        return position
    return replace(position, index=position.index + generation.repeats)


def _apart(found: Match, call: CallEvidence) -> tuple[StepPosition, Generation] | None:
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
            course = _course(call, newest, position, count)
            return Placement(call, branch, newest, position, trajectory, course, new=True)
    position = StepPosition(call.value, explicit=call.explicit)
    session.end(count)  # its steps are learnt before the next one is planned
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
    """What is known of the generation's steps by now."""
    return count.on_way(
        generation.course, generation.values, position.index, generation.number(call.value)
    )


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
