"""
What docs/protocol.md promises, told by clients of several kinds to whole daemons: on real registers, and simulated.

The first part goes through every client, our library too. The second needs one that can break the rules, or have
several requests under way, which the library does not let its users do.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest

from tests.conformance import document
from tests.conformance.conftest import SIMULATED, Client, World, await_empty_books
from tests.conformance.in_c import InC
from tests.conformance.newcomer import WAIT_S, Lost, Map, Newcomer, ZeroMQ
from tests.conformance.vectors import refused, vectors
from tests.hardware.daemon import Daemon

RAW = ["newcomer", "c"]
EVERY_CLIENT = pytest.mark.parametrize("kind", [*RAW, "library zmq", "library seqpacket"])
RAW_CLIENT = pytest.mark.parametrize("kind", RAW)

Connect = Callable[[str], Client]

RECORD = struct.Struct("=IHHQIIQQII")  # "Hit records", without a call chain


def watchpoint(world: World, **more: Any) -> dict[str, Any]:
    """The fields of a claim on the thread that writes."""
    return {"address": world.variable, "length": 8, "access": "w", "tid": world.tid, **more}


def opened(client: Client) -> Client:
    assert client.hello()["op"] == "welcome"
    return client


def raw(client: Client) -> Newcomer:
    assert isinstance(client, Newcomer)
    return client


def slots_held(client: Client) -> list[int]:
    """The claims that hold slots, by the daemon's books."""
    return [claim["claim"] for row in client.request("slots")["resources"] for claim in row["claims"]]


def errno_of(reply: Map) -> Any:
    assert reply["op"] == "error", reply
    assert reply["sentence"]
    return reply["errno"]


# --- every client ----------------------------------------------------------------------------------------------------


@EVERY_CLIENT
def test_hello_is_answered_with_a_welcome(connect: Connect, world: World, kind: str) -> None:
    welcome = connect(kind).hello()

    assert (welcome["op"], welcome["version"]) == ("welcome", 1)
    assert (welcome["machine"], welcome["backend"]) == ("sim" if world.writes_by_itself else "linux", "x86")
    assert welcome["session"] >= 1


@EVERY_CLIENT
def test_each_session_has_a_number_of_its_own_and_all_have_one_epoch(connect: Connect, kind: str) -> None:
    welcomes = [connect(kind).hello() for _ in range(3)]

    assert len({welcome["session"] for welcome in welcomes}) == 3
    assert len({welcome["epoch"] for welcome in welcomes}) == 1


@EVERY_CLIENT
def test_another_version_is_refused_and_the_client_may_come_back_with_the_right_one(
    connect: Connect, kind: str
) -> None:
    client = connect(kind)

    assert errno_of(client.hello(version=2)) == "EPROTO"
    assert errno_of(client.request("slots")) == "ESTALE"  # it is no session
    assert client.hello()["op"] == "welcome"
    assert client.request("slots")["op"] == "slots"


@EVERY_CLIENT
def test_a_request_for_another_run_of_the_daemon_is_stale(connect: Connect, world: World, kind: str) -> None:
    client = opened(connect(kind))

    assert errno_of(client.request("claim", **watchpoint(world, epoch=client.epoch + 1))) == "ESTALE"

    assert slots_held(opened(connect("newcomer"))) == []


@EVERY_CLIENT
def test_a_request_whose_deadline_has_passed_does_nothing(connect: Connect, world: World, kind: str) -> None:
    client = opened(connect(kind))

    assert errno_of(client.request("claim", **watchpoint(world, deadline_ns=1))) == "ETIMEDOUT"

    assert slots_held(client) == []


@EVERY_CLIENT
@pytest.mark.parametrize(
    "wrong", [{"surprise": 1}, {"length": 0}, {"access": "wr"}, {"tid": None}, {"user": 1}, {"address": 1.0}]
)
def test_what_is_no_request_is_refused_and_the_session_goes_on(
    connect: Connect, world: World, kind: str, wrong: dict[str, Any]
) -> None:
    client = opened(connect(kind))

    assert errno_of(client.request("claim", **watchpoint(world) | wrong)) == "EBADMSG"

    assert slots_held(client) == []


