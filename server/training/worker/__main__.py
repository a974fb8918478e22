"""`python -m server.training.worker ASSIGNMENT`: the process of one attempt at a job (`run_job.py`)."""

import sys

from server.loading import loading

with loading():
    from server.training.worker.run_job import main

raise SystemExit(main(sys.argv[1]))
