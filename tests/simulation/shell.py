"""
The daemon's shell without its sockets: it steps the core, carries its effects out on the simulated kernel, and keeps
what every owner has been told.

Effects are carried out in order, and what comes of them is stepped before anything else, as ``hwbpd/server.py`` does;
only a look at who is in the way takes its time. What an owner was told, and what it was never told, is in its
``Belief`` of each claim; ``promises.py`` compares that with the books.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterable

from hwbpd.core import effects as do
from hwbpd.core import events as it
from hwbpd.core.arbiter import Arbiter
from hwbpd.core.effects import Change, Effect
from hwbpd.core.events import AnyEvent
from hwbpd.core.lifecycle import State
from hwbpd.core.model import Claim, Owner, Task, Totals
from hwbpd.core.policy import Policy
from hwbpd.hookspecs import ArmError
from tests.simulation.kernel import Kernel

SECOND_NS = 1_000_000_000
Asking = (
    it.ClaimRequested
    | it.ReleaseRequested
    | it.RearmRequested
    | it.YieldRequested
    | it.TakingRequested
    | it.TakenReported
    | it.TakeFailed
)
# The word by which a request is answered -> the request.
WORDS = {"yielded": "yield", "take": "taking", "taken": "taken", "take_failed": "take_failed", "released": "release"}


class Belief:
    """What the owner of a claim knows about it."""

    __slots__ = ("asked_to_yield", "claim", "is_guarded", "stands")

    def __init__(self, claim: Claim) -> None:
        self.claim = claim
        self.stands = "asked"  # then "queued", "granted" or "suspended"
        self.asked_to_yield = False
        self.is_guarded = False


class Shell:
    """An arbiter with its machine, and everything that was said between them."""

    def __init__(self, kernel: Kernel, policy: Policy, rearm_after_ns: int = 0) -> None:
        self.kernel = kernel
        self.policy = policy
        self.arbiter = Arbiter(kernel.slots, kernel.possible, kernel.online, rearm_after_ns, policy)
        self.now_ns = SECOND_NS
        self.stepped = 0
        self.asked: dict[int, tuple[int, str]] = {}  # request not answered yet -> its session, and what it is
        self.beliefs: dict[int, Belief] = {}  # of claims whose owner has not been told that they are over
        self.sessions: set[int] = set()  # those alive
        self.told: set[Change] = set()  # what sort of notices there were
        self.routes: dict[int, set[int]] = {}  # resource -> claims that get its hits
        self.attended: set[int] = set()  # resources that are armed by tracers
        self.looking: list[int] = []  # claims for which somebody looks who is in the way
        self.refused: set[int] = set()  # claims refused to their owner in this event and all that came of it
        self.displaced: list[tuple[Claim, tuple[int, ...]]] = []  # claims asked to give way in it, and for which
        self.fuse_blows = False
        self.rearm_fails = False
        self.after_step: Callable[[list[Effect]], None] = lambda _: None

    def feed(self, event: AnyEvent) -> None:
        """Step an event, carry out its effects, and step what comes of them, until nothing more does."""
        self.refused.clear()
        self.displaced.clear()
        pending = deque([event])
        while pending:
            event = pending.popleft()
            self.stepped += 1
            effects = self.arbiter.step(event)
            self.after_step(effects)
            for effect in effects:
                outcome = self.carry_out(effect)
                if outcome is not None:
                    pending.append(outcome)

    def ask(self, event: Asking, what: str, by: Owner) -> None:
        """Feed a request; it is owed an answer."""
        self.asked[event.request_id] = by.session_id, what
        self.feed(event)

    def carry_out(self, effect: Effect) -> AnyEvent | None:
        """What the machine does with an effect and says to it, or what an owner hears."""
        match effect:
            case do.Arm():
                return self._arm(effect)
            case do.Attend():
                return self._attend(effect)
            case do.Handover(claim_id, resource_ids):
                for resource_id in resource_ids:
                    self.kernel.give_back(resource_id)
                self.attended |= set(resource_ids)
            case do.Probe(claim_id, target, pool, known):
                assert target.task is not None
                return it.Probed(self.now_ns, claim_id, self.kernel.outside(target.task, pool) > known)
            case do.Disarm(claim_id, resource_ids, shared):
                self._give_back(resource_ids)
                self._unroute(claim_id, shared)
                return it.Disarmed(self.now_ns, claim_id, Totals())
            case do.Suspend(claim_id, resource_ids, shared):
                self._give_back(resource_ids)
                self._unroute(claim_id, (*resource_ids, *shared))
                return it.Suspended(self.now_ns, claim_id)
            case do.Attribute(claim_id):
                self.looking.append(claim_id)
            case do.DropLeg(resource_id, cpu):
                self.kernel.drop_leg(resource_id, cpu)
            case do.AddLeg():
                return self._add_leg(effect)
            case _:
                return self._of_hits(effect)
        return None

    def _of_hits(self, effect: Effect) -> AnyEvent | None:
        match effect:
            case do.TopUp(resource_id):
                blows, self.fuse_blows = self.fuse_blows, False
                return it.FuseBlown(self.now_ns, resource_id) if blows else None
            case do.Silence(resource_ids):
                assert all(resource_id in self.kernel.held for resource_id in resource_ids), "silences what is armed"
            case do.Rearm(claim_id):
                fails, self.rearm_fails = self.rearm_fails, False
                if fails:
                    return it.RearmFailed(self.now_ns, claim_id, errno.ENOSPC)
                return it.Rearmed(self.now_ns, claim_id)
            case do.Route(resource_id, claim):
                assert resource_id in self.kernel.held or resource_id in self.attended, "hits come from what is armed"
                self.routes.setdefault(resource_id, set()).add(claim.claim_id)
            case do.Unroute(resource_id, claim_id):
                self._unroute(claim_id, (resource_id,))
            case _:
                self._tell(effect)
        return None

    # --- the machine -------------------------------------------------------------------------------------------------

    def _arm(self, effect: do.Arm) -> AnyEvent:
        claim_id = effect.claim.claim_id
        taken = []
        try:
            for resource in effect.resources:
                self.kernel.arm(resource.resource_id, resource.piece, resource.target)
                taken.append(resource.resource_id)
        except ArmError as refusal:
            for resource_id in taken:
                self.kernel.give_back(resource_id)
            return it.ArmFailed(self.now_ns, claim_id, refusal.errno, refusal.cpu, refusal.tid)
        return it.Armed(self.now_ns, claim_id)

    def _attend(self, effect: do.Attend) -> AnyEvent:
        claim = effect.claim
        assert claim.target.task is not None
        if not self.kernel.is_alive(claim.target.task):
            return it.ArmFailed(self.now_ns, claim.claim_id, errno.ESRCH, None, claim.target.task.tid)
        self.attended |= {resource.resource_id for resource in effect.resources}
        return it.Armed(self.now_ns, claim.claim_id)

    def _add_leg(self, effect: do.AddLeg) -> AnyEvent:
        resource_id, cpu = effect.resource_id, effect.cpu
        try:
            self.kernel.add_leg(resource_id, self.arbiter.books.resources[resource_id].piece, cpu)
        except ArmError as refusal:
            return it.LegRefused(self.now_ns, resource_id, cpu, refusal.errno)
        return it.LegTaken(self.now_ns, resource_id, cpu)

    def _give_back(self, resource_ids: Iterable[int]) -> None:
        for resource_id in resource_ids:
            if resource_id in self.attended:
                self.attended.remove(resource_id)
            else:
                self.kernel.give_back(resource_id)

    def _unroute(self, claim_id: int, resource_ids: Iterable[int]) -> None:
        for resource_id in resource_ids:
            routed = self.routes.get(resource_id, set())
            routed.discard(claim_id)
            if not routed:
                self.routes.pop(resource_id, None)

    def target_ended(self, task: Task, execed: bool) -> None:
        """Tell of the end of a thread, or of the program it ran, for each resource that goes by it."""
        for resource_id, resource in tuple(self.arbiter.books.resources.items()):
            target = resource.target
            is_over = target.task == task or (
                target.process is not None
                and target.process == task.process
                and (execed or not self.kernel.is_alive(target.process))
            )
            is_there = resource_id in self.kernel.held or resource_id in self.attended
            if is_over and is_there and not (execed and resource.mode.across_exec):
                self.feed(it.TargetEnded(self.now_ns, resource_id, execed))

    # --- what owners hear --------------------------------------------------------------------------------------------

    def _tell(self, effect: Effect) -> None:
        match effect:
            case do.Grant(claim, request_id):
                self._answered(request_id, "claim")
                self._belief(claim).stands = "granted"
            case do.Queued(claim, request_id):
                self._answered(request_id, "claim")
                self._belief(claim).stands = "queued"
            case do.Refuse(_, request_id, _, _):
                if self._answered(request_id) == "claim":
                    self.refused.add(effect.claim_id)
                    self.beliefs.pop(effect.claim_id, None)
            case do.Done(_, request_id, what, claim_id):
                self._answered(request_id, WORDS[what])
                left = self.arbiter.books.claims.get(claim_id)
                if claim_id in self.beliefs and left is not None and left.state is State.RESIDUE:
                    self._over(self._belief_of(claim_id).claim)
            case do.RearmDone(_, _, request_id):
                self._answered(request_id, "rearm")
            case do.Ended(claim, _, _, _, asked_by, request_id):
                if asked_by is not None:
                    self._answered(request_id)
                self._over(claim)
            case do.Tell(claim, change, cpu=None):
                self._told(effect, claim, change)
            case do.Tell(_, change):  # of one CPU; the claim goes on
                self.told.add(change)

    def _told(self, effect: do.Tell, claim: Claim, change: Change) -> None:
        self.told.add(change)
        if change in {Change.FOREIGN, Change.CONTENDED}:
            return  # changes nothing; the first is told of a claim that is over
        believed = self._belief(claim)
        match change:
            case Change.GRANTED:
                assert believed.stands == "queued", f"{believed.stands}, and granted unasked"
                believed.stands = "granted"
            case Change.REVOKE:
                assert believed.stands == "granted"
                believed.asked_to_yield = True
                self.displaced.append((claim, tuple(one for by in effect.holders for one in by.claim_ids)))
            case Change.SPARED:
                assert believed.asked_to_yield
                believed.asked_to_yield = False
            case Change.SUSPENDED:
                assert believed.stands == "granted"
                believed.stands, believed.asked_to_yield, believed.is_guarded = "suspended", False, False
            case Change.RESUMED:
                assert believed.is_guarded or believed.stands == "suspended", "only what was not going on resumes"
                believed.stands, believed.is_guarded = "granted", False
            case Change.GUARDED:
                assert not believed.is_guarded
                believed.is_guarded = True

    def _belief(self, claim: Claim) -> Belief:
        if claim.claim_id not in self.beliefs:
            self.beliefs[claim.claim_id] = Belief(claim)
        return self.beliefs[claim.claim_id]

    def _belief_of(self, claim_id: int) -> Belief:
        assert claim_id in self.beliefs, f"told of claim {claim_id}, which it does not have"
        return self.beliefs[claim_id]

    def _over(self, claim: Claim) -> None:
        """
        Told once, or refused in the same breath where an operator ends what its owner had no answer to yet. What a
        tracer leaves behind is over for its owner before it is for the books.
        """
        believed = self.beliefs.pop(claim.claim_id, None)
        if believed is None and claim.claim_id not in self.refused:
            assert claim.armed_by == "tracer" or claim.owner.session_id not in self.sessions, "over twice"

    def _answered(self, request_id: int, what: str | None = None) -> str | None:
        """Note an answer; each request has one, and to those who have gone nothing is owed."""
        asked = self.asked.pop(request_id, None)
        if asked is None:
            raise AssertionError(f"request {request_id} is answered twice, or was never asked")
        assert what is None or asked[1] == what, f"{asked[1]} is answered as {what}"
        return asked[1]

    def session_ended(self, session_id: int) -> None:
        """Nobody is there to be told any more."""
        self.sessions.discard(session_id)
        self.feed(it.SessionEnded(self.now_ns, session_id, "its process has ended"))
        self.asked = {request: asked for request, asked in self.asked.items() if asked[0] != session_id}
        for claim_id in [one for one, of in self.beliefs.items() if of.claim.owner.session_id == session_id]:
            del self.beliefs[claim_id]