@EVERY_CLIENT
@pytest.mark.parametrize(
    ("wish", "errno"),
    [
        ({"length": 3000}, "EINVAL"),
        ({"cpus": []}, "EINVAL"),
        ({"user": False, "kernel": False}, "EINVAL"),
        ({"ring_bytes": 5000}, "EINVAL"),
        ({"delivery": "count", "ring_bytes": 4096}, "EINVAL"),
        ({"delivery": "hold", "user_chain": True}, "EINVAL"),
        ({"only_pid": 1}, "EINVAL"),
        ({"ring_bytes": 2**30}, "EDQUOT"),
        ({"cpus": [8191]}, "ENODEV"),
        ({"tid": 2**22}, "ESRCH"),
    ],
)
def test_what_cannot_be_is_refused_by_claim_and_fit_alike(
    connect: Connect, world: World, kind: str, wish: dict[str, Any], errno: str
) -> None:
    client = opened(connect(kind))

    assert errno_of(client.request("claim", **watchpoint(world) | wish)) == errno
    fit = client.request("fit", **watchpoint(world) | wish)

    assert fit["errno"] == errno
    assert slots_held(client) == []


@EVERY_CLIENT
def test_whoever_finds_no_room_is_told_who_has_it(connect: Connect, world: World, kind: str) -> None:
    client = opened(connect(kind))
    (slots,) = client.request("capabilities")["pools"].values()
    held = [client.request("claim", **watchpoint(world, delivery="hold"))["claim"] for _ in range(slots)]

    refusal = client.request("claim", **watchpoint(world, delivery="hold", label="one too many"))
    fit = client.request("fit", **watchpoint(world))

    assert errno_of(refusal) == "ENOSPC"
    (holder,) = refusal["holders"]
    assert {name: holder[name] for name in ("pid", "kind", "slots", "place", "evidence")} == {
        "pid": client.pid,
        "kind": "perf",
        "slots": slots,
        "place": f"on tid {world.tid}",
        "evidence": "books",
    }
    assert sorted(holder["claim_ids"]) == held == slots_held(client)
    assert (fit["fits"], fit["errno"]) == (False, "ENOSPC")
    assert client.request("why", claim=refusal["claim"])["state"] == "refused"


def fill(client: Client, world: World, **more: Any) -> list[int]:
    """Take every slot of the thread; return the claims."""
    (slots,) = client.request("capabilities")["pools"].values()
    return [client.request("claim", **watchpoint(world, delivery="hold"), **more)["claim"] for _ in range(slots)]


def until(client: Client, op: str) -> Map:
    """The next notice of that name."""
    while (notice := client.notice())["op"] != op:
        pass
    return notice


@EVERY_CLIENT
def test_whoever_waits_has_a_place_and_gets_what_another_gives_back(connect: Connect, world: World, kind: str) -> None:
    # given a full thread, and two who wait for it
    client, holder = opened(connect(kind)), opened(connect("newcomer"))
    held = fill(holder, world)
    for_long = time.monotonic_ns() + int(WAIT_S * 1e9)
    first, second = (client.request("claim", **watchpoint(world), wait_until_ns=for_long) for _ in range(2))
    assert [(reply["op"], reply["errno"], reply["position"]) for reply in (first, second)] == [
        ("queued", "ENOSPC", 1),
        ("queued", "ENOSPC", 2),
    ]
    assert sorted(first["holders"][0]["claim_ids"]) == held
    waiting = client.request("slots")["waiting"]
    assert [(row["claim"], row["state"], row["position"]) for row in waiting] == [
        (first["claim"], "waiting", 1),
        (second["claim"], "waiting", 2),
    ]
    assert set(waiting[0]["blockers"]) <= set(held)
    assert until(holder, "contended")["by"]["claim_ids"] == [first["claim"]]

    # when a slot comes back, then the first has it, and the second, which wants the same, shares it
    holder.request("release", claim=held[0])
    granted = until(client, "granted")
    assert (granted["claim"], granted["pieces"][0]["address"]) == (first["claim"], world.variable)
    assert until(client, "granted")["claim"] == second["claim"]
    assert set(slots_held(client)) == {*held[1:], first["claim"], second["claim"]}


