"""
One hostile process: conversations that it keeps up, and visits in between, until it has sent its share of messages.

It is forked before anything else exists, becomes the user it is to be, waits for the daemon's address, and tells at the
end what came of it, or what went wrong with the last messages it had sent.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import random
import time
import traceback
from collections import deque
from typing import Any, NamedTuple

import msgpack

from tests.fuzz.judge import Broken, Judge
from tests.fuzz.mouth import Knowledge, Mouth
from tests.fuzz.packets import AllVisits, PacketVisitor, kinds_of_visitor
from tests.fuzz.said import Said

CONVERSATIONS = 4
BATCH = 40  # messages at once: few enough for all their replies to wait
VISIT_SHARE = 0.3  # visits for each batch
LAST_KEPT = 10
SHOWN_BYTES = 200  # of one message, after a failure
PR_SET_DUMPABLE = 4


class Order(NamedTuple):
    """What an assailant is to do."""

    path: str
    epoch: int
    spared: int
    tids: list[int]
    addresses: list[int]
    messages: int


class Outcome(NamedTuple):
    """What came of it. ``wrong`` is empty if all went as it must."""

    messages: int
    replies: int
    dropped: int
    wrong: str = ""
    last: tuple[str, ...] = ()  # messages before that, in hex


class Conversation:
    """A connection, by ZeroMQ or by SEQPACKET, on which every message is answered, and every answer judged."""

    def __init__(self, path: str, mouth: Mouth, knowledge: Knowledge, rng: random.Random) -> None:
        """:raises EOFError: when the daemon does not take one more connection."""
        self._mouth = mouth
        self._knowledge = knowledge
        self._rng = rng
        self._marker = 0
        self.judge = Judge()
        self.visitor = rng.choice(kinds_of_visitor(path))(path)
        try:
            self.visitor.shake_hands()
        except EOFError:
            self.visitor.socket.close()
            raise

    def batch(self, last: deque[bytes]) -> int:
        """Say so many things and hear all the answers; return how many were said."""
        self._knowledge.claims = self.judge.claims
        said = [self._speak() for _ in range(BATCH)]
        if not self.judge.has_session:
            said[0] = self._mouth.hello()
        self._marker += 1
        said.append(self._mouth.marker(self._marker))
        last.extend(one.data for one in said)
        for one in said:
            self.judge.said(one)
        self.visitor.say_all([one.data for one in said])
        marker_id = next(iter(said[-1].ids))
        while True:
            message = self.visitor.hear()
            self.judge.hear(message)
            if "n" not in message and message["id"] == marker_id:
                break
        if not self.judge.is_settled:
            raise Broken("some message has no reply")
        return len(said)

    def _speak(self) -> Said:
        while True:
            said = self._mouth.speak()
            if said.data or not isinstance(self.visitor, PacketVisitor):  # there, an empty one would be the end
                return said


class Assailant:
    """The process, seen from outside."""

    def __init__(self, name: str, seed: int, uid: int) -> None:
        self.name = name
        context = multiprocessing.get_context("fork")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_main, args=(theirs, f"{seed}/{name}", uid), name=name, daemon=True)
        self._process.start()
        theirs.close()
        self.pid = self._process.pid
        self.said = 0
        self.outcome: Outcome | None = None

    def begin(self, order: Order) -> None:
        self._ours.send(order)

    def look(self) -> Outcome | None:
        """What came of it, or None as long as it goes on; ``said`` tells how far it is."""
        while self.outcome is None and self._ours.poll():
            try:
                news = self._ours.recv()
            except EOFError:
                news = Outcome(self.said, 0, 0, f"{self.name} ended without a word")
            if isinstance(news, Outcome):
                self.outcome = news
            else:
                self.said = news
        return self.outcome

    def end(self) -> None:
        """See to it that it is gone."""
        self._process.kill()
        self._process.join()
        self._ours.close()


def _main(channel: Any, seed: str, uid: int) -> None:
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    try:
        order = channel.recv()
    except EOFError:
        return
    channel.send(_assail(channel, order, random.Random(seed), uid))


def _assail(channel: Any, order: Order, rng: random.Random, uid: int) -> Outcome:
    word = ctypes.create_string_buffer(64)  # something of its own to watch
    knowledge = Knowledge(
        epoch=order.epoch,
        spared=order.spared,
        tids=[*order.tids, os.getpid()],
        pids=[order.tids[0], os.getpid()],
        addresses=[*order.addresses, ctypes.addressof(word) & ~7],
        cpus=sorted(os.sched_getaffinity(0)),
        now_ns=time.monotonic_ns,
    )
    mouth = Mouth(rng, knowledge)
    visits = AllVisits(rng, order.path, mouth, uid)
    conversations: list[Conversation] = []
    replies = said = 0
    last: deque[bytes] = deque(maxlen=LAST_KEPT + BATCH)
    wrong = ""
    try:
        while said + visits.messages < order.messages:
            if len(conversations) < CONVERSATIONS:
                try:
                    conversations.append(Conversation(order.path, mouth, knowledge, rng))
                except EOFError:
                    visits.dropped += 1
                    if not conversations:
                        continue
            conversation = rng.choice(conversations)
            said += conversation.batch(last)
            if rng.random() < VISIT_SHARE:
                visits.one()
            if rng.random() < 0.02:  # somebody leaves without a word
                conversations.remove(conversation)
                conversation.visitor.socket.close()
                replies += conversation.judge.replies
            channel.send(said + visits.messages)
    except Broken as broken:
        wrong = str(broken)
    except (EOFError, OSError, msgpack.UnpackException, ValueError):
        wrong = traceback.format_exc(limit=-3)
    for conversation in conversations:
        replies += conversation.judge.replies
        conversation.visitor.socket.close()
    visits.close()
    shown = tuple(_shown(data) for data in last) if wrong else ()
    return Outcome(said + visits.messages, replies + visits.replies, visits.dropped, wrong, shown)


def _shown(data: bytes) -> str:
    return data.hex() if len(data) <= SHOWN_BYTES else f"{data[:SHOWN_BYTES].hex()}... of {len(data)} bytes"
