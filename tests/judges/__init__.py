"""Judges: long differential runs that ask somebody independent of us, and a short run of each for every day."""