@EVERY_CLIENT
def test_a_wait_ends_at_its_time_or_when_it_is_cancelled(connect: Connect, world: World, kind: str) -> None:
    client = opened(connect(kind))
    fill(client, world)
    soon, late = (time.monotonic_ns() + int(seconds * 1e9) for seconds in (0.02, WAIT_S))

    in_vain = client.request("claim", **watchpoint(world), wait_until_ns=soon)["claim"]
    lost = until(client, "lost")
    assert (lost["claim"], lost["reason"]) == (in_vain, "timeout")
    cancelled = client.request("claim", **watchpoint(world), wait_until_ns=late)["claim"]
    assert client.request("release", claim=cancelled)["op"] == "released"
    assert client.request("slots").get("waiting", []) == []
    for_ever = client.request("claim", **watchpoint(world), wait_until_ns=2**63)
    assert errno_of(for_ever) == "EINVAL"


@EVERY_CLIENT
def test_a_claim_of_higher_rank_displaces_and_what_gave_way_comes_back(
    connect: Connect, world: World, kind: str
) -> None:
    # given a thread full of claims as perf makes them, the last of which gives way when it is asked
    client, debugger = opened(connect(kind)), opened(connect("newcomer"))
    held = fill(client, world)
    asking = raw(debugger).send("claim", **watchpoint(world, kind="ptrace", delivery="count"))
    revoke = until(client, "revoke")
    assert (revoke["claim"], revoke["by"]["pid"], revoke["by"]["kind"]) == (held[-1], debugger.pid, "ptrace")
    assert client.request("yield", claim=held[-1])["op"] in ("yielded", "error")  # its deadline is soon

    # then the debugger has its slot, and the other keeps its place until there is room
    assert until(client, "suspended")["claim"] == held[-1]
    granted = raw(debugger).reply()
    assert (granted["op"], granted["id"]) == ("granted", asking)
    (row,) = client.request("slots")["waiting"]
    assert (row["claim"], row["state"], row["blockers"][:1] != []) == (held[-1], "suspended", True)
    debugger.request("release", claim=granted["claim"])
    assert until(client, "resumed")["claim"] == held[-1]
    assert sorted(slots_held(client)) == held
    assert errno_of(client.request("yield", claim=held[-1])) == "EINVAL"


@EVERY_CLIENT
def test_a_tracer_is_let_in_and_what_it_could_not_take_is_over(connect: Connect, world: World, kind: str) -> None:
    client = opened(connect(kind))
    by_tracer = watchpoint(world, kind="ptrace", armed_by="tracer")
    claim = client.request("claim", **by_tracer)["claim"]

    assert errno_of(client.request("taken", claim=claim)) == "EINVAL", "first it has to say that it takes it"
    assert client.request("taking", claim=claim) | {"id": 0} == {"op": "take", "id": 0, "claim": claim}
    assert errno_of(client.request("release", claim=claim)) == "EINVAL"
    assert client.request("take_failed", claim=claim, errno=3)["op"] == "take_failed"
    assert slots_held(client) == []
    assert errno_of(client.request("taking", claim=claim)) == "ENOENT"


@EVERY_CLIENT
def test_why_there_is_no_room_can_be_asked(connect: Connect, world: World, kind: str) -> None:
    client = opened(connect(kind))
    fill(client, world)
    story = client.request("why", errno="ENOSPC")
    assert story["claim"] == 0
    assert any(f"tid {world.tid}" in line for line in story["lines"])


@EVERY_CLIENT
def test_all_hits_come_before_the_end_of_their_claim_and_the_counts_are_exact(
    connect: Connect, world: World, kind: str
) -> None:
    client = opened(connect(kind))
    granted = client.request("claim", **watchpoint(world, kernel=False, label="exactly"))
    assert granted["op"] == "granted"
    world.write(500)

    first = client.notice()
    counts = client.request("counts", claim=granted["claim"])
    released = client.request("release", claim=granted["claim"])
    hits = [first, *client.notices()]

    assert {(notice["op"], notice["claim"]) for notice in hits} == {("hits", granted["claim"])}
    assert sum(notice["count"] for notice in hits) == released["delivered"] >= counts["delivered"] >= 0
    assert released["hits"] == released["delivered"] + released["lost"] + released["dropped"]
    assert world.writes_by_itself or released["delivered"] == 500
    for notice in hits:
        assert len(notice["records"]) == notice["count"] * RECORD.size
        for kind_of, where, size, _, _, tid, _, address, _, zero in RECORD.iter_unpack(notice["records"]):
            assert (kind_of, where & 7, size, tid, address, zero) == (9, 2, 48, world.tid, world.variable, 0)
    assert errno_of(client.request("release", claim=granted["claim"])) == "ENOENT"


