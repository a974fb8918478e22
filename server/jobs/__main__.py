"""`python -m server.jobs ASSIGNMENT`: the process of one attempt at a job (`run_job.py`)."""

import sys

from server.system.memory import loading

with loading():
    from server.jobs.run_job import main

raise SystemExit(main(sys.argv[1]))
