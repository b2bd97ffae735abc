"""A regression gate: a suite of checks measured anew, judged against a baseline, and what is to blame."""
