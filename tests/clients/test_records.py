"""Hit records become hits, in order and one at a time; bytes that are no records are refused."""

from __future__ import annotations

import hypothesis
import pytest
from hypothesis import strategies as st

from hwbp import BadMessage, Hit
from hwbp.records import hits_of
from tests.clients.fake_daemon import record

KERNEL, USER, GUEST = 2**64 - 128, 2**64 - 512, 2**64 - 2048


def test_a_record_without_a_chain_is_a_hit_field_by_field() -> None:
    (hit,) = hits_of(record(0x401136, tid=813, time_ns=5), 1)
    assert hit == Hit(0x401136, address=0x404040, pid=812, tid=813, time_ns=5, cpu=1, in_kernel=False)
    assert hit.chain == ()


def test_where_the_cpu_was_is_in_the_low_three_bits_only() -> None:
    # Given records whose mode has other bits set, as the kernel may,
    records = record(mode=1 | 0x4000) + record(mode=2 | 0x4000)

    # then only the low ones count.
    assert [hit.in_kernel for hit in hits_of(records, 2)] == [True, False]


def test_a_call_chain_is_split_at_its_contexts() -> None:
    # Given a hit in the kernel with both stacks,
    (hit,) = hits_of(record(mode=1, chain=[KERNEL, 0xFFFFFFFF81000000, 0xFFFFFFFF81000042, USER, 0x401000]), 1)

    # then each part is by itself, innermost first, and no context is left in it.
    assert hit.kernel_chain == (0xFFFFFFFF81000000, 0xFFFFFFFF81000042)
    assert hit.user_chain == (0x401000,)
    assert hit.chain == (0xFFFFFFFF81000000, 0xFFFFFFFF81000042, 0x401000)


def test_entries_of_a_context_without_a_name_belong_to_neither_part() -> None:
    (hit,) = hits_of(record(chain=[USER, 0x401000, GUEST, 0x7000, USER, 0x402000]), 1)
    assert (hit.kernel_chain, hit.user_chain) == ((), (0x401000, 0x402000))


def test_records_with_and_without_chains_may_follow_each_other() -> None:
    records = record(1) + record(2, chain=[]) + record(3, chain=[USER, 7]) + record(4)
    assert [(hit.ip, hit.chain) for hit in hits_of(records, 4)] == [(1, ()), (2, ()), (3, (7,)), (4, ())]


def test_no_records_are_no_hits() -> None:
    assert list(hits_of(b"", 0)) == []


def test_many_megabytes_of_hits_are_read_one_by_one() -> None:
    # Given a message of a million hits,
    hits = hits_of(record() * 1_000_000, 1_000_000)

    # when the first is taken, then it is there without the others having been made, and the rest follow.
    assert next(hits).ip == 0x401136
    assert sum(1 for _ in hits) == 999_999


@hypothesis.given(st.integers(0, 3), st.data())
def test_bytes_that_are_not_that_many_records_are_refused(count: int, data: st.DataObject) -> None:
    # Given whole records of both sorts,
    records = b"".join(record(chain=data.draw(st.sampled_from([None, [USER, 1]]))) for _ in range(count))

    # when bytes are missing or left over,
    changed = data.draw(st.sampled_from([records[:-1], records + b"x", records[:-8], records + bytes(48)]))
    hypothesis.assume(len(changed) != len(records))

    # then that is noticed.
    with pytest.raises(BadMessage):
        list(hits_of(changed, count))


@pytest.mark.parametrize("other", [bytes(48), record(chain=[1, 2])[:-16] + bytes(16)])
def test_a_record_of_another_type_or_with_a_wrong_chain_is_refused(other: bytes) -> None:
    broken = bytearray(other)
    if len(broken) > 48:
        broken[48] = 77
    with pytest.raises(BadMessage):
        list(hits_of(bytes(broken), 1))
