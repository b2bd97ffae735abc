"""Scoring protocols, one a file; `pipeline.windows.open_protocol` picks."""
