"""
A whole daemon on fakes, and VMMs: who may have vCPUs, what they are told to load and when, whose hits are whose, what
ends with what, and what they hear of kgdb.

That worlds do not compete is ``core/test_worlds.py``'s question.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hwbpd import page_layout
from hwbpd.core import invariants
from hwbpd.core.errors import BadClaim
from hwbpd.core.events import Armed, Disarmed, NotLoaded, VcpuCame
from hwbpd.core.model import Access, Pool, Target, Task, Totals, Vcpu
from hwbpd.core.policy import Policy
from hwbpd.debug_unit import MemoryAccess
from hwbpd.hookspecs import CpuFacts
from hwbpd.journal import Begin, Journal
from hwbpd.plugins import Plugins
from hwbpd.replay import replay
from hwbpd.settings import Guard, Limits, Settings
from hwbpd.vmms import REPORT_EVERY_NS
from tests.core.steps import request
from tests.fakes import FakeClient, Rig

VMM, STUB, FUZZER = 900, 910, 920  # processes
VCPU_TID = 900
UID = 1000
SLOTS = 4
CLAIM: dict[str, Any] = {"address": 0x404040, "length": 8, "access": "w"}
ADDRESSES = itertools.count(0x500000, 0x100)
RECORD = struct.Struct("=IHHQIIQQII")

PLUGINS = Plugins()
X86 = PLUGINS.backend(CpuFacts("x86_64"))


def a_rig(settings: Settings | None = None) -> Iterator[Rig]:
    rig = Rig(settings=settings, backend=X86)
    for tid in (VCPU_TID, VCPU_TID + 1, VCPU_TID + 2, STUB, FUZZER):
        rig.machine.start_task(tid)
    yield rig
    invariants.check(rig.arbiter.books)
    invariants.nothing_is_waiting(rig.arbiter.books)
    rig.stop()


@pytest.fixture
def rig() -> Iterator[Rig]:
    yield from a_rig()


class Vmm:
    """A VMM with one vCPU: it reads what it is told, and answers when it is asked to."""

    def __init__(self, rig: Rig, tid: int = VCPU_TID, **fields: Any) -> None:
        self.rig = rig
        self.client = rig.client(pid=VMM, uid=fields.pop("uid", UID))
        self.vm = asked(rig, self.client, "vm", label="guest")["vm"]
        self.made = asked(rig, self.client, "vcpu", vm=self.vm, number=0, tid=tid, **fields)
        self.vcpu = int(self.made["vcpu"])

    def told(self) -> list[dict[str, Any]]:
        """What it was told to load since this was last asked."""
        return [message for message in self.client.read() if message["op"] == "registers"]

    def load(self, errno: int = 0) -> dict[str, Any]:
        """Load the one thing it was told, or fail to; return that."""
        (told,) = self.told()
        asked(self.rig, self.client, "vcpu_loaded", vcpu=self.vcpu, version=told["version"], errno=errno)
        return told


def asked(rig: Rig, client: FakeClient, op: str, **fields: Any) -> dict[str, Any]:
    reply = rig.ask(client, op, **fields)
    assert reply["op"] != "error", reply
    return reply


def refused(rig: Rig, client: FakeClient, op: str, **fields: Any) -> tuple[str, str]:
    reply = rig.ask(client, op, **fields)
    assert reply["op"] == "error", reply
    return str(reply["errno"]), str(reply["sentence"])


def granted(rig: Rig, client: FakeClient, **fields: Any) -> int:
    """Make a claim; each is at an address of its own, so that none shares a slot."""
    reply = asked(rig, client, "claim", **{**CLAIM, "address": next(ADDRESSES), **fields})
    assert reply["op"] == "granted", reply
    return int(reply["claim"])


def ops(client: FakeClient) -> list[str]:
    return [str(message["op"]) for message in client.read()]


# --- who has a vCPU --------------------------------------------------------------------------------------------------


def test_a_vcpu_is_listed_with_its_thread_its_slots_and_what_its_vmm_says(rig: Rig) -> None:
    # given a VMM with a vCPU of which it has told the strategy
    vmm = Vmm(rig, strategy="x86-wont-exit")
    assert vmm.made["pools"] == {"any": SLOTS}

    # when a stub has a slot there and the VMM reports what it has counted
    granted(rig, rig.client(pid=STUB, uid=UID), vcpu=vmm.vcpu)
    counted = {"entries": 10, "switches": 3, "traps": 2, "owner": "guest"}
    asked(rig, vmm.client, "vcpu_report", vcpu=vmm.vcpu, **counted)

    # then anybody sees all of it
    (vm,) = asked(rig, rig.client(pid=FUZZER, uid=2000), "vms")["vms"]
    assert (vm["label"], vm["pid"], vm["uid"]) == ("guest", VMM, UID)
    assert vm["vcpus"] == [
        {"vcpu": vmm.vcpu, "number": 0, "tid": VCPU_TID, "strategy": "x86-wont-exit"}
        | {"pools": {"any": SLOTS}, "held": {"any": 1}, "loaded": False}
        | counted
    ]


def test_a_vcpu_belongs_to_a_thread_and_a_vm_of_its_own_process(rig: Rig) -> None:
    vmm = Vmm(rig)
    other = rig.client(pid=STUB, uid=UID)

    # a thread of another process, a VM of another process, one that is not there, and a number that is taken
    of_vm = {"vm": vmm.vm, "number": 1}
    assert refused(rig, vmm.client, "vcpu", **of_vm, tid=STUB)[0] == "EPERM"
    assert refused(rig, other, "vcpu", **of_vm, tid=STUB) == (
        "EPERM", f"vm {vmm.vm} belongs to client{VMM}[{VMM}], and a vcpu to its vm's process",
    )  # fmt: skip
    assert refused(rig, vmm.client, "vcpu", vm=99, number=1, tid=VCPU_TID)[0] == "ESRCH"
    assert refused(rig, vmm.client, "vcpu", **of_vm, tid=4444)[0] == "ESRCH"
    assert "has a vcpu 0 already" in refused(rig, vmm.client, "vcpu", vm=vmm.vm, number=0, tid=VCPU_TID)[1]

    # and nothing of that is left behind
    (vm,) = asked(rig, vmm.client, "vms")["vms"]
    assert [vcpu["number"] for vcpu in vm["vcpus"]] == [0]
    assert len(rig.arbiter.books.vcpus) == 1


def test_another_session_of_the_process_may_have_vcpus_of_its_vm(rig: Rig) -> None:
    # given a VM of one session, and a vCPU of it in another of the same process
    vmm = Vmm(rig)
    thread = rig.client(pid=VMM, uid=UID)
    second = asked(rig, thread, "vcpu", vm=vmm.vm, number=1, tid=VCPU_TID)["vcpu"]

    # when somebody else answers for it, then it is refused; and when the VM's session ends, so does the vCPU
    assert refused(rig, vmm.client, "vcpu_report", vcpu=second, entries=1)[0] == "EPERM"
    vmm.client.cut()
    rig.turn()
    assert refused(rig, thread, "vcpu_report", vcpu=second, entries=1)[0] == "ESRCH"
    assert rig.arbiter.books.vcpus == {}


def test_vms_and_vcpus_are_bounded_with_their_settings() -> None:
    limits = Limits(vms_per_session=1, vcpus_per_session=2, vcpus_per_uid=3)
    for rig in a_rig(Settings(limits=limits)):
        # given a user with as many as a session may have, in one session
        vmm = Vmm(rig)
        assert "limits.vms_per_session" in refused(rig, vmm.client, "vm")[1]
        asked(rig, vmm.client, "vcpu", vm=vmm.vm, number=1, tid=VCPU_TID)
        of_vm = {"vm": vmm.vm, "tid": VCPU_TID}
        assert "limits.vcpus_per_session" in refused(rig, vmm.client, "vcpu", number=2, **of_vm)[1]

        # when it goes on in another, then the user's bound holds it
        other = rig.client(pid=VMM, uid=UID)
        asked(rig, other, "vcpu", number=2, **of_vm)
        errno, sentence = refused(rig, other, "vcpu", number=3, **of_vm)
        assert (errno, sentence) == ("EDQUOT", "uid 1000 has 3 vcpus, all it may have (limits.vcpus_per_uid)")


def test_reports_are_as_rare_as_they_may_be(rig: Rig) -> None:
    vmm = Vmm(rig)
    asked(rig, vmm.client, "vcpu_report", vcpu=vmm.vcpu, entries=1)

    assert refused(rig, vmm.client, "vcpu_report", vcpu=vmm.vcpu, entries=2)[0] == "EDQUOT"

    rig.clock.wind(REPORT_EVERY_NS / 1e9)
    asked(rig, vmm.client, "vcpu_report", vcpu=vmm.vcpu, entries=3)
    assert asked(rig, vmm.client, "vms")["vms"][0]["vcpus"][0]["entries"] == 3


def test_a_vcpu_of_a_cpu_with_a_name_has_that_ones_slots() -> None:
    def of_name(name: str) -> Any:
        if name not in PLUGINS.profiles:
            raise BadClaim(f"there is no cpu {name!r}")
        return PLUGINS.backend(PLUGINS.profiles[name])

    for rig in a_rig():
        rig.server._vmms._backends = lambda name: of_name(name) if name else X86  # as the daemon makes it
        vmm = Vmm(rig, profile="cortex-a57")
        assert vmm.made["pools"] == {"inst": 6, "data": 4}

        # a breakpoint there takes one of six, as that CPU has them
        granted(rig, vmm.client, vcpu=vmm.vcpu, length=4, access="x")
        (slot,) = vmm.load()["slots"]
        assert (slot["pool"], slot["number"]) == ("inst", 0)
        assert refused(rig, vmm.client, "vcpu", vm=vmm.vm, number=1, tid=VCPU_TID, profile="z80")[0] == "EINVAL"


# --- what is loaded --------------------------------------------------------------------------------------------------


def test_the_vmm_is_told_registers_that_trap_exactly_there(rig: Rig) -> None:
    # given a claim of a stub's on a vCPU
    vmm, stub = Vmm(rig), rig.client(pid=STUB, uid=UID)
    claim = granted(rig, stub, vcpu=vmm.vcpu, address=0x404040, length=4, kind="ptrace")

    # when the VMM is told of it
    (told,) = vmm.told()

    # then the registers, written into a CPU that was reset, trap on these bytes and on no others
    unit = X86.debug_unit()
    assert unit is not None
    file = {**unit.reset(), **told["registers"]}
    for address, traps in ((0x40403F, False), (0x404040, True), (0x404043, True), (0x404044, False)):
        trap = unit.check(file, [MemoryAccess(Access.WRITE, address, 1)])
        assert (trap is not None) is traps, hex(address)
    assert [(slot["number"], slot["address"], slot["length"]) for slot in told["slots"]] == [(0, 0x404040, 4)]

    # and the owner hears that it is in force once the VMM has said so, and not before
    assert ops(stub) == []
    asked(rig, vmm.client, "vcpu_loaded", vcpu=vmm.vcpu, version=told["version"])
    (loaded,) = stub.read()
    assert (loaded["op"], loaded["claim"]) == ("loaded", claim)
    assert asked(rig, stub, "vms")["vms"][0]["vcpus"][0]["loaded"]


def test_no_register_of_the_host_has_to_do_with_it(rig: Rig) -> None:
    # given a host that is full, and a vCPU that is full
    vmm = Vmm(rig, uid=0)
    root = rig.client(uid=0)
    for _ in range(SLOTS):
        granted(rig, root)
        granted(rig, root, vcpu=vmm.vcpu)

    # then neither has taken anything of the other, and the status page knows of the host's only
    assert sum(event.task is None and event.cpu == 0 for event in rig.machine.kernel.events()) == SLOTS
    assert rig.page_words[page_layout.EVERYWHERE_AT] & page_layout.ARMED_MASK == SLOTS
    for target, where in (({}, "cpu 0"), ({"vcpu": vmm.vcpu}, f"vcpu {vmm.vcpu}")):
        errno, sentence = refused(rig, root, "claim", **CLAIM, **target)
        assert errno == "ENOSPC"
        assert sentence.startswith(f"no slot on {where}: 4 of 4 held")


def test_the_vmm_is_told_once_until_it_answers_and_then_of_all_there_is(rig: Rig) -> None:
    # given a VMM that owes an answer
    vmm, stub = Vmm(rig), rig.client(pid=STUB, uid=UID)
    first = granted(rig, stub, vcpu=vmm.vcpu)
    assert [told["version"] for told in vmm.told()] == [1]

    # when claims come and go meanwhile, then it hears nothing
    second = granted(rig, stub, vcpu=vmm.vcpu)
    asked(rig, stub, "release", claim=first)
    assert vmm.told() == []

    # and once it has answered, of what is left; of what was gone before it was loaded nobody hears
    asked(rig, vmm.client, "vcpu_loaded", vcpu=vmm.vcpu, version=1)
    assert ops(stub) == []
    told = vmm.load()
    assert (told["version"], len(told["slots"])) == (2, 1)
    assert [message["claim"] for message in stub.read()] == [second]

    # and an answer to nothing is refused
    errno, sentence = refused(rig, vmm.client, "vcpu_loaded", vcpu=vmm.vcpu, version=2)
    assert (errno, sentence) == ("EINVAL", "version 2 waits for no answer; the last one told is 2")


def test_what_the_vmm_cannot_load_is_over_and_what_it_had_stays(rig: Rig) -> None:
    # given a claim that is in force, and another's that the VMM is told of
    vmm, stub, fuzzer = Vmm(rig), rig.client(pid=STUB, uid=UID), rig.client(pid=FUZZER, uid=UID)
    kept = granted(rig, stub, vcpu=vmm.vcpu)
    vmm.load()
    lost = granted(rig, fuzzer, vcpu=vmm.vcpu)
    stub.read()

    # when KVM refuses it
    vmm.load(errno=22)

    # then that one is over, with the reason, and the first goes on
    (notice,) = fuzzer.read()
    assert (notice["op"], notice["claim"], notice["reason"]) == ("lost", lost, "refused")
    assert "could not load it: EINVAL" in notice["sentence"]
    assert stub.read() == []
    assert list(rig.arbiter.books.claims) == [kept]
    assert [slot["number"] for slot in vmm.load()["slots"]] == [0]


def test_three_owners_share_four_slots_by_rank(rig: Rig) -> None:
    # given a guest that uses two slots of its own, by its VMM, and a fuzzer that has the others
    vmm, stub, fuzzer = Vmm(rig), rig.client(pid=STUB, uid=UID), rig.client(pid=FUZZER, uid=UID)
    for _ in range(2):
        granted(rig, vmm.client, vcpu=vmm.vcpu, kind="perf", label="guest")
    coverage = [granted(rig, fuzzer, vcpu=vmm.vcpu, kind="background") for _ in range(2)]
    vmm.load()

    # when a stub wants one
    stub.ask("claim", **CLAIM, vcpu=vmm.vcpu, kind="ptrace")
    rig.turn()

    # then the fuzzer's younger claim is asked to give way, and once it has, the stub's is in its place
    assert [(message["op"], message["claim"]) for message in fuzzer.read() if message["op"] == "revoke"] == [
        ("revoke", coverage[1])
    ]
    asked(rig, fuzzer, "yield", claim=coverage[1])
    assert [message["op"] for message in stub.read()] == ["granted"]
    while vmm_told := vmm.told():
        asked(rig, vmm.client, "vcpu_loaded", vcpu=vmm.vcpu, version=vmm_told[-1]["version"])
    entries = rig.server._vmms.files[next(iter(rig.arbiter.books.vcpus))].entries
    assert len(entries) == SLOTS
    assert CLAIM["address"] in {entry.piece.span.address for entry in entries.values()}

    # and when the stub is gone, the fuzzer's is back
    stub.cut()
    rig.turn()
    assert "resumed" in ops(fuzzer)


@pytest.mark.parametrize(
    "fields",
    [
        {"tid": STUB}, {"pid": STUB}, {"cpus": [0]}, {"only_pid": 3}, {"user": False}, {"user_chain": True},
        {"ring_bytes": 4096}, {"armed_by": "tracer", "tid": STUB}, {"across_exec": True},
    ],
)  # fmt: skip
def test_what_a_vcpu_cannot_do_is_refused(rig: Rig, fields: dict[str, Any]) -> None:
    vmm = Vmm(rig, uid=0)
    assert refused(rig, vmm.client, "claim", **CLAIM, vcpu=vmm.vcpu, **fields)[0] == "EINVAL"


def test_only_who_may_watch_the_thread_may_claim_in_its_guest(rig: Rig) -> None:
    vmm = Vmm(rig)
    rig.rights.forbidden.add(VCPU_TID)
    assert refused(rig, rig.client(pid=FUZZER, uid=2000), "claim", **CLAIM, vcpu=vmm.vcpu)[0] == "EPERM"
    assert refused(rig, rig.client(pid=FUZZER, uid=0), "claim", **CLAIM, vcpu=77)[0] == "ESRCH"


# --- hits ------------------------------------------------------------------------------------------------------------


def test_hits_that_the_vmm_tells_go_to_everybody_on_that_slot(rig: Rig) -> None:
    # given two owners who share a slot, one who has another, and one who only counts on a third
    vmm, stub, fuzzer = Vmm(rig), rig.client(pid=STUB, uid=UID), rig.client(pid=FUZZER, uid=UID)
    for client in (stub, fuzzer):
        granted(rig, client, vcpu=vmm.vcpu, address=0x404040)
    granted(rig, fuzzer, vcpu=vmm.vcpu)
    counting = granted(rig, fuzzer, vcpu=vmm.vcpu, delivery="count")
    vmm.load()
    while told := vmm.told():
        slots = told[-1]["slots"]
        asked(rig, vmm.client, "vcpu_loaded", vcpu=vmm.vcpu, version=told[-1]["version"])
    shared, _, counted = (slot["resource"] for slot in slots)
    for client in (stub, fuzzer):
        client.read()

    # when the VMM tells of hits
    told_of = asked(rig, vmm.client, "vcpu_hit", vcpu=vmm.vcpu, resources=[shared, counted], ip=0x401000)

    # then both who share it get the record: the guest's pointer, the VMM's thread, the vCPU's number
    assert told_of["counted"] == 2
    for client in (stub, fuzzer):
        (hits,) = [message for message in client.read() if message["op"] == "hits"]
        kind, misc, size, ip, pid, tid, _, address, cpu, _ = RECORD.unpack(hits["records"])
        assert (kind, misc, size) == (9, 4, 48)
        assert (ip, pid, tid, address, cpu) == (0x401000, VMM, VCPU_TID, 0x404040, 0)
    assert asked(rig, fuzzer, "counts", claim=counting)["hits"] == 1

    # and a hit of what nobody has any more is nobody's
    assert asked(rig, vmm.client, "vcpu_hit", vcpu=vmm.vcpu, resources=[12345], ip=1)["counted"] == 0


def test_a_flood_in_a_guest_is_silenced_in_its_registers(rig: Rig) -> None:
    for busy in a_rig(Settings(guard=Guard(hits_per_s=20))):
        # given a guest that hits a claim without end
        vmm, stub = Vmm(busy), busy.client(pid=STUB, uid=UID)
        claim = granted(busy, stub, vcpu=vmm.vcpu)
        resource = vmm.load()["slots"][0]["resource"]

        # when the VMM tells of more hits than the guard allows
        for _ in range(40):
            busy.ask(vmm.client, "vcpu_hit", vcpu=vmm.vcpu, resources=[resource], ip=1)

        # then the claim is guarded, the VMM is told to load nothing, and its owner may have it armed again
        assert "guarded" in ops(stub)
        assert vmm.load()["slots"] == []
        asked(busy, stub, "rearm", claim=claim)
        assert [slot["resource"] for slot in vmm.load()["slots"]] == [resource]


# --- ends ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["session", "thread", "goodbye"])
def test_with_a_vcpu_every_claim_on_it_ends(rig: Rig, how: str) -> None:
    # given a full vCPU, somebody who waits for it, and one who has a slot of the host
    vmm, stub, fuzzer = Vmm(rig), rig.client(pid=STUB, uid=UID), rig.client(pid=FUZZER, uid=UID)
    held = [granted(rig, stub, vcpu=vmm.vcpu) for _ in range(SLOTS)]
    until = rig.clock.now_ns() + 10**9
    waiting = rig.ask(fuzzer, "claim", **CLAIM, vcpu=vmm.vcpu, wait_until_ns=until)
    assert waiting["op"] == "queued"
    elsewhere = granted(rig, fuzzer, tid=FUZZER)

    # when the vCPU ends
    match how:
        case "session":
            vmm.client.cut()
        case "thread":
            rig.machine.exit_task(VCPU_TID)
        case "goodbye":
            vmm.client.ask("goodbye")
    rig.turn()

    # then all of them are told, nobody was granted anything meanwhile, and the host's is left alone
    lost = {message["claim"]: message["reason"] for message in stub.read() if message["op"] == "lost"}
    assert lost == dict.fromkeys(held, "exit")
    told = [(message["op"], message["claim"]) for message in fuzzer.read()]
    assert told == [("lost", waiting["claim"])]
    assert list(rig.arbiter.books.claims) == [elsewhere]
    assert rig.arbiter.books.vcpus == {}
    assert refused(rig, stub, "claim", **CLAIM, vcpu=vmm.vcpu)[0] == "ESRCH"


# --- kgdb, and the host's contents -----------------------------------------------------------------------------------


def test_vmms_hear_of_kgdb_and_the_page_says_it(rig: Rig) -> None:
    # given a VMM, and somebody without a VM
    vmm, root = Vmm(rig), rig.client(uid=0)
    word = page_layout.KGDB_AT

    # when kgdb takes a slot on every CPU, and later lets go
    claim = granted(rig, root, kind="kgdb")
    assert rig.page_words[word] == 1
    (taken,) = [message for message in vmm.client.read() if message["op"] == "kgdb"]
    assert (taken["claims"], "as kgdb" in taken["sentence"]) == (1, True)
    assert asked(rig, vmm.client, "vm")["kgdb"] == 1
    asked(rig, root, "release", claim=claim)

    # then the VMM has heard of both, and nobody else
    assert [message["claims"] for message in vmm.client.read() if message["op"] == "kgdb"] == [0]
    assert rig.page_words[word] == 0
    assert "kgdb" not in ops(root)

    # and of other kinds, or of kgdb in a guest, it hears nothing
    granted(rig, root)
    granted(rig, root, kind="kgdb", vcpu=vmm.vcpu)
    assert "kgdb" not in ops(vmm.client)


def test_the_hosts_contents_are_those_of_the_cpu_and_the_thread(rig: Rig) -> None:
    # given claims on a CPU, on another, on a thread, on its process, and one that is only held
    root = rig.client(uid=0)
    granted(rig, root, cpus=[0], address=0x1000)
    granted(rig, root, cpus=[1], address=0x2000)
    granted(rig, root, tid=STUB, address=0x3000, length=1)
    granted(rig, root, tid=STUB, address=0x5000, delivery="hold")
    granted(rig, root, tid=FUZZER, address=0x6000)

    # when the contents of CPU 0 are asked for, without and with the thread
    bare = asked(rig, root, "host_contents", cpu=0)
    with_thread = asked(rig, root, "host_contents", cpu=0, tid=STUB)

    # then they are what is in force there, as values that trap as claimed
    assert [slot["address"] for slot in bare["slots"]] == [0x1000]
    assert [(slot["number"], slot["address"]) for slot in with_thread["slots"]] == [(0, 0x1000), (1, 0x3000)]
    unit = X86.debug_unit()
    assert unit is not None
    file = {**unit.reset(), **with_thread["registers"]}
    met = [address for address in (0x1007, 0x2000, 0x3000, 0x3001, 0x5000) if _traps(unit, file, address)]
    assert met == [0x1007, 0x3000]

    # and they are for root, and for CPUs that are there
    assert refused(rig, rig.client(uid=UID), "host_contents", cpu=0)[0] == "EPERM"
    assert refused(rig, root, "host_contents", cpu=17)[0] == "ENODEV"


def _traps(unit: Any, file: dict[str, int], address: int) -> bool:
    return unit.check(file, [MemoryAccess(Access.WRITE, address, 1)]) is not None


def test_a_journal_of_vcpus_comes_to_the_same_state_again(tmp_path: Path) -> None:
    # given a journal in which a vCPU comes, is claimed on, loses a claim that could not be loaded, and goes
    vcpu = Vcpu(1, Task(VCPU_TID, 5))
    begin = Begin({Pool.ANY: SLOTS}, (0, 1), (0, 1), Policy(), 0)
    arbiter = begin.arbiter()
    with Journal(tmp_path / "journal", begin, arbiter, bytes_max=10**6) as journal:
        step = journal.recorded(arbiter.step)
        step(VcpuCame(1, vcpu, {Pool.ANY: 2}))
        for claim_id in (1, 2):
            step(request(target=Target(vcpu=vcpu)))
            step(Armed(2, claim_id))
        step(NotLoaded(3, 1, 22))
        step(Disarmed(4, 1, Totals()))

    # when it is replayed, then with every invariant, and to the same digest
    with (tmp_path / "journal").open("rb") as file:
        replayed = replay(file, checks=True)
    assert (replayed.events, replayed.digests, replayed.differences) == (7, 1, [])
    assert replayed.arbiter.books.dump() == arbiter.books.dump()
    assert list(arbiter.books.claims) == [2]


def test_slots_and_the_story_name_the_vcpu(rig: Rig) -> None:
    vmm, stub = Vmm(rig), rig.client(pid=STUB, uid=UID)
    claim = granted(rig, stub, vcpu=vmm.vcpu)

    (row,) = asked(rig, stub, "slots")["resources"]
    assert (row["vcpu"], row["tid"], row["cpus"], row["pool"]) == (vmm.vcpu, 0, None, str(Pool.ANY))
    assert f"for vcpu {vmm.vcpu} as perf" in asked(rig, stub, "why", claim=claim)["lines"][0]
