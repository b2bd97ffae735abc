"""One module per job: a composed config becomes one pipeline call. `pagemill JOB ...` runs `jobs/JOB.py`."""
