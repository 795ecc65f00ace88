"""CPU lists are read as sysfs writes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwbpd.core.model import format_cpus
from hwbpd_linux.cpus import parse_cpus


@given(st.sets(st.integers(0, 300)))
def test_a_list_is_read_back_as_it_was_written(cpus: set[int]) -> None:
    ascending = tuple(sorted(cpus))

    assert parse_cpus(format_cpus(ascending) + "\n") == ascending


def test_what_is_no_list_is_refused() -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        parse_cpus("0-x")