@EVERY_CLIENT
def test_notices_are_numbered_from_one_without_a_gap(connect: Connect, world: World, kind: str) -> None:
    client = opened(connect(kind))
    claims = [client.request("claim", **watchpoint(world))["claim"] for _ in range(3)]

    numbers: list[int] = []
    for claim in claims:
        world.write(3)
        numbers.append(client.notice()["n"])
        client.request("release", claim=claim)
        numbers += [notice["n"] for notice in client.notices()]

    assert len(numbers) >= 3
    assert numbers == list(range(1, len(numbers) + 1))


@EVERY_CLIENT
def test_a_released_slot_is_free_at_the_reply_and_a_stranger_may_not_release_it(
    connect: Connect, world: World, kind: str
) -> None:
    client, other = opened(connect(kind)), opened(connect("newcomer"))
    claim = client.request("claim", **watchpoint(world, delivery="hold", label="mine"))["claim"]
    assert slots_held(other) == [claim]
    assert errno_of(other.request("release", claim=claim + 1000)) == "ENOENT"

    released = client.request("release", claim=claim)

    assert (released["op"], released["claim"], released["hits"]) == ("released", claim, 0)
    assert slots_held(other) == []


@EVERY_CLIENT
def test_an_operator_who_releases_a_claim_is_answered_and_its_owner_told(
    connect: Connect, world: World, kind: str
) -> None:
    owner, operator = opened(connect(kind)), opened(connect("newcomer"))
    claim = owner.request("claim", **watchpoint(world, delivery="hold"))["claim"]

    assert operator.request("release", claim=claim)["op"] == "released"

    lost = owner.notice()
    assert (lost["op"], lost["claim"], lost["reason"]) == ("lost", claim, "forced")
    assert errno_of(owner.request("release", claim=claim)) == "ENOENT"


@EVERY_CLIENT
def test_a_closed_client_holds_nothing(connect: Connect, world: World, kind: str) -> None:
    client, other = opened(connect(kind)), opened(connect("newcomer"))
    client.request("claim", **watchpoint(world, delivery="hold"))

    assert client.request("goodbye")["op"] == "bye"

    assert slots_held(other) == []
    assert errno_of(client.request("slots")) == "ESTALE"


@EVERY_CLIENT
def test_a_slot_on_a_cpu_is_enabled_while_it_is_armed(connect: Connect, world: World, kind: str) -> None:
    client = opened(connect(kind))
    on_cpu_0 = watchpoint(world, tid=0, cpus=[0])

    def counts() -> tuple[bool, int, int]:
        reply = client.request("enabled", cpu=0)
        return reply["enabled"], reply["armed"], reply["held"]

    assert counts() == (False, 0, 0)
    client.request("claim", **on_cpu_0, delivery="hold")
    assert counts() == (False, 0, 1)
    armed = client.request("claim", **on_cpu_0, delivery="count")["claim"]
    assert counts() == (True, 1, 2)
    client.request("release", claim=armed)
    assert counts() == (False, 0, 1)
    assert errno_of(client.request("enabled")) == "EINVAL"


@RAW_CLIENT
def test_a_follower_hears_what_is_decided_for_others(connect: Connect, world: World, kind: str) -> None:
    follower, other = opened(connect(kind)), opened(connect("newcomer"))
    assert follower.request("follow")["op"] == "following"

    claim = other.request("claim", **watchpoint(world, delivery="hold", label="seen"))["claim"]

    while (decision := follower.notice())["what"] != "granted":
        assert decision["op"] == "decision"
    assert (decision["claim"], decision["pid"], decision["label"]) == (claim, other.pid, "seen")


@EVERY_CLIENT
def test_the_bounds_in_force_can_be_asked_for(connect: Connect, kind: str) -> None:
    limits = opened(connect(kind)).request("capabilities")["limits"]

    bounds = document.columns("what", "at most", "setting", "beyond it")
    told = {setting.strip("`"): int(bound) for _, bound, setting, _ in bounds if setting}
    in_force = {name.removeprefix("limits."): bound for name, bound in told.items() if name.startswith("limits.")}
    assert limits.items() >= in_force.items()
    assert limits["ring_bytes_max"] == told["rings.bytes_max"]
    assert limits["guard_hits_per_s"] == told["guard.hits_per_s"]


