"""Hostile input against a daemon that must go on: `python -m tests.fuzz`."""
