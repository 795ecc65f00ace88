"""Of a simulated machine a peer may have what a kernel with default settings would let it have."""

from __future__ import annotations

import os

import pytest

from hwbpd.core.errors import NotPermitted
from hwbpd.credentials import Credentials
from hwbpd.simulated_rights import CAP_PERFMON, CAP_SYS_ADMIN, SimulatedPermission
from hwbpd.warden import Permission, Question

OURS = os.getresuid(), os.getresgid()
OTHERS = (60001, 60001, 60001), (60001, 60001, 60001)
THREAD = Question(tid=1000, kernel=False)
KERNEL_HITS = Question(tid=1000)
CPU_WIDE = Question(kernel=False)
KERNEL_ADDRESS = Question(tid=1000, kernel_address=True)
EVERYTHING = [THREAD, KERNEL_HITS, CPU_WIDE, KERNEL_ADDRESS]


def somebody(ids: tuple[tuple[int, int, int], tuple[int, int, int]] = OURS, *, effective: int = 0) -> Credentials:
    return Credentials(
        pid=1,
        uids=ids[0],
        gids=ids[1],
        groups=(),
        effective=effective,
        permitted=effective,
        user_namespace=1,
        in_our_user_namespace=True,
        in_our_pid_namespace=True,
    )


def allowed(credentials: Credentials) -> list[Question]:
    permission: Permission = SimulatedPermission()
    found = []
    for question in EVERYTHING:
        try:
            permission.check(credentials, question)
            found.append(question)
        except NotPermitted:
            pass
    return found


def test_the_daemons_own_user_may_have_threads_in_user_mode() -> None:
    assert allowed(somebody()) == [THREAD]


def test_others_may_have_nothing() -> None:
    assert allowed(somebody(OTHERS)) == []
    assert allowed(somebody((OURS[0], OTHERS[1]))) == [], "nor who has only the uid"


def test_capabilities_lift_what_they_lift_in_the_kernel() -> None:
    assert allowed(somebody(OTHERS, effective=1 << CAP_PERFMON)) == [THREAD, KERNEL_HITS, CPU_WIDE]
    assert allowed(somebody(OTHERS, effective=1 << CAP_SYS_ADMIN)) == EVERYTHING


def test_capabilities_of_another_user_namespace_count_for_nothing() -> None:
    elsewhere = Credentials(
        pid=1,
        uids=OTHERS[0],
        gids=OTHERS[1],
        groups=(),
        effective=2**41 - 1,
        permitted=2**41 - 1,
        user_namespace=2,
        in_our_user_namespace=False,
        in_our_pid_namespace=True,
    )
    assert allowed(elsewhere) == []


@pytest.mark.parametrize(
    ("who", "question", "says"),
    [
        (OURS, KERNEL_HITS, "user mode only"),
        (OURS, CPU_WIDE, "ask for a thread"),
        (OURS, KERNEL_ADDRESS, "CAP_SYS_ADMIN"),
        (OTHERS, THREAD, f"uid {OURS[0][1]}.*you are uid 60001"),
    ],
)
def test_a_refusal_names_the_rule(
    who: tuple[tuple[int, int, int], tuple[int, int, int]], question: Question, says: str
) -> None:
    with pytest.raises(NotPermitted, match=says):
        SimulatedPermission().check(somebody(who), question)
