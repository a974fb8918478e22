"""`python -m server.jobs ASSIGNMENT`: the process of one attempt at a job (`run_job.py`)."""

import sys

from server.system.memory import exempt_from_gc

with exempt_from_gc():
    from server.jobs.run_job import main

raise SystemExit(main(sys.argv[1]))