@EVERY_CLIENT
def test_a_long_list_comes_in_pages(connect: Connect, world: World, kind: str) -> None:
    client = opened(connect(kind))
    claims = [client.request("claim", **watchpoint(world, delivery="hold"))["claim"] for _ in range(3)]

    pages: list[Map] = []
    while not pages or pages[-1]["more"]:
        after = pages[-1]["resources"][-1]["resource"] if pages else 0
        pages.append(client.request("slots", after=after, most=1))

    assert [row["claims"][0]["claim"] for page in pages for row in page["resources"]] == claims
    assert [bool(page["cpus"]) for page in pages] == [True, False, False]


# --- clients that can break the rules --------------------------------------------------------------------------------


@RAW_CLIENT
def test_every_vector_that_is_refused_is_refused_under_its_id(connect: Connect, kind: str) -> None:
    """And the session goes on. Those about hello come last, as they end it."""
    client = raw(opened(connect(kind)))
    last = [bad for bad in refused() if bad.errno == "EPROTO"]

    for bad in [*(bad for bad in refused() if bad not in last), *last]:
        if bad.data or kind != "c":  # no frame at all can be asked for by a line without digits
            client.way.send(bad.data)
            error = client.reply()
            assert (error["op"], error["id"], error["errno"]) == ("error", bad.id, bad.errno), bad.name
            assert error["sentence"], bad.name


@RAW_CLIENT
def test_every_vector_of_a_request_is_understood(connect: Connect, kind: str) -> None:
    """They are for another epoch, so all that is said of them is that; a hello opens a session."""
    client = raw(connect(kind))

    for vector in vectors():
        if vector.kind == "requests":
            client.way.send(vector.data)
            reply = client.reply()
            assert reply["id"] == vector.map["id"], vector.name
            assert reply["op"] == "welcome" if vector.op == "hello" else errno_of(reply) == "ESTALE", vector.name


@RAW_CLIENT
def test_a_stranger_is_told_to_say_hello(connect: Connect, kind: str) -> None:
    client = raw(connect(kind))

    request = client.send("slots")

    reply = client.reply()
    assert (reply["id"], errno_of(reply)) == (request, "ESTALE")
    assert "say hello" in reply["sentence"]


@RAW_CLIENT
def test_hello_in_an_open_session_ends_it_and_begins_another(connect: Connect, world: World, kind: str) -> None:
    client = raw(connect(kind))
    first = client.hello()
    claim = client.request("claim", **watchpoint(world))["claim"]
    world.write(3)
    assert client.notice()["claim"] == claim

    second = client.hello()

    assert second["session"] > first["session"]
    assert slots_held(client) == []
    again = client.request("claim", **watchpoint(world))["claim"]
    world.write(1)
    client.notices()
    assert again > claim
    assert errno_of(client.request("release", claim=claim)) == "ENOENT"


@RAW_CLIENT
def test_replies_come_in_the_order_of_the_requests(connect: Connect, world: World, kind: str) -> None:
    client = raw(opened(connect(kind)))

    ids = []
    for number in range(100):
        match number % 4:
            case 0:
                ids.append(client.send("slots"))
            case 1:
                ids.append(client.send("claim", **watchpoint(world, length=3000)))
            case 2:
                ids.append(client.send("fit", **watchpoint(world)))
            case _:
                ids.append(client.send("no such thing"))

    assert [client.reply()["id"] for _ in ids] == ids


@RAW_CLIENT
def test_goodbye_brings_what_is_left_of_the_hits_and_then_bye(connect: Connect, world: World, kind: str) -> None:
    client = raw(opened(connect(kind)))
    assert client.request("claim", **watchpoint(world))["op"] == "granted"
    world.write(200)

    bye = client.request("goodbye")

    assert bye["op"] == "bye"
    assert world.writes_by_itself or sum(notice["count"] for notice in client.notices()) == 200
    assert client.hello()["op"] == "welcome"  # the connection is still there
    assert slots_held(client) == []


