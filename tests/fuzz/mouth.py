"""
What a hostile client says: requests that are right, requests that are wrong in one known way, and bytes of any kind.

Each comes with what its reply has to be (``Said``), as far as that follows from docs/protocol.md: a request that is
right is never EBADMSG, and one that is wrong in one field is EBADMSG and names that field. All is drawn from one random
source, so a seed repeats what was said. What it was answered does not repeat: that depends on who else is there.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

from tests.fuzz.said import ID_MAX, Said, pack, read, right_request, unpacked

MESSAGE_BYTES_MAX = 65536
MARKER_IDS = 2**61  # from here on, ids of questions that only tell how far the daemon has come
UNDER_WAY_MOST = 300  # messages that may be without their reply
REMEMBERED = 50  # messages, to be said again and to be spliced
MONSTER_DEPTH = 60_000  # as deep as a message can be nested; without the transport's bound it may be deeper


class Knowledge:
    """What the speaker knows of the daemon and the machine, and what it must leave alone."""

    def __init__(
        self,
        *,
        epoch: int,
        spared: int,
        tids: list[int],
        pids: list[int],
        addresses: list[int],
        cpus: list[int],
        now_ns: Callable[[], int],
    ) -> None:
        """:param spared: a claim that nobody may release: an operator could, and that would be no fault."""
        self.epoch = epoch
        self.spared = spared
        self.tids = tids
        self.pids = pids
        self.addresses = addresses
        self.cpus = cpus
        self.now_ns = now_ns
        self.claims: list[int] = []  # of the speaker itself


class Mouth:
    """Says one thing after the other."""

    def __init__(self, rng: random.Random, knowledge: Knowledge) -> None:
        self._rng = rng
        self._knows = knowledge
        self._last_id = 0
        self._said: deque[bytes] = deque([b""], maxlen=REMEMBERED)
        self._ids: deque[frozenset[int]] = deque(maxlen=UNDER_WAY_MOST)
        self._late_ids: deque[int] = deque(maxlen=UNDER_WAY_MOST)
        self._ways: list[tuple[int, Callable[[], Said]]] = [
            (50, self.right),
            (15, self.wrong),
            (20, self.mutated),
            (4, self.again),
            (6, self.monster),
            (5, self.noise),
        ]

    def speak(self) -> Said:
        """Return the next message."""
        weights = [weight for weight, _ in self._ways]
        while True:
            said = self._rng.choices(self._ways, weights)[0][1]()
            fits = len(said.data) <= MESSAGE_BYTES_MAX and not self._touches_the_spared(said.data)
            if fits and not self._would_be_confused(said):
                break
        self._ids.append(said.ids)
        if said.may_be_late:
            self._late_ids.extend(said.ids)
        if len(said.data) < 4096:
            self._said.append(said.data)
        return said

    def hello(self) -> Said:
        """The request that opens a session."""
        return right_request({"op": "hello", "id": self._next_id(), "version": 1, "client": "hostile"})

    def marker(self, number: int) -> Said:
        """A question that changes nothing and always has its reply."""
        return right_request({"op": "counts", "id": MARKER_IDS + number, "epoch": self._knows.epoch, "claim": 0})

    # --- the ways of speaking ----------------------------------------------------------------------------------------

    def right(self) -> Said:
        return right_request(self._request())

    def wrong(self) -> Said:
        request = self._request()
        field = self._rng.choice([name for name in request if name in _WRONG_VALUES] + ["", "missing", "unknown"])
        match field:
            case "" | "unknown":
                field = self._rng.choice(["uid", "Epoch", "__class__", "spare"])
                request[field] = self._rng.choice([0, None, [], "root"])
            case "missing":
                optional = {"claim"} if request["op"] == "why" else set()
                field = self._rng.choice([name for name in request if name in _REQUIRED and name not in optional])
                del request[field]
            case _:
                request[field] = self._rng.choice(_WRONG_VALUES[field])
        return read(pack(request))._replace(wrong=field, may_be_late=False)

    def mutated(self) -> Said:
        data = bytearray(self._rng.choice([pack(self._request()), self._rng.choice(self._said)]))
        for _ in range(self._rng.randint(1, 3)):
            self._mutate(data)
        return read(bytes(data))

    def again(self) -> Said:
        return read(self._rng.choice(self._said))

    def noise(self) -> Said:
        return read(self._rng.randbytes(self._rng.choice([0, 1, 2, 9, 60, 3000])))

    def monster(self) -> Said:
        """Nesting, lengths that promise what does not come, and types that no field has."""
        rng = self._rng
        nested = rng.choice([b"\x91", b"\x81\xa1a", b"\x81\x91", b"\xdc\x00\x01"]) * rng.choice([10, 900, 15_000])
        whole = rng.choice(
            [
                nested,
                b"\x91" * MONSTER_DEPTH,
                nested + b"\xc0" * rng.randint(0, 3),
                rng.choice([b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9"]) + b"\xff\xff\xff\xff",
                pack({f"field {number}": number for number in range(3000)}),
                pack("x" * 65_000),
            ]
        )
        if rng.random() < 0.4:
            return read(whole)
        request = self._request()
        field = rng.choice([*request, "unknown"])
        request.pop(field, None)
        packed = pack(request)  # a map of fewer than 16 or of more fields; then one more, with the monster in it
        count = len(request) + 1
        head = bytes([0x80 | count]) if count < 16 else b"\xde" + count.to_bytes(2, "big")
        body = packed[1:] if len(request) < 16 else packed[3:]
        room = MESSAGE_BYTES_MAX - len(head) - len(body) - len(pack(field))
        return read(head + body + pack(field) + whole[:room])

    # --- requests ----------------------------------------------------------------------------------------------------

    def _request(self) -> dict[str, Any]:
        rng, knows = self._rng, self._knows
        op = rng.choices(list(_OPS), list(_OPS.values()))[0]
        request: dict[str, Any] = {"op": op, "id": self._next_id()}
        if op == "hello":
            return request | {"version": rng.choice([1, 1, 1, 1, 0, 2, 65535]), "client": rng.choice(_NAMES)}
        request["epoch"] = knows.epoch if rng.random() < 0.93 else rng.choice([0, 1, knows.epoch ^ 1, 2**64 - 1])
        if rng.random() < 0.2:
            now_ns = knows.now_ns()
            request["deadline_ns"] = rng.choice([0, 1, now_ns - 10**9, now_ns + 10**12, 2**63, 2**64 - 1])
        match op:
            case "claim" | "fit":
                request |= self._wish()
            case "plan":
                wish = self._wish()
                request |= {name: wish[name] for name in ("address", "length", "access")}
            case "release" | "rearm" | "counts" | "why":
                request["claim"] = self._some_claim()
            case "slots" if rng.random() < 0.5:
                request |= {"after": rng.choice([0, 1, ID_MAX]), "most": rng.choice([1, 2, 200, 1000])}
        return request

    def _wish(self) -> dict[str, Any]:
        rng, knows = self._rng, self._knows
        wish: dict[str, Any] = {
            "address": rng.choice([*knows.addresses * 8, 0, 2**47, 2**63, 2**64 - 8, 2**64 - 1, rng.getrandbits(64)]),
            "length": rng.choice([1, 2, 4, 8, 8, 8, 8, 3, 16, 64, 2**32]),
            "access": rng.choice(["w", "w", "rw", "r", "x"]),
        }
        if rng.random() < 0.75:
            wish["tid"] = rng.choice([*knows.tids * 5, 1, 2, 4_000_000, 2**22])
        elif rng.random() < 0.2:
            wish["pid"] = rng.choice([*knows.pids, 1, 2**22])
        for name, values in _OPTIONS.items():
            if rng.random() < 0.08:
                wish[name] = rng.choice(values)
        if rng.random() < 0.2:
            wish["cpus"] = rng.choice([knows.cpus, knows.cpus[:1], [], [8191], list(range(0, 8192, 2)), [0, 0, 0]])
        return wish

    def _some_claim(self) -> int:
        if self._knows.claims and self._rng.random() < 0.8:
            return self._rng.choice(self._knows.claims)
        claim = self._rng.choice([0, 1, 2, 10, 10_000, self._rng.randint(0, 2000), ID_MAX])
        return claim if claim != self._knows.spared else 0

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id if self._rng.random() < 0.99 else ID_MAX

    # --- bytes -------------------------------------------------------------------------------------------------------

    def _mutate(self, data: bytearray) -> None:
        rng = self._rng
        at = rng.randint(0, len(data))
        match rng.randrange(6):
            case 0 if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 1 if data:
                data[rng.randrange(len(data))] = rng.choice(_TYPE_BYTES)
            case 2:
                del data[at:]
            case 3:
                data[at:at] = rng.randbytes(rng.randint(1, 8))
            case 4:
                other = rng.choice(self._said)
                data[at:] = other[rng.randint(0, len(other)) :]
            case 5:
                data += data[at:]

    def _would_be_confused(self, said: Said) -> bool:
        """Whether its reply could not be told from another's, as one of the two may be late."""
        if not said.ids.isdisjoint(self._late_ids):
            return True
        return said.may_be_late and any(not said.ids.isdisjoint(ids) for ids in self._ids)

    def _touches_the_spared(self, data: bytes) -> bool:
        message = unpacked(data)
        return (
            isinstance(message, dict)
            and message.get("op") in ("release", "rearm")
            and message.get("claim") == self._knows.spared
        )


