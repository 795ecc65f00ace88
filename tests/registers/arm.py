"""What docs/registers-arm64.md and docs/registers-armv7.md show alike."""

from __future__ import annotations

from collections.abc import Mapping

from hwbpd.core.model import Access, Piece, Pool, Span
from hwbpd.debug_unit import Armed
from hwbpd.fields import Field
from hwbpd_arm import bcr, dscr, linux, mdscr, wcr
from hwbpd_arm.identification import DebugVersion
from hwbpd_arm.profiles import Profile
from tests.registers.writing import Fields, table

READ, WRITE, EXECUTE = Access.READ, Access.WRITE, Access.EXECUTE
READ_WRITE = READ | WRITE
TYPES = {"X": linux.EXECUTE, "R": linux.READ, "W": linux.WRITE, "RW": linux.READ_WRITE}


def user(access: Access, address: int, length: int) -> Armed:
    """A slot as Linux arms it at a user address."""
    pool = Pool.INST if access == EXECUTE else Pool.DATA
    return Armed(Piece(Span(address, length), access, pool), kernel=False)


def fields_of(register: str) -> Fields:
    """The fields of a control register by its name; none for an address, nor where a word is written whole."""
    for prefix, fields in (("DBGBCR", bcr.FIELDS), ("DBGWCR", wcr.FIELDS), ("MDSCR", mdscr.FIELDS)):
        if register.startswith(prefix):
            return fields
    return dscr.FIELDS if register == "DBGDSCR" else ()


def within(fields: Fields, bits: int) -> tuple[Field, ...]:
    """Those below bit ``bits``."""
    return tuple(field for field in fields if field.first_bit + field.width <= bits)


def version_name(version: int | None) -> str:
    """``v8.2`` for 8; ``unknown`` where nobody has told."""
    if version is None:
        return "unknown"
    return DebugVersion(version).name.lower().replace("_memory_mapped", ", memory-mapped").replace("_", ".")


def cpus(profiles: Mapping[str, Profile], usable: Mapping[str, linux.Usable]) -> list[str]:
    """CPUs by name, with what there is and what Linux hands out."""
    rows = []
    for name, profile in profiles.items():
        facts, of_linux = profile.facts, usable[name]
        there_are = f"{facts.breakpoints} + {facts.watchpoints}"
        handed_out = f"{of_linux.breakpoints} + {of_linux.watchpoints}"
        rows.append((f"`{name}`", version_name(facts.debug_version), there_are, handed_out, profile.source))
    return table(("name", "debug version", "BRPs + WRPs", "Linux hands out", "source"), rows)
