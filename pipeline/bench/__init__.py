"""Engines timed against each other and against the machine; `throughput.py` is the way in."""