_OPS = {
    "claim": 30,
    "release": 22,
    "fit": 8,
    "plan": 3,
    "counts": 8,
    "why": 8,
    "slots": 8,
    "rearm": 5,
    "hello": 3,
    "capabilities": 3,
    "follow": 2,
    "foreign": 1,
    "goodbye": 1,
}
_REQUIRED = ("id", "epoch", "version", "address", "length", "access", "claim")
_NAMES = ["", "gdb", "x" * 64, "\n\x1b[31m\0", "\U0001f512" * 64, "\u202e"]
_OPTIONS: dict[str, list[Any]] = {
    "only_pid": [0, 1, 2**22],
    "user": [True, False],
    "kernel": [True, False],
    "delivery": ["hits", "count", "hold"],
    "user_chain": [True],
    "kernel_chain": [True],
    "ring_bytes": [0, 4096, 8192, 5000, 2**23, 2**30],
    "across_exec": [True],
    "over_report": [True, False],
    "guard": [0, 1, 10_000, 10**9],
    "kind": ["ptrace", "perf", "kgdb", "kvm", "background"],
    "label": _NAMES,
}
_NO_FLAG: list[Any] = [0, 1, "true", None, []]
_NO_COUNT: list[Any] = [-1, 1.0, "1", None, [1], {}, True, b"1"]
_WRONG_VALUES: dict[str, list[Any]] = {
    "op": ["nope", "", "Hello", "granted", 5, None, "claim\0"],
    "id": [*_NO_COUNT, ID_MAX + 1, 2**64 - 1, -(2**63)],
    "epoch": _NO_COUNT,
    "deadline_ns": _NO_COUNT,
    "version": [*_NO_COUNT, 65536],
    "client": ["x" * 65, 5, None, b"gdb"],
    "address": _NO_COUNT,
    "length": [*_NO_COUNT, 0, 2**32 + 1],
    "access": ["", "wr", "rwx", "W", "w\n", 1, None, b"w"],
    "tid": [*_NO_COUNT, 2**22 + 1],
    "pid": [*_NO_COUNT, 2**22 + 1],
    "only_pid": [*_NO_COUNT, 2**22 + 1],
    "cpus": [0, "0", {}, [-1], [8192], ["0"], [None], [[0]], [0] * 8193],
    "user": _NO_FLAG,
    "kernel": _NO_FLAG,
    "user_chain": _NO_FLAG,
    "across_exec": _NO_FLAG,
    "delivery": ["HITS", "", 0, None],
    "ring_bytes": [*_NO_COUNT, 2**30 + 1],
    "guard": [-1, 1.0, "1", [], 10**9 + 1],
    "kind": ["root", "", 1, None],
    "label": ["x" * 65, 5, None, b"x"],
    "claim": [*_NO_COUNT, ID_MAX + 1],
    "after": [*_NO_COUNT, ID_MAX + 1],
    "most": [*_NO_COUNT, 0, 1001],
}
_TYPE_BYTES = bytes([0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, *range(0xC0, 0xE0), 0xFF])
