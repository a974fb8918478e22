"""A worker process with short timeouts, whose jobs are run by a command: HOME PARENT LEASE COMMAND…"""

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

from server.database import connect
from server.jobs.jobs import Jobs
from server.jobs.leases import Leases
from server.jobs.pipe import end_with_parent
from server.jobs.worker import Timing, Worker

FAST = Timing(
    lease=30.0,
    heartbeat=0.2,
    directive=0.05,
    poll=0.05,
    hung=100.0,
    leave=30.0,
    pause=30.0,
    max_crash_delay=0.05,
    trouble=0.1,
    hindered=0.1,
)

if __name__ == "__main__":
    home, parent, timing = Path(sys.argv[1]), int(sys.argv[2]), replace(FAST, lease=float(sys.argv[3]))
    end_with_parent(parent)
    engine = connect(home)
    settings, command = json.dumps({"home": str(home)}), sys.argv[4:]
    worker = Worker(home, Jobs(engine), Leases(engine), settings, command=command, timing=timing, parent=parent)
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    worker.run()
