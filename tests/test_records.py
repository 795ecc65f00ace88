"""Records that are looked into: those of one process are picked out whole, and kernel addresses are hidden, no more."""

from __future__ import annotations

import sys
from typing import NamedTuple

from hypothesis import given
from hypothesis import strategies as st

from hwbpd import records
from hwbpd.messages import U64_MAX
from tests.fakes import IN_KERNEL, IN_USER, RECORD

IP_AT, IP_BYTES = 8, 8  # docs/protocol.md, "Hit records"


class Hit(NamedTuple):
    """A record, in the terms of docs/protocol.md."""

    pid: int
    misc: int
    ip: int
    chain: tuple[int, ...] | None

    @property
    def where(self) -> int:
        return self.misc & 7

    def packed(self) -> bytes:
        chain = b"" if self.chain is None else len(self.chain).to_bytes(8, sys.byteorder)
        chain += b"".join(entry.to_bytes(8, sys.byteorder) for entry in self.chain or ())
        head = RECORD.pack(9, self.misc, RECORD.size + len(chain), self.ip, self.pid, 77, 5, 0x404040, 1, 0)
        return head + chain


u64 = st.integers(0, U64_MAX)
upper_bits = st.sampled_from([0, 8, 0x4000, 0xFFF8])  # which say something else
hits = st.builds(
    Hit,
    pid=st.sampled_from([0, 1, 812, 2**22]),
    misc=st.builds(int.__or__, st.integers(0, 7), upper_bits),
    ip=u64,
    chain=st.none() | st.lists(u64, max_size=5).map(tuple),
)
batches = st.lists(hits, max_size=12)


def packed(batch: list[Hit]) -> bytes:
    return b"".join(hit.packed() for hit in batch)


@given(batches, st.sampled_from([1, 812, 4711]))
def test_of_one_process_are_its_records_as_they_were_and_their_number(batch: list[Hit], pid: int) -> None:
    theirs = [hit for hit in batch if hit.pid == pid]

    assert records.of_process(packed(batch), pid) == (packed(theirs), len(theirs))


@given(batches)
def test_where_the_kernel_was_is_nought_and_nothing_else_is_changed(batch: list[Hit]) -> None:
    hidden = records.without_kernel_addresses(packed(batch))

    assert hidden == packed([hit._replace(ip=0) if hit.where == IN_KERNEL else hit for hit in batch])


@given(batches, st.sampled_from([1, 812]))
def test_in_either_order_the_same_is_left(batch: list[Hit], pid: int) -> None:
    first_hidden, _ = records.of_process(records.without_kernel_addresses(packed(batch)), pid)
    first_filtered = records.without_kernel_addresses(records.of_process(packed(batch), pid)[0])

    assert first_hidden == first_filtered


def test_a_kernel_address_is_found_where_the_protocol_says() -> None:
    batch = packed([Hit(1, IN_USER, U64_MAX, None), Hit(1, IN_KERNEL, U64_MAX, (3,)), Hit(1, IN_KERNEL, 5, None)])

    hidden = records.without_kernel_addresses(batch)

    second, third = RECORD.size, 2 * RECORD.size + 16
    changed = [at for at, (before, after) in enumerate(zip(batch, hidden, strict=True)) if before != after]
    assert changed == [*range(second + IP_AT, second + IP_AT + IP_BYTES), third + IP_AT]


@given(batches, st.integers(1, 400))
def test_parts_are_the_whole_in_order_and_none_is_longer_than_it_may_be(batch: list[Hit], most: int) -> None:
    whole = packed(batch)

    parts = list(records.parts(whole, len(batch), most))

    assert b"".join(part for part, _ in parts) == whole
    assert sum(count for _, count in parts) == len(batch)
    for part, count in parts:
        assert len(part) <= most or count == 1, "a record is not cut"
    if len(whole) <= most:
        assert parts == [(whole, len(batch))]
