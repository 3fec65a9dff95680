"""What a job may be called: files, keys in storage and paths are named after it."""

#: Matches the whole of a job's id.
JOB_ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
