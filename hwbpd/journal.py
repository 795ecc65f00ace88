"""
What happened, on disk: every event given to the core, in order, so that ``hwbpd.replay`` comes to the same state again.

The core is deterministic, so its events are all there is to know, and they are far fewer than hits. A file is

- ``MAGIC``, then records: four bytes of length, most significant first, then that many bytes of msgpack, a list whose
  first item says what it is;
- ``begin``: what the core was made from; ``event``: one event, written *before* it is stepped, so that an event that
  brings the daemon down is there; ``mark``: a digest of the state after so many events; ``last``: why nothing follows.

Records are buffered and flushed once a second: what a killed daemon loses is its last second, and perhaps a piece of a
record, which a reader leaves out. The file ends at a bound. We decided against starting a second file there: a replay
needs everything from the beginning, so the beginning is what has to be kept.

A mark looks at all there is in the books, some microseconds for each claim. It is made when ten times as many events
have passed, at least ``MARK_EVERY``: per event it then costs the same, whatever the books hold.

A journal that cannot be written ends, with a warning; the daemon goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, TypeAlias, get_args

import msgspec
import structlog
from msgspec import Struct

from hwbpd.core.arbiter import Arbiter
from hwbpd.core.effects import Effect
from hwbpd.core.events import AnyEvent
from hwbpd.core.model import Pool
from hwbpd.core.policy import Policy

log = structlog.get_logger("hwbpd")

MAGIC = b"hwbpd journal\n"
FORMAT = 1
MARK_EVERY = 1000  # events
MARK_CLAIMS = 10  # or so many events for each claim in the books, if that is more
FLUSH_NS = 1_000_000_000
BUFFER_BYTES = 1 << 18
RECORD_MAX = 1 << 24  # far beyond any event that can be; a longer one is no journal of ours
WHY_MAX = 80  # characters
LAST_BYTES = 512  # kept free for a mark and the last record

Step = Callable[[AnyEvent], list[Effect]]


class Begin(Struct, frozen=True, tag="begin"):
    """What the core was made from."""

    slots: dict[Pool, int]
    possible: tuple[int, ...]
    online: tuple[int, ...]
    policy: Policy
    rearm_after_ns: int
    slots_on: dict[int, dict[Pool, int]] = {}  # of CPUs that have other numbers of slots
    version: str = importlib.metadata.version("hwbpd")  # another version may decide otherwise
    format: int = FORMAT

    def arbiter(self) -> Arbiter:
        """Return a core as it was then: with nothing in its books."""
        return Arbiter(self.slots, self.possible, self.online, self.rearm_after_ns, self.policy, self.slots_on)


class Happened(Struct, frozen=True, tag="event", array_like=True):
    """One event, and the name of its class."""

    name: str
    event: msgspec.Raw


class Mark(Struct, frozen=True, tag="mark", array_like=True):
    """The state after so many events."""

    events: int
    digest: str


class Last(Struct, frozen=True, tag="last", array_like=True):
    """Nothing follows, and why."""

    why: str


Record: TypeAlias = Begin | AnyEvent | Mark | Last

_encoder = msgspec.msgpack.Encoder()
_records: msgspec.msgpack.Decoder[Happened | Mark | Last] = msgspec.msgpack.Decoder(Happened | Mark | Last)
_begins = msgspec.msgpack.Decoder(Begin)
_events: dict[str, msgspec.msgpack.Decoder[AnyEvent]] = {
    event.__name__: msgspec.msgpack.Decoder(event) for event in get_args(AnyEvent)
}
# What msgspec raises for bytes that are not a record.
_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class CannotJournal(Exception):
    """The file cannot be made; the message says why."""


class BadJournal(Exception):
    """The file is no journal, or not one of this format; the message says where and why."""


def digest(arbiter: Arbiter) -> str:
    """Return a word for the state of a core: the same for two that hold, queue and count the same."""
    state = {**arbiter.books.dump(), "queue": [record.claim.claim_id for record in arbiter.queue]}
    return hashlib.blake2b(_encoder.encode(_in_order(state)), digest_size=8).hexdigest()


def _in_order(value: Any) -> Any:
    """Sets and dicts as lists, in the order of their encoded keys: the same whatever the order of their making."""
    if isinstance(value, dict):
        return sorted((_encoder.encode(key), _in_order(each)) for key, each in value.items())
    if isinstance(value, (set, frozenset)):
        return sorted(map(_encoder.encode, value))
    return value


# --- writing ---------------------------------------------------------------------------------------------------------


class Journal:
    """
    The journal of one core, from its first event on.

    :param path: a new file, which only its owner may read, for it has addresses. A journal that is there is kept beside
        it, with ``.1`` behind its name, as the one of a daemon that crashed; the one before that is forgotten.
    :param bytes_max: the file grows no further.
    :raises CannotJournal: when the file cannot be made, or something else has that name.
    """

    def __init__(self, path: Path, begin: Begin, arbiter: Arbiter, bytes_max: int) -> None:
        self._path = path
        self._arbiter = arbiter
        self._bytes_max = bytes_max
        self._bytes = self._events = 0
        self._next_mark = MARK_EVERY
        self._flush_due_ns = 0
        try:
            _put_aside(path)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(path, flags, 0o600)
        except OSError as why:
            raise CannotJournal(f"cannot write a journal to {path}: {why.strerror or why}") from None
        fcntl.flock(fd, fcntl.LOCK_EX)
        self._file: IO[bytes] | None = os.fdopen(fd, "wb", buffering=BUFFER_BYTES)
        self._write(MAGIC)
        self._put(_encoder.encode(begin))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, why: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self._end("the daemon stopped")
        else:
            # The state may be half-changed by the step that failed, so it is not marked.
            self._end(f"the daemon failed: {kind.__name__}: {why}"[:WHY_MAX], is_sound=False)

    def recorded(self, step: Step) -> Step:
        """Return a ``step`` whose events are written down first."""

        def recorded_step(event: AnyEvent) -> list[Effect]:
            if self._file is None:
                return step(event)
            data = _encoder.encode(Happened(type(event).__name__, msgspec.Raw(_encoder.encode(event))))
            if self._bytes + len(data) + LAST_BYTES > self._bytes_max:
                log.warning("journal is full", path=str(self._path), limit_bytes=self._bytes_max, events=self._events)
                self._end("the journal is full (journal_max_bytes)")
                return step(event)
            self._put(data)
            self._events += 1
            effects = step(event)
            if self._events >= self._next_mark:
                self._mark()
            return effects

        return recorded_step

    def flush(self, now_ns: int) -> None:
        """Hand what was written to the kernel, if it is time to; the loop's heartbeat is soon enough to ask."""
        if now_ns >= self._flush_due_ns:
            self._flush_due_ns = now_ns + FLUSH_NS
            self._flush()

    def _mark(self) -> None:
        self._next_mark = self._events + max(MARK_EVERY, MARK_CLAIMS * len(self._arbiter.books.claims))
        self._put(_encoder.encode(Mark(self._events, digest(self._arbiter))))

    def _end(self, why: str, is_sound: bool = True) -> None:
        if is_sound:
            self._mark()
        self._put(_encoder.encode(Last(why)))
        self._flush()
        self._close()

    def _put(self, record: bytes) -> None:
        self._write(len(record).to_bytes(4, "big") + record)

    def _write(self, data: bytes) -> None:
        if self._file is None:
            return
        self._bytes += len(data)
        try:
            self._file.write(data)
        except OSError as why:
            self._give_up(why)

    def _flush(self) -> None:
        if self._file is None:
            return
        try:
            self._file.flush()
        except OSError as why:
            self._give_up(why)

    def _give_up(self, why: OSError) -> None:
        log.warning("journal ended", path=str(self._path), reason=why.strerror or str(why), events=self._events)
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # it says once more why it could not be written
                self._file.close()
            self._file = None