@RAW_CLIENT
def test_a_message_of_more_than_65536_bytes_loses_the_connection_and_its_slots(
    connect: Connect, world: World, kind: str
) -> None:
    client = raw(opened(connect(kind)))
    client.request("claim", **watchpoint(world, delivery="hold"))
    bytes_max = client.request("capabilities")["limits"]["message_bytes"]
    client.way.send(bytes(bytes_max))
    assert (error := client.reply())["id"] == 0
    assert errno_of(error) == "EBADMSG"

    client.way.send(bytes(bytes_max + 1))

    with pytest.raises(Lost):
        client.reply()
    await_empty_books(world.daemon)


def test_a_message_of_several_frames_is_refused(connect: Connect) -> None:
    client = raw(opened(connect("newcomer")))
    assert isinstance(client.way, ZeroMQ)

    client.way.send_frames(msgpack.packb({"op": "slots"}), b"")

    assert (error := client.reply())["id"] == 0
    assert errno_of(error) == "EBADMSG"
    assert "one frame" in error["sentence"]


def test_the_bytes_of_the_document_shake_hands_and_speak(world: World) -> None:
    # Given nothing but what is written under "Without ZeroMQ" and "Examples",
    (ready,) = re.findall(r"^    ((?:[0-9a-f]{2} ){29}[0-9a-f]{2})$", document.text(), re.MULTILINE)
    greeting = bytes.fromhex("ff 0000000000000000 7f 0300") + b"NULL".ljust(20, b"\0") + bytes(32)
    hello = document.examples()[0].data

    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(WAIT_S)
        connection.connect(str(world.daemon.socket))
        with connection.makefile("rb") as incoming:
            # when they are sent, the first message after the daemon's READY,
            connection.sendall(greeting + bytes.fromhex(ready))
            theirs = incoming.read(64)
            assert (theirs[0], theirs[9], theirs[10], theirs[12:32]) == (0xFF, 0x7F, 3, greeting[12:32])
            flags, size = incoming.read(2)
            assert flags & 4
            assert incoming.read(size).startswith(b"\x05READY")
            connection.sendall(bytes([0, len(hello)]) + hello)

            # then a welcome comes.
            flags, size = incoming.read(2)
            assert flags == 0
            welcome = msgpack.unpackb(incoming.read(size))
    assert (welcome["op"], welcome["id"]) == ("welcome", document.examples()[0].map["id"])


# --- the end of a daemon, and the C client by itself -----------------------------------------------------------------


@RAW_CLIENT
def test_a_daemon_that_stops_says_so_and_hangs_up(program: Path, kind: str) -> None:
    with Daemon(SIMULATED) as daemon:
        path = str(daemon.socket)
        client = Newcomer(ZeroMQ(path) if kind == "newcomer" else InC(program, path))
        try:
            client.hello()

            assert daemon.stop() == 0

            closing = client.notice()
            assert (closing["op"], closing["n"]) == ("closing", 1)
            assert "stopping" in closing["sentence"]
            with pytest.raises(Lost):
                client.notice()
        finally:
            client.close()


def test_the_c_client_reads_every_message_as_it_is_meant(program: Path) -> None:
    lines = "".join(vector.data.hex() + "\n" for vector in vectors())

    read = subprocess.run([program, "--read"], input=lines, capture_output=True, text=True, check=True, timeout=WAIT_S)

    file = json.loads((document.PATH.parent / "protocol-vectors.json").read_text(encoding="utf-8"))
    maps = [row["map"] for kind in ("requests", "replies", "notices") for row in file[kind]]
    assert [json.loads(line) for line in read.stdout.splitlines()] == maps


def test_the_c_client_refuses_what_it_cannot_read(program: Path) -> None:
    for broken in ("c1", "81a2", "d9ff41", "df00000001"):
        command = [str(program), "--read"]
        read = subprocess.run(command, input=broken, capture_output=True, text=True, timeout=WAIT_S, check=False)
        assert (read.returncode, "a message" in read.stderr) == (1, True), broken


def test_the_c_client_sees_its_own_writes(world: World, program: Path) -> None:
    command = [str(program), str(world.daemon.socket), "5"]

    watching = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)

    if world.writes_by_itself:  # its threads are none of the simulated machine's
        assert (watching.returncode, "client: refused: " in watching.stderr) == (1, True)
        return
    *hits, counts = watching.stdout.splitlines()
    assert counts == "hits: 5, delivered: 5"
    assert len(hits) == 5
    assert all(re.match(r"hit: tid \d+ wrote to 0x[0-9a-f]+ on cpu \d+, right before 0x[0-9a-f]+", hit) for hit in hits)
