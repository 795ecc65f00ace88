"""Tests on real debug registers. Each holds the host lock, and leaves every slot as free as it found it."""