def _put_aside(path: Path) -> None:
    """
    Keep an earlier journal of that name under another.

    :raises CannotJournal: for anything that is not a journal, or one that a daemon is still writing.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    with os.fdopen(fd, "rb") as earlier:
        is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        if not is_file or earlier.read(len(MAGIC)) not in (MAGIC, b""):
            raise CannotJournal(f"{path} is there, and is no journal: it stays as it is")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotJournal(f"another daemon writes its journal to {path}") from None
        path.rename(path.with_name(path.name + ".1"))


# --- reading ---------------------------------------------------------------------------------------------------------


def read(file: IO[bytes]) -> Iterator[Record]:
    """
    The records of a journal, the ``Begin`` first; a last one that is cut off, as after a crash, is left out.

    :raises BadJournal: naming the place.
    """
    if file.read(len(MAGIC)) != MAGIC:
        raise BadJournal("this is no journal of hwbpd")
    begin = _next(file)
    if begin is None:
        return
    try:
        found = _begins.decode(begin)
    except _UNREADABLE as why:
        raise BadJournal(f"the first record cannot be read: {why}") from None
    if found.format != FORMAT:
        raise BadJournal(f"this journal has format {found.format}; this version of hwbpd reads {FORMAT}")
    yield found
    while (data := _next(file)) is not None:
        try:
            record = _records.decode(data)
            yield _events[record.name].decode(record.event) if isinstance(record, Happened) else record
        except _UNREADABLE as why:
            raise BadJournal(f"the record that ends at byte {file.tell()} cannot be read: {why}") from None
        except KeyError as name:
            raise BadJournal(f"the record that ends at byte {file.tell()} is an unknown event, {name}") from None


def _next(file: IO[bytes]) -> bytes | None:
    """The bytes of the next record, or None at the end, be it in the middle of one."""
    header = file.read(4)
    if len(header) < 4:
        return None
    length = int.from_bytes(header, "big")
    if length > RECORD_MAX:
        raise BadJournal(f"a record of {length} bytes before byte {file.tell()}: longer than any can be")
    data = file.read(length)
    return data if len(data) == length else None
