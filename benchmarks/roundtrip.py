"""
What a client waits for when it asks: one round trip, against a daemon in a process of its own.

Each question is asked through the client library and as bare frames. The difference between the two is the library; the
difference between bare frames and the epoll echo is the daemon; the floor, in the same rounds, is a blocking echo of
equally many bytes. Then the same over both transports, beside the echo of each.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import hwbp
from benchmarks.harness import Row, Subject, compare, median_ns
from benchmarks.stand import BareSession, Stand, real_stand

OPERATIONS_PER_ROUND = 200


class Question(NamedTuple):
    """A request that changes nothing: as the protocol has it, and as the library does."""

    op: str
    fields: dict[str, Any]
    by_library: Callable[[], object]


def run(rounds: int) -> list[tuple[str, list[Row]]]:
    """
    Return a titled table for each question.

    :raises Missing: where real breakpoints do not work; ``HostBusy`` while others use them.
    """
    with real_stand() as stand:
        client, frames = stand.library(), BareSession(stand.frames())
        tables = [
            (f"{question.op}: one round trip", compare(list(subjects(stand, frames, question)), rounds))
            for question in questions(client, frames)
        ]
        if stand.packet_path.exists():
            tables.append(("slots by ZeroMQ and by SEQPACKET", compare(list(by_both(stand, frames)), rounds)))
            tables.append(("claim and release by both", compare(list(claims_by_both(stand, frames)), rounds)))
        return tables


def questions(client: hwbp.Client, frames: BareSession) -> Iterator[Question]:
    """What is asked, of a daemon on which nobody holds more than one claim that counts."""
    yield Question("slots", {}, client.slots)
    watched = ctypes.c_uint64()
    event: dict[str, Any] = {"address": ctypes.addressof(watched), "length": 8, "access": "w", "kernel": False}
    on_this_thread = event | {"tid": threading.get_native_id(), "delivery": "count"}
    by_frames = frames.ask("claim", **on_this_thread)["claim"]
    with client.claim(**on_this_thread) as watch:
        yield Question("counts", {"claim": by_frames}, watch.counts)
    frames.ask("release", claim=by_frames)
    yield Question("fit", on_this_thread, lambda: client.fit(**on_this_thread))
    tid = threading.get_native_id()
    yield Question("enabled", {"tid": tid, "cpu": 0}, lambda: client.enabled(cpu=0, tid=tid))


def subjects(stand: Stand, frames: BareSession, question: Question) -> Iterator[Subject]:
    op, fields, by_library = question
    request = frames.encode(op, **fields)
    reply = frames.exchange(request)
    blocking, polling = stand.floor("blocking", len(reply)), stand.floor("epoll", len(reply))
    lowest = f"blocking echo, {len(request)} and {len(reply)} bytes"
    yield Subject(lowest, timed(lambda: blocking.exchange(request)))
    yield Subject("epoll echo", timed(lambda: polling.exchange(request)), lowest)
    yield Subject(f"{op}, bare frames", timed(lambda: frames.ask(op, **fields)), lowest)
    yield Subject(f"{op}, hwbp", timed(by_library), lowest)


def by_both(stand: Stand, frames: BareSession) -> Iterator[Subject]:
    packets = BareSession(stand.packets())
    request = frames.encode("slots")
    reply_bytes = len(frames.exchange(request))
    blocking, by_packets = stand.floor("blocking", reply_bytes), stand.packet_floor(reply_bytes)
    slow, fast = stand.library(), stand.library("seqpacket")
    lowest, lowest_by_packets = "ZeroMQ: blocking echo", "SEQPACKET: blocking echo"
    yield Subject(lowest, timed(lambda: blocking.exchange(request)))
    yield Subject("ZeroMQ: bare frames", timed(lambda: frames.ask("slots")), lowest)
    yield Subject("ZeroMQ: hwbp", timed(slow.slots), lowest)
    yield Subject("SEQPACKET beside it: bare packets", timed(lambda: packets.ask("slots")), lowest)
    yield Subject("SEQPACKET beside it: hwbp", timed(fast.slots), lowest)
    yield Subject(lowest_by_packets, timed(lambda: by_packets.exchange(request)))
    yield Subject("SEQPACKET: bare packets", timed(lambda: packets.ask("slots")), lowest_by_packets)
    yield Subject("SEQPACKET: hwbp", timed(fast.slots), lowest_by_packets)


def claims_by_both(stand: Stand, frames: BareSession) -> Iterator[Subject]:
    """A watchpoint on this thread whose hits are counted, so that setting up a ring does not hide the rest."""
    watched = ctypes.c_uint64()
    what: dict[str, Any] = {"address": ctypes.addressof(watched), "length": 8, "access": "w", "kernel": False}
    what |= {"tid": threading.get_native_id(), "delivery": "count"}
    packets = BareSession(stand.packets())

    def bare(session: BareSession) -> None:
        assert ctypes.addressof(watched) == what["address"]  # which keeps it alive as long as anybody may watch it
        session.ask("release", claim=session.ask("claim", **what)["claim"])

    def by_library(client: hwbp.Client) -> None:
        with client.claim(**what):
            pass

    slow, fast = stand.library(), stand.library("seqpacket")
    yield Subject("ZeroMQ: bare frames", timed(lambda: bare(frames)))
    yield Subject("SEQPACKET: bare packets", timed(lambda: bare(packets)), "ZeroMQ: bare frames")
    yield Subject("ZeroMQ: hwbp", timed(lambda: by_library(slow)))
    yield Subject("SEQPACKET: hwbp", timed(lambda: by_library(fast)), "ZeroMQ: hwbp")


def timed(operation: Callable[[], object]) -> Callable[[], float]:
    return lambda: median_ns(operation, OPERATIONS_PER_ROUND)
