"""A ring hands over exactly the samples the kernel wrote, whatever else lies between them and wherever they wrap."""

from __future__ import annotations

import operator
import struct
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from hwbpd_linux.perf_event import PAGE_BYTES
from hwbpd_linux.rings import PLAIN_BYTES, Ring, split

SAMPLE, LOST, THROTTLE = 9, 2, 5
RING_BYTES = 1024
CHAIN_MAX = 12
CHAIN_SAMPLE_BYTES_MAX = PLAIN_BYTES + 8 + 8 * CHAIN_MAX


def record(record_type: int, size: int, misc: int, filling: int) -> bytes:
    return struct.pack("=IHH", record_type, misc, size) + bytes((filling,)) * (size - 8)


@dataclass
class FakeKernel:
    """Writes a ring in ordinary memory as the kernel does: it drops what has no room, and says so before the next."""

    start: int
    samples: list[bytes] = field(default_factory=list)
    lost: int = 0

    def __post_init__(self) -> None:
        self.memory = memoryview(bytearray(PAGE_BYTES + RING_BYTES))
        self._positions = self.memory[1024:1040].cast("Q")
        self._positions[0] = self._positions[1] = self.start
        self._untold = 0

    @property
    def waiting_bytes(self) -> int:
        return self._positions[0] - self._positions[1]

    def write(self, data: bytes, is_sample: bool) -> None:
        notice = struct.pack("=IHHQQ", LOST, 0, 24, 0, self._untold) if self._untold else b""
        # One byte always stays empty.
        if RING_BYTES - self.waiting_bytes - 1 < len(notice + data):
            self._untold += 1
            self.lost += is_sample
            return
        self._untold = 0
        for byte in notice + data:
            self.memory[PAGE_BYTES + self._positions[0] % RING_BYTES] = byte
            self._positions[0] += 1
        if is_sample:
            self.samples.append(data)


miscs = st.sampled_from([1, 2, 0x4001, 0x4002])
fillings = st.sampled_from([0, 9, 48, 255])
plain_samples = st.builds(record, st.just(SAMPLE), st.just(PLAIN_BYTES), miscs, fillings)
chain_samples = st.builds(
    lambda entries, misc, filling: record(SAMPLE, PLAIN_BYTES + 8 + 8 * entries, misc, filling),
    st.integers(0, CHAIN_MAX),
    miscs,
    fillings,
)
others = st.builds(record, st.just(THROTTLE), st.sampled_from([8, 32, 48, 96]), st.just(0), fillings)
budgets = st.integers(0, 2 * RING_BYTES)
# Multiples of eight, as records are; far up too, where positions need all their 64 bits.
starts = st.builds(lambda at, far: 8 * at + far, st.integers(0, RING_BYTES // 8), st.sampled_from([0, 2**32, 2**63]))


def rounds_of(samples: st.SearchStrategy[bytes]) -> st.SearchStrategy[list[tuple[list[bytes], int]]]:
    """Bursts, with a visit of some budget after each: short ones that fit, and long ones that lose or just fill up."""
    mixed = st.lists(st.one_of(samples, samples, samples, others), max_size=8)
    repeated = st.builds(lambda one, times: [one] * times, samples, st.integers(15, 30))
    burst = st.builds(operator.add, repeated, mixed) | mixed
    return st.lists(st.tuples(burst, budgets), min_size=1, max_size=6)


def check_that_nothing_is_missed(start: int, rounds: list[tuple[list[bytes], int]], sample_bytes_max: int) -> None:
    kernel = FakeKernel(start)
    ring = Ring(kernel.memory, sample_bytes_max)
    taken: list[bytes] = []
    hits = lost_before = 0

    def take(budget_bytes: int) -> bool:
        nonlocal hits, lost_before
        chunk = ring.take(budget_bytes)
        taken.append(chunk.records)
        hits += chunk.hits
        assert len(chunk.records) <= max(budget_bytes, sample_bytes_max)
        assert chunk.more == (kernel.waiting_bytes > 0)
        assert chunk.loss_possible or kernel.lost == lost_before
        lost_before = kernel.lost
        return chunk.more

    for burst, budget_bytes in rounds:
        for one in burst:
            kernel.write(one, is_sample=one[0] == SAMPLE)
        take(budget_bytes)
    while take(0):
        pass

    assert b"".join(taken) == b"".join(kernel.samples)
    assert hits == len(kernel.samples)


@given(starts, rounds_of(plain_samples))
def test_plain_samples_come_out_whole_and_in_order(start: int, rounds: list[tuple[list[bytes], int]]) -> None:
    check_that_nothing_is_missed(start, rounds, PLAIN_BYTES)


@given(starts, rounds_of(st.one_of(plain_samples, chain_samples)))
def test_samples_with_call_chains_come_out_whole_and_in_order(
    start: int, rounds: list[tuple[list[bytes], int]]
) -> None:
    check_that_nothing_is_missed(start, rounds, CHAIN_SAMPLE_BYTES_MAX)


@given(st.lists(st.one_of(plain_samples, chain_samples, others), max_size=12), st.integers(0, 200))
def test_a_record_that_is_cut_off_is_left_for_later(records: list[bytes], cut_bytes: int) -> None:
    data = b"".join(records)[: -cut_bytes or None]
    whole, taken_bytes = [], 0
    for one in records:
        if taken_bytes + len(one) > len(data):
            break
        whole.append(one)
        taken_bytes += len(one)
    samples = [one for one in whole if one[0] == SAMPLE]

    assert split(data) == (b"".join(samples), len(samples), taken_bytes, len(samples) < len(whole))


def test_a_stretch_of_plain_samples_is_handed_over_without_another_copy() -> None:
    data = record(SAMPLE, PLAIN_BYTES, 2, 7) * 1000

    assert split(data)[0] is data


def test_a_record_larger_than_the_budget_is_taken_alone() -> None:
    kernel = FakeKernel(RING_BYTES - 16)
    ring = Ring(kernel.memory, 152)
    for filling in (1, 2):
        kernel.write(record(SAMPLE, 152, 2, filling), is_sample=True)

    chunk = ring.take(1)

    assert (chunk.records, chunk.hits, chunk.more) == (kernel.samples[0], 1, True)


def test_a_ring_with_room_to_spare_does_not_ask_about_losses() -> None:
    kernel = FakeKernel(0)
    ring = Ring(kernel.memory, PLAIN_BYTES)
    for _ in range(10):
        kernel.write(record(SAMPLE, PLAIN_BYTES, 2, 0), is_sample=True)

    assert not ring.take(RING_BYTES).loss_possible


def test_a_record_of_losses_is_asked_about_even_when_there_is_room_again() -> None:
    kernel = FakeKernel(0)
    ring = Ring(kernel.memory, PLAIN_BYTES)
    kernel.write(record(LOST, 24, 0, 0), is_sample=False)
    kernel.write(record(SAMPLE, PLAIN_BYTES, 2, 0), is_sample=True)

    chunk = ring.take(RING_BYTES)

    assert (chunk.hits, chunk.loss_possible) == (1, True)


def test_a_closed_ring_lets_its_memory_go() -> None:
    memory = bytearray(PAGE_BYTES + RING_BYTES)
    with memoryview(memory) as view:
        ring = Ring(view, PLAIN_BYTES)
        ring.close()

    memory.clear()  # raises BufferError while anybody still has a view
