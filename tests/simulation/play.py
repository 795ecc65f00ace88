"""
Lets acts happen in a world, one at a time, and looks after each whether everything promised still holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hwbpd.core import events as it
from hwbpd.core.lifecycle import QUEUED, State
from hwbpd.core.model import Access, ArmedBy, Mode, Owner, Piece, Plan, Pool, Span, Target
from hwbpd.core.policy import Policy
from hwbpd.hookspecs import ArmError
from tests.simulation import acts, promises
from tests.simulation.acts import Act, Place, World
from tests.simulation.kernel import Kernel
from tests.simulation.shell import SECOND_NS, Shell

UIDS = (0, 1000, 1000, 1001, 0)  # of the owners
GRACE_NS = SECOND_NS // 10
ACT_NS = 1_000_000
ROUNDS_MOST = 400  # in which those who wait have to be served once all room is back


class Play:
    """
    A world in which acts have happened.

    :param act_ns: how long an act takes.
    """

    def __init__(self, world: World, act_ns: int = ACT_NS) -> None:
        self.world = world
        self._act_ns = act_ns
        self.kernel = Kernel(world.slots, world.cpus, world.tasks)
        policy = Policy(reserve_slots=world.reserve_slots, revoke_grace_ns=GRACE_NS)
        self.shell = Shell(self.kernel, policy, world.rearm_after_ns)
        self.claim_ids: dict[int, int] = {}  # number of a request -> the claim
        self.asked_for = 0
        self.requests = 0
        self.sessions: dict[int, int] = {}  # owner -> its session
        self.begun = 0
        self.late: list[tuple[Any, bool]] = []  # threads of whose end the daemon has not heard yet
        self.poked: dict[int, int] = {}  # claim -> how its tracer's pokes went: 0 or an errno
        self.shell.after_step = lambda effects: promises.slots_are_taken_fairly(self.shell, effects)
        self._happens: dict[type[Act], Callable[[Any], None]] = {
            acts.Claims: self._claims,
            acts.Releases: self._releases,
            acts.Yields: self._yields,
            acts.Rearms: self._rearms,
            acts.Takes: self._takes,
            acts.Pokes: self._pokes,
            acts.SaysHow: self._says_how,
            acts.Dies: self._dies,
            acts.Exits: self._exits,
            acts.Execs: self._execs,
            acts.Starts: self._starts,
            acts.News: self._news,
            acts.CpuChanges: self._cpu_changes,
            acts.Steals: self._steals,
            acts.Returns: self._returns,
            acts.Refuses: lambda act: self.kernel.refusals.append(act.errno),
            acts.Looks: self._looks,
            acts.Hits: self._hits,
            acts.FuseBlows: self._fuse_blows,
            acts.RearmFails: self._rearm_fails,
            acts.Waits: self._waits,
        }

    def do(self, act: Act, thoroughly: bool = True) -> None:
        """
        Let one thing happen, and all that comes of it.

        :param thoroughly: check also what costs much to check.
        :raises AssertionError: when something promised is not true any more.
        """
        self.shell.now_ns += self._act_ns
        self._tick(thoroughly)
        self._happens[type(act)](act)
        self._tick(thoroughly)
        self._check(thoroughly)

    def _feed(self, event: it.AnyEvent) -> None:
        self.shell.feed(event)

    def _check(self, thoroughly: bool) -> None:
        promises.check(self.shell)
        if thoroughly:
            promises.check_all(self.shell)

    def _tick(self, thoroughly: bool) -> None:
        deadline_ns = self.shell.arbiter.next_deadline_ns()
        if deadline_ns is not None and deadline_ns <= self.shell.now_ns:
            self._feed(it.Tick(self.shell.now_ns))
            self._check(thoroughly)
            promises.nothing_is_overdue(self.shell)

    # --- what owners do ----------------------------------------------------------------------------------------------

    def owner(self, number: int) -> Owner:
        """The owner as it is now; it says hello if it has to."""
        if number not in self.sessions:
            self.begun += 1
            self.sessions[number] = self.begun
            self.shell.sessions.add(self.begun)
        session = self.sessions[number]
        return Owner(session, 100 + session, UIDS[number], UIDS[number], f"owner{number}")

    def _owner_of(self, claim_id: int) -> Owner | None:
        """Whose claim that is, as far as the owner knows."""
        believed = self.shell.beliefs.get(claim_id)
        return None if believed is None else believed.claim.owner

    def _request(self) -> int:
        self.requests += 1
        return self.requests

    def target(self, place: Place) -> Target | None:
        """What a place comes down to; None where the thread or process is gone."""
        if place.process is not None:
            alive = [task.process for number, task in self.kernel.tasks.items() if number // 2 == place.process]
            return Target(process=alive[0]) if alive else None
        if place.task is None:
            return Target(cpus=place.cpus)
        task = self.kernel.tasks.get(place.task)
        return None if task is None else Target(task, place.cpus)

    def _claims(self, act: acts.Claims) -> None:
        target = self.target(act.place)
        if target is None:
            return  # refused at the door
        owner, now_ns = self.owner(act.owner), self.shell.now_ns
        access = Access.EXECUTE if act.pool is Pool.INST else Access.WRITE
        first = 0x1000 + 64 * act.address
        plan = Plan(tuple(Piece(Span(first + 8 * nth, 8), access, act.pool) for nth in range(act.pieces)))
        self.asked_for += 1
        self.claim_ids[act.number] = self.asked_for
        event = it.ClaimRequested(
            now_ns=now_ns,
            owner=owner,
            request_id=self._request(),
            kind=act.kind,
            span=Span(first, 8 * act.pieces),
            access=access,
            mode=Mode(delivery=act.delivery, fuse_hits=act.guard_per_s),
            target=target,
            label="",
            plan=plan,
            guard_per_s=act.guard_per_s,
            privileged=owner.uid == 0,
            priority=act.priority,
            wait_until_ns=now_ns + act.wait_ns if act.wait_ns else 0,
            armed_by=ArmedBy.TRACER if act.is_tracer else ArmedBy.DAEMON,
            placeholder=act.placeholder,
        )
        self.shell.ask(event, "claim", owner)

    def _releases(self, act: acts.Releases) -> None:
        claim_id, owner = self.claim_ids.get(act.number, 0), self.owner(act.owner)
        self._tracer_lets_go(claim_id, owner)
        event = it.ReleaseRequested(self.shell.now_ns, owner, self._request(), claim_id, owner.uid == 0)
        self.shell.ask(event, "release", owner)

    def _tracer_lets_go(self, claim_id: int, owner: Owner) -> None:
        if self._owner_of(claim_id) == owner:
            self.kernel.unpoke(claim_id)

    def _yields(self, act: acts.Yields) -> None:
        self._ask_about(act.number, "yield", it.YieldRequested)

    def _rearms(self, act: acts.Rearms) -> None:
        claim_id = self.claim_ids.get(act.number, 0)
        owner = self._owner_of(claim_id)
        if owner is not None:
            event = it.RearmRequested(self.shell.now_ns, owner, self._request(), claim_id, False)
            self.shell.ask(event, "rearm", owner)

    def _ask_about(self, number: int, what: str, make: Callable[[int, Owner, int, int], Any]) -> None:
        claim_id = self.claim_ids.get(number, 0)
        owner = self._owner_of(claim_id)
        if owner is not None:
            self.shell.ask(make(self.shell.now_ns, owner, self._request(), claim_id), what, owner)

    # --- what tracers do ---------------------------------------------------------------------------------------------

    def _takes(self, act: acts.Takes) -> None:
        self._ask_about(act.number, "taking", it.TakingRequested)

    def _pokes(self, act: acts.Pokes) -> None:
        claim_id = self.claim_ids.get(act.number, 0)
        record = self.shell.arbiter.books.claims.get(claim_id)
        if record is None or record.state is not State.TAKING or claim_id in self.poked:
            return
        assert record.claim.target.task is not None
        if record.claim.target.task in [task for task, _ in self.late]:
            return  # a tracer sees an exec before it can poke
        self.poked[claim_id] = 0
        for piece in record.plan.pieces:
            failed = self.kernel.poke(claim_id, record.claim.target.task, piece.pool)
            if failed:
                self.kernel.unpoke(claim_id)
                self.poked[claim_id] = failed
                break

    def _says_how(self, act: acts.SaysHow) -> None:
        claim_id = self.claim_ids.get(act.number, 0)
        owner = self._owner_of(claim_id)
        went = self.poked.get(claim_id)
        if owner is None or went is None:
            return
        if went == 0:
            self._ask_about(act.number, "taken", it.TakenReported)
            return
        event = it.TakeFailed(self.shell.now_ns, owner, self._request(), claim_id, went)
        self.shell.ask(event, "take_failed", owner)

    # --- what happens to processes, threads and CPUs -----------------------------------------------------------------

    def _dies(self, act: acts.Dies) -> None:
        session = self.sessions.pop(act.owner, None)
        if session is None:
            return
        for believed in self.shell.beliefs.values():
            if believed.claim.owner.session_id == session:
                self.kernel.unpoke(believed.claim.claim_id)
        self.shell.session_ended(session)

    def _exits(self, act: acts.Exits) -> None:
        if act.task in self.kernel.tasks:
            self._end_of(self.kernel.end(act.task), False, act.late)

    def _execs(self, act: acts.Execs) -> None:
        """The other threads of the process exit before."""
        if act.task not in self.kernel.tasks:
            return
        if act.task ^ 1 in self.kernel.tasks:
            self._end_of(self.kernel.end(act.task ^ 1), False, act.late)
        self._end_of(self.kernel.exec(act.task), True, act.late)

    def _end_of(self, task: Any, execed: bool, late: bool) -> None:
        self.late.append((task, execed))
        if not late:
            self._news()

    def _news(self, _: acts.News | None = None) -> None:
        while self.late:
            self.shell.target_ended(*self.late.pop(0))

    def _starts(self, act: acts.Starts) -> None:
        if act.task not in self.kernel.tasks and act.task < self.world.tasks:
            self.kernel.start(act.task)

    def _cpu_changes(self, act: acts.CpuChanges) -> None:
        kernel = self.kernel
        if act.cpu not in kernel.online:
            kernel.online = tuple(sorted((*kernel.online, act.cpu)))
            self._feed(it.CpuCameOnline(self.shell.now_ns, act.cpu))
        elif len(kernel.online) > 1:
            kernel.online = tuple(cpu for cpu in kernel.online if cpu != act.cpu)
            self._feed(it.CpuWentOffline(self.shell.now_ns, act.cpu))

    # --- what goes wrong ---------------------------------------------------------------------------------------------

    def _steals(self, act: acts.Steals) -> None:
        target = self.target(act.place)
        if target is None or -act.thief in self.kernel.held:
            return
        refusals, self.kernel.refusals = self.kernel.refusals, []
        try:
            self.kernel.arm(-act.thief, Piece(Span(0, 8), Access.WRITE, act.pool), target)
        except ArmError:
            pass  # the thief comes too late
        finally:
            self.kernel.refusals = refusals

    def _returns(self, act: acts.Returns) -> None:
        if -act.thief in self.kernel.held:
            self.kernel.give_back(-act.thief)

    def _looks(self, act: acts.Looks) -> None:
        if self.shell.looking:
            claim_id = self.shell.looking.pop(act.nth % len(self.shell.looking))
            self._feed(it.ForeignFound(self.shell.now_ns, claim_id, ()))

    def _hits(self, act: acts.Hits) -> None:
        record = self.shell.arbiter.books.claims.get(self.claim_ids.get(act.number, 0))
        for resource_id in record.resource_ids[:1] if record is not None else ():
            if self.shell.routes.get(resource_id):
                self._feed(it.HitsCounted(self.shell.now_ns, resource_id, act.hits, 0))

    def _fuse_blows(self, _: acts.FuseBlows) -> None:
        self.shell.fuse_blows = True

    def _rearm_fails(self, _: acts.RearmFails) -> None:
        self.shell.rearm_fails = True

    def _waits(self, act: acts.Waits) -> None:
        self.shell.now_ns += act.ns

    # --- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """
        All room comes back: the thieves leave, the kernel refuses nothing, CPUs are online, looks are over, and those
        who hold slots let go of them one by one. Everybody who waits must then be served; and when all have left, the
        books must be as new.
        """
        self.kernel.refusals.clear()
        self.shell.fuse_blows = self.shell.rearm_fails = False
        for resource_id in [one for one in self.kernel.held if one < 0]:
            self.kernel.give_back(resource_id)
        self.do(acts.News())
        for cpu in self.kernel.possible:
            if cpu not in self.kernel.online:
                self.do(acts.CpuChanges(cpu))
        while self.shell.looking:
            self.do(acts.Looks(0))
        self._serve_everybody()
        assert not self.shell.asked, f"requests without an answer: {self.shell.asked}"
        for owner in tuple(self.sessions):
            self.do(acts.Dies(owner))
        for number in tuple(self.kernel.tasks):
            self.do(acts.Exits(number))
        books = self.shell.arbiter.books
        assert not books.claims, "claims of nobody are left"
        assert not books.resources
        assert not self.kernel.held
        assert not self.kernel.events()
        assert not self.shell.attended
        assert not self.shell.routes

    def _serve_everybody(self) -> None:
        books = self.shell.arbiter.books
        for _ in range(ROUNDS_MOST):
            while self.shell.looking:
                self.do(acts.Looks(0))
            queued = {claim_id for claim_id, record in books.claims.items() if record.state in QUEUED}
            if not queued:
                return
            self.do(acts.Waits(SECOND_NS))
            if not queued - {claim_id for claim_id, record in books.claims.items() if record.state in QUEUED}:
                self._let_somebody_go()
        stuck = sorted(claim_id for claim_id, record in books.claims.items() if record.state in QUEUED)
        raise AssertionError(f"all room is back, and claims {stuck} still wait")

    def _let_somebody_go(self) -> None:
        """The oldest claim that holds something ends: released, or with the thread that keeps it."""
        for claim_id, record in tuple(self.shell.arbiter.books.claims.items()):
            if record.state in QUEUED:
                continue
            owner = record.claim.owner
            if claim_id in self.shell.beliefs:
                self._tracer_lets_go(claim_id, owner)
                self.shell.now_ns += ACT_NS
                event = it.ReleaseRequested(self.shell.now_ns, owner, self._request(), claim_id, False)
                self.shell.ask(event, "release", owner)
                self._check(thoroughly=True)
                if claim_id not in self.shell.arbiter.books.claims:
                    return
            task = record.claim.target.task
            for number, alive in tuple(self.kernel.tasks.items()):
                if alive == task:
                    self.do(acts.Exits(number))
            return

    def stories(self, claim_ids: list[int]) -> list[str]:
        """What happened to these claims."""
        lines = []
        for claim_id in claim_ids:
            record = self.shell.arbiter.record(claim_id)
            if record is not None:
                lines.append(f"claim {claim_id} ({record.state}):")
                lines += [f"    {line}" for line in record.story.lines()]
        return lines


