"""Every refusal of the protocol is an exception of the class that the protocol names."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

import hwbp
from hwbp.errors import refusal_of
from tests.clients.fake_daemon import FakeDaemon, always, error

PROTOCOL = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
TABLE = re.findall(r"^\| (E[A-Z]+) \| (\w+) \|", PROTOCOL, re.MULTILINE)
NOT_A_REPLY = ("ETIMEDOUT", "WaitTimedOut")  # it comes as the end of a claim that waited: test_pending.py

HOLDER = {"pid": 812, "comm": "gdb", "uid": 1000, "kind": "ptrace", "slots": 3, "place": "on tid 812"} | {
    "claim_ids": [4, 5, 6], "evidence": "books",
}  # fmt: skip


@pytest.mark.parametrize(("name", "class_name"), [row for row in TABLE if row != NOT_A_REPLY])
def test_a_refusal_is_raised_as_the_class_that_the_protocol_names(
    daemon: FakeDaemon, client: hwbp.Client, name: str, class_name: str
) -> None:
    # Given a daemon that refuses with this errno,
    daemon.answers["claim"] = always(error(name, "it cannot be", holders=[HOLDER], claim=12))

    # when a claim is made,
    with pytest.raises(hwbp.HwbpError) as caught:
        client.claim("mem:0x404040/8:w", tid=1)

    # then its class, number, sentence, holders and claim are all there.
    refusal = caught.value
    assert type(refusal) is getattr(hwbp, class_name)
    assert (refusal.errno_name, refusal.errno) == (name, getattr(errno, name))
    assert str(refusal) == "it cannot be"
    assert refusal.claim_id == 12
    assert refusal.holders == (hwbp.Holder(812, "gdb", 1000, "ptrace", 3, "on tid 812", (4, 5, 6), "books"),)


def test_the_protocol_has_the_table_these_tests_read() -> None:
    assert len(TABLE) == 15
    assert NOT_A_REPLY in TABLE


def test_an_errno_of_a_later_daemon_is_a_plain_refusal() -> None:
    refusal = refusal_of({"op": "error", "id": 1, "errno": "EBUSY", "sentence": "later"})
    assert type(refusal) is hwbp.HwbpError
    assert (refusal.errno_name, refusal.errno, refusal.holders, refusal.claim_id) == ("EBUSY", errno.EBUSY, (), 0)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "gdb[812] as ptrace: 3 on tid 812 (claims 4,5,6)"),
        ({"claim_ids": [4], "place": "cpu-wide on cpu 3"}, "gdb[812] as ptrace: 3 cpu-wide on cpu 3 (claim 4)"),
        ({"claim_ids": [], "kind": "", "evidence": "ptrace"}, "gdb[812]: 3 on tid 812, known from ptrace"),
        ({"place": "on tid 812", "claim_ids": []}, "gdb[812] as ptrace: 3 on tid 812"),
        ({"pid": 0, "comm": "somebody", "kind": "", "claim_ids": []}, "somebody: 3 on tid 812"),
    ],
)
def test_a_holder_reads_as_people_would_say_it(changes: dict[str, object], text: str) -> None:
    (holder,) = refusal_of({"errno": "ENOSPC", "sentence": "full", "holders": [HOLDER | changes]}).holders
    assert str(holder) == text


def test_a_holder_with_fields_missing_still_explains_what_it_can() -> None:
    (holder,) = refusal_of({"errno": "ENOSPC", "sentence": "full", "holders": [{"pid": 9, "later": 1}]}).holders
    assert holder.pid == 9
