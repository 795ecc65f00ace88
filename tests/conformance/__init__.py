"""Whoever speaks the protocol of docs/protocol.md: what it says as data, and clients of several kinds on one daemon."""
