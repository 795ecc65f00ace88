"""
Who may do what: the table of docs/protocol.md ("Who may"), row by row, for root, the owner's uid, and another uid.

What the kernel would let somebody do is decided by ``FakeRights``: everything but whole CPUs and forbidden threads.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hwbpd.core import invariants
from tests.fakes import FakeClient, Rig

PROTOCOL = Path(__file__).resolve().parent.parent / "docs" / "protocol.md"
TID, FORBIDDEN_TID = 812, 820
OWNER_UID, OTHER_UID = 1000, 1001
CLAIM: dict[str, Any] = {"address": 0x404040, "length": 8, "access": "w"}

ROWS_TRIED = {
    "`hello`, `capabilities`, `plan`, `slots`, `vms`",
    "`claim`, `fit` on a thread or process",
    "`claim`, `fit` on a vCPU",
    "`claim`, `fit` CPU-wide, kernel hits, kernel addresses",  # kernel hits and addresses: test_warden.py
    "kernel call chains, kernel instruction pointers, no guard",
    "kinds `kgdb`, `kvm`",
    "`release`, `rearm`",
    "a `priority` above 0",
    "to displace claims of lower rank",
    "`yield`, `taking`, `taken`, `take_failed`",
    "`counts`, `why`",
    "`why` about an errno",
    "`foreign`, `host_contents`",
    "`vm`, `vcpu`",
    "`vcpu_loaded`, `vcpu_hit`, `vcpu_report`",
    "`enabled` with a thread",
    "`enabled` with a CPU alone",
    "`thread`",
    "`follow`",
}


class People:
    """Somebody with a claim, and those who might want something of it; all have sessions with one daemon."""

    def __init__(self) -> None:
        self.rig = Rig()
        for tid in (TID, TID + 1, FORBIDDEN_TID):
            self.rig.machine.start_task(tid)
        self.rig.rights.forbidden = {FORBIDDEN_TID}
        self.owner = self.rig.client(uid=OWNER_UID, pid=2006)
        self.clients = {
            "root": self.rig.client(uid=0, pid=2000),
            "owner": self.owner,
            "same uid": self.rig.client(uid=OWNER_UID, pid=2002),
            "other": self.rig.client(uid=OTHER_UID, pid=2004),
        }
        self.claim = int(self.ask("owner", "claim", **CLAIM, tid=TID)["claim"])

    def ask(self, who: str, op: str, **fields: Any) -> dict[str, Any]:
        return self.rig.ask(self.clients[who], op, **fields)

    def errno_of(self, who: str, op: str, **fields: Any) -> str | None:
        """The errno of the refusal, or None where it is done."""
        reply = self.ask(who, op, **fields)
        return str(reply["errno"]) if reply["op"] == "error" else None

    def vcpu(self) -> int:
        """A vCPU of the owner's, whose thread is the owner's."""
        own_tid = self.owner.pid
        self.rig.machine.start_task(own_tid)
        vm = self.ask("owner", "vm")["vm"]
        return int(self.ask("owner", "vcpu", vm=vm, number=0, tid=own_tid)["vcpu"])

    def flood(self) -> None:
        """Let the claim be silenced."""
        self.rig.machine.hit(1, 10 * self.rig.settings.guard.hits_per_s)
        for _ in range(10):
            self.rig.clock.wind(0.01)
            self.rig.turn()
        assert self.rig.arbiter.books.claims[self.claim].state == "guarded"


@pytest.fixture
def people() -> Iterator[People]:
    people = People()
    yield people
    invariants.check(people.rig.arbiter.books)
    people.rig.stop()


everybody = pytest.mark.parametrize("who", ["root", "owner", "same uid", "other"])


def test_every_row_of_the_table_is_tried_here() -> None:
    section = PROTOCOL.read_text(encoding="utf-8").split("## Who may\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.*?) \|", section, re.MULTILINE)

    assert set(rows) - {"request"} == ROWS_TRIED


@everybody
def test_everybody_may_ask_what_there_is_and_who_holds_it(people: People, who: str) -> None:
    assert people.ask(who, "capabilities")["op"] == "capabilities"
    assert people.ask(who, "plan", **CLAIM)["op"] == "plan"
    assert people.ask(who, "vms")["vms"] == []
    (row,) = people.ask(who, "slots")["resources"]
    assert (row["tid"], row["claims"][0]["uid"]) == (TID, OWNER_UID)


@everybody
def test_what_is_watched_is_seen_by_its_owner_and_root(people: People, who: str) -> None:
    (row,) = people.ask(who, "slots")["resources"]

    assert row["address"] == (None if who == "other" else CLAIM["address"])


@pytest.mark.parametrize("op", ["claim", "fit"])
@everybody
def test_a_thread_or_process_may_be_watched_where_the_kernel_would_allow_it(people: People, who: str, op: str) -> None:
    for allowed in ({"tid": TID}, {"pid": TID}):
        assert people.errno_of(who, op, **CLAIM, **allowed) is None
    for target in ({"tid": FORBIDDEN_TID}, {"pid": FORBIDDEN_TID}, {"tid": FORBIDDEN_TID, "cpus": [0]}):
        assert people.errno_of(who, op, **CLAIM, **target) == (None if who == "root" else "EPERM")


@pytest.mark.parametrize("op", ["claim", "fit"])
@everybody
def test_a_cpu_may_be_watched_where_the_kernel_would_allow_it(people: People, who: str, op: str) -> None:
    for cpus in (None, [1]):
        assert people.errno_of(who, op, **CLAIM, cpus=cpus) == (None if who == "root" else "EPERM")

    people.rig.rights.allowed_cpu_wide = True
    assert people.errno_of(who, op, **CLAIM) is None


@pytest.mark.parametrize("op", ["claim", "fit"])
@everybody
def test_kernel_call_chains_are_roots(people: People, who: str, op: str) -> None:
    asked = {**CLAIM, "tid": TID, "kernel_chain": True}
    assert people.errno_of(who, op, **asked) == (None if who == "root" else "EPERM")
    assert people.errno_of(who, op, **{**asked, "kernel_chain": False, "user_chain": True}) is None


@everybody
def test_kernel_instruction_pointers_are_roots(people: People, who: str) -> None:
    people.ask(who, "claim", **CLAIM, tid=TID)

    (mode,) = (record.claim.mode for record in people.rig.arbiter.books.claims.values() if record.claim.claim_id == 2)
    assert mode.hide_kernel == (who != "root")


@everybody
def test_to_go_without_a_guard_is_roots(people: People, who: str) -> None:
    usual = people.rig.settings.guard.hits_per_s
    for guard in (0, usual + 1):
        assert people.errno_of(who, "claim", **CLAIM, tid=TID, guard=guard) == (None if who == "root" else "EDQUOT")
        people.rig.ask(people.clients[who], "release", claim=2)
    for may in (None, 1, usual):
        reply = people.ask(who, "claim", **CLAIM, tid=TID + 1, guard=may)
        assert (reply["op"], reply["guard"]) == ("granted", may or usual)


@pytest.mark.parametrize("kind", ["kgdb", "kvm", "ptrace", "perf", "background"])
@everybody
def test_the_kinds_that_the_kernel_itself_uses_are_roots(people: People, who: str, kind: str) -> None:
    served = kind if who == "root" or kind not in ("kgdb", "kvm") else "perf"

    reply = people.ask(who, "claim", **CLAIM, tid=TID, kind=kind)

    assert (reply["op"], reply["kind"]) == ("granted", served)
    row = people.ask(who, "slots")["resources"][-1]
    assert row["claims"][-1]["kind"] == served


@everybody
def test_a_claim_is_released_by_its_own_session_and_by_root(people: People, who: str) -> None:
    errno_name = people.errno_of(who, "release", claim=people.claim)

    may = who in ("root", "owner")
    assert errno_name == (None if may else "EPERM")
    assert (people.claim in people.rig.arbiter.books.claims) is not may


@everybody
def test_a_silenced_claim_is_armed_again_by_its_own_session_and_by_root(people: People, who: str) -> None:
    people.flood()

    errno_name = people.errno_of(who, "rearm", claim=people.claim)

    may = who in ("root", "owner")
    assert errno_name == (None if may else "EPERM")
    assert people.rig.arbiter.books.claims[people.claim].state == ("armed" if may else "guarded")


@pytest.mark.parametrize("op", ["claim", "fit"])
@everybody
def test_to_go_before_others_of_ones_kind_is_roots_and_to_go_behind_is_everybodys(
    people: People, who: str, op: str
) -> None:
    assert people.errno_of(who, op, **CLAIM, tid=TID, priority=1) == (None if who == "root" else "EPERM")
    for priority in (0, -100):
        assert people.errno_of(who, op, **CLAIM, tid=TID, priority=priority) is None


@everybody
def test_a_claim_of_lower_rank_is_displaced_by_root_and_by_its_own_uid(people: People, who: str) -> None:
    # given every slot of a thread, held by the owner's uid as perf does
    (slots,) = people.rig.slots.values()
    for number in range(1, slots):
        assert people.errno_of("owner", "claim", **CLAIM | {"address": 0x404040 + 8 * number}, tid=TID) is None

    # when somebody claims there as a debugger, then who may not displace is refused, and the others are asked to wait
    people.clients[who].ask("claim", **CLAIM | {"address": 0x500000}, tid=TID, kind="ptrace")
    people.rig.turn()
    asked = [notice["op"] for notice in people.owner.read() if notice["op"] == "revoke"]
    assert asked == ([] if who == "other" else ["revoke"])


@everybody
def test_a_claim_gives_way_by_its_own_session_alone(people: People, who: str) -> None:
    # The owner was not asked to: that it may is what EINVAL says.
    assert people.errno_of(who, "yield", claim=people.claim) == ("EINVAL" if who == "owner" else "EPERM")


@pytest.mark.parametrize("op", ["taking", "taken", "take_failed"])
@everybody
def test_a_tracers_slot_is_taken_by_its_own_session_alone(people: People, who: str, op: str) -> None:
    claim = int(people.ask("owner", "claim", **CLAIM, tid=TID, kind="ptrace", armed_by="tracer")["claim"])
    if op != "taking":
        assert people.ask("owner", "taking", claim=claim)["op"] == "take"
    errno_field = {"errno": 28} if op == "take_failed" else {}

    assert people.errno_of(who, op, claim=claim, **errno_field) == (None if who == "owner" else "EPERM")
    if op == "taken" and who == "owner":
        people.rig.machine.exit_task(TID)  # what a tracer has taken stays until then
        people.rig.turn()


@everybody
def test_why_there_is_no_room_is_everybodys_to_ask(people: People, who: str) -> None:
    reply = people.ask(who, "why", errno="ENOSPC")
    assert (reply["op"], reply["claim"]) == ("why", 0)
    assert reply["lines"]


@pytest.mark.parametrize("op", ["counts", "why"])
@everybody
def test_a_claim_is_looked_into_by_its_uid_and_by_root(people: People, who: str, op: str) -> None:
    assert people.errno_of(who, op, claim=people.claim) == ("EPERM" if who == "other" else None)

    # and so is the story of one that is over
    people.ask("owner", "release", claim=people.claim)
    assert people.errno_of(who, "why", claim=people.claim) == ("EPERM" if who == "other" else None)


@everybody
def test_what_others_hold_outside_is_for_root_to_know(people: People, who: str) -> None:
    assert people.errno_of(who, "foreign") == (None if who == "root" else "EPERM")

    assert (people.rig.attribution.looked_at != []) == (who == "root"), "for others nobody looks"


@everybody
def test_what_the_hosts_registers_hold_is_for_root_to_know(people: People, who: str) -> None:
    assert people.errno_of(who, "host_contents", cpu=0) == (None if who == "root" else "EPERM")


@pytest.mark.parametrize("op", ["claim", "fit"])
@everybody
def test_a_vcpu_is_claimed_on_by_whom_the_kernel_would_let_watch_its_thread(
    people: People, who: str, op: str
) -> None:
    vcpu = people.vcpu()
    assert people.errno_of(who, op, **CLAIM, vcpu=vcpu) is None

    people.rig.rights.forbidden.add(people.owner.pid)
    assert people.errno_of(who, op, **CLAIM, vcpu=vcpu) == (None if who == "root" else "EPERM")


@everybody
def test_a_vcpu_is_made_for_a_thread_and_a_vm_of_ones_own_process(people: People, who: str) -> None:
    people.vcpu()
    own_tid = people.clients[who].pid
    people.rig.machine.start_task(own_tid)
    vm = people.ask(who, "vm")["vm"]

    assert people.errno_of(who, "vcpu", vm=vm, number=1, tid=TID) == "EPERM"
    assert people.errno_of(who, "vcpu", vm=vm, number=1, tid=own_tid) is None
    assert people.errno_of(who, "vcpu", vm=1, number=2, tid=own_tid) == (None if who == "owner" else "EPERM")


@everybody
def test_only_the_vmm_speaks_for_its_vcpu(people: People, who: str) -> None:
    vcpu = people.vcpu()
    people.ask("owner", "claim", **CLAIM, vcpu=vcpu)

    expected = None if who == "owner" else "EPERM"
    assert people.errno_of(who, "vcpu_loaded", vcpu=vcpu, version=1) == expected
    assert people.errno_of(who, "vcpu_hit", vcpu=vcpu, resources=[2], ip=1) == expected
    assert people.errno_of(who, "vcpu_report", vcpu=vcpu, entries=1) == expected


@everybody
def test_a_thread_is_asked_about_by_its_process_and_by_root(people: People, who: str) -> None:
    own_tid = people.clients[who].pid
    people.rig.machine.start_task(own_tid)

    assert people.errno_of(who, "enabled", tid=TID) == (None if who == "root" else "EPERM")
    assert people.errno_of(who, "enabled", tid=own_tid) is None


@everybody
def test_a_cpu_is_asked_about_by_everybody(people: People, who: str) -> None:
    assert people.errno_of(who, "enabled", cpu=0) is None


@everybody
def test_a_thread_is_registered_by_its_own_process_only(people: People, who: str) -> None:
    own_tid = people.clients[who].pid
    people.rig.machine.start_task(own_tid)

    assert people.errno_of(who, "thread", tid=TID) == "EPERM"
    assert people.errno_of(who, "thread", tid=own_tid) is None


@everybody
def test_who_follows_hears_what_concerns_its_uid_and_root_hears_all(people: People, who: str) -> None:
    assert people.errno_of(who, "follow") is None

    people.ask("owner", "release", claim=people.claim)

    heard = [notice["what"] for notice in people.clients[who].read() if notice["op"] == "decision"]
    assert heard == ([] if who == "other" else ["ended"])


def test_who_has_lost_its_privileges_since_it_said_hello_claims_without_them(people: People) -> None:
    # given root, which then is root no more
    root: FakeClient = people.clients["root"]
    people.rig.rights.privileged_uids = set()

    # when it claims what only root may, then it is refused
    assert people.errno_of("root", "claim", **CLAIM) == "EPERM"
    assert people.errno_of("root", "claim", **CLAIM, tid=TID, kernel_chain=True) == "EPERM"
    assert people.rig.ask(root, "claim", **CLAIM, tid=TID, kind="kgdb")["kind"] == "perf"
