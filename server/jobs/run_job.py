"""The process in which one attempt at a job runs: `python -m server.jobs ASSIGNMENT`.

`worker.py` starts the process and renews the lease. The process loads the base, runs `train_job`, `merge_job` or
`evaluate_job`, and stores how the job ended. Success and the new version are stored in one transaction. If another
attempt would fail in the same way, the job fails. Any other failure becomes an exit code: the worker tries the job
again, or exits if the base can't be loaded. It isn't the job's fault if the database or the object store can't be
used. If the disk is full, the worker decides what to do, since other machines may have room.
"""

import ctypes
import logging
import time
from functools import partial

import torch

from adapters.catalog.catalog import Catalog
from adapters.catalog.writes import LatestMoved
from adapters.errors import BytesUnavailable, SmoloraError
from adapters.library import Library
from adapters.names import Viewpoint
from server.config import WorkerSettings
from server.database import WORKER_PATIENCE_SECONDS, connect, records_of
from server.errors import StartupError, TryAgain
from server.jobs.evaluate_job import EvaluationAttempt
from server.jobs.evaluate_spec import EvaluateSpec
from server.jobs.files import JobFiles
from server.jobs.jobs import Jobs
from server.jobs.leases import Claim, LeaseLost, Leases
from server.jobs.merge_job import run_merge
from server.jobs.merge_spec import MergeSpec, read_origin
from server.jobs.pipe import (
    EXIT_DONE,
    EXIT_LATEST_MOVED,
    EXIT_LEFT,
    EXIT_NO_BASE,
    EXIT_NO_DATABASE,
    EXIT_NO_ROOM,
    EXIT_NO_STORE,
    Assignment,
    WorkerLink,
)
from server.jobs.reporter import JobReporter, JobTrace, Leave, beating
from server.jobs.room import require_room
from server.jobs.specs import Spec
from server.jobs.train_job import TrainingAttempt
from server.jobs.yielding import BusyFlag, Yielding
from server.model.base.source import resolve_base
from server.model.base.weights import BaseModel, load_base
from server.model.device import is_out_of_memory, use_threads
from server.model.load import load_on_device, serves_natively
from server.model.native.load import find_library
from server.model.native.model import ROW_FORMAT
from server.model.packed_adapters import PackedAdapters
from server.model.rank_rows import RowLayout
from server.storage.home import Home
from server.storage.places import Storage
from server.storage.reserve import Reserve, is_database_locked
from server.system.memory import keep_freed_memory
from server.telemetry import logs
from server.telemetry.spans import open_tracer

OUT_OF_MEMORY = (
    "the job ran out of memory: set training.packing to false, so that it computes a row at a time, lower "
    "training.max_length or lora.rank, take method lora in the place of full, or have the server leave more of "
    "its GPU to training (SMOLORA_TRAIN_MEMORY)"
)

LONGEST_LOAD = 3600.0
"""The most seconds for fetching a job's rows, and for loading its base. After that the process counts as hung."""

log = logging.getLogger("smolora.job")


def main(argument: str) -> int:
    """Run the attempt that `argument`, the JSON of an Assignment, describes. Return the exit code."""
    assignment = Assignment.from_argument(argument)
    settings = WorkerSettings.model_validate_json(assignment.settings)
    logs.set_up(settings.log_format, job=assignment.job_id)
    link = WorkerLink(assignment)
    keep_freed_memory()
    try:
        database = connect(settings.home, url=settings.database, patience=WORKER_PATIENCE_SECONDS)
    except StartupError as error:
        return _cannot_work(link, "the database can't be opened", error, EXIT_NO_DATABASE)
    storage = Storage.open(settings.home, settings, check=False)
    records = storage.records() if storage.bucket is not None else None
    leases = Leases(database, records or records_of(database, storage.home.adapters))
    claim = Claim(assignment.job_id, assignment.token, assignment.owner)
    reserve, tracer = Reserve(settings.home), open_tracer()
    reporter: JobReporter | None = None
    try:
        jobs = Jobs(database)
        job = jobs.get(claim.job_id)
        files = JobFiles(settings.home, storage.bucket)
        with beating(link.beat, LONGEST_LOAD):
            files.fetch(job.id)
        trace = JobTrace(tracer, job, claim.token, files.directory(job.id))
        with trace.attempt(unless=Leave):
            with trace.phase("load base"), beating(link.beat, LONGEST_LOAD):
                base, native = _load(settings, job.spec)
            viewpoint = Viewpoint(job.project, key_id=job.key_id)
            catalog, store = Catalog(database, of=viewpoint), storage.adapters()
            is_merge = isinstance(job.spec, MergeSpec)
            is_native = serves_natively(settings) if is_merge else native is not None
            if is_native and storage.bucket is None:
                # from here on the store also keeps published adapters in the form that a server loads
                PackedAdapters(store, RowLayout(base.config.shape, ROW_FORMAT))
            library = Library(catalog, store, base.config.shape, base.name, jobs.in_use, base.digest)
            is_on_gpu = base.device.type != "cpu"
            work = None if is_on_gpu else partial(_seconds_of_all, torch.get_num_threads())
            yielding = Yielding(BusyFlag(settings.home).read, settings.train_share, work=work)
            num_parameters = base.weights.num_parameters
            reporter = JobReporter(link, leases, claim, yielding, num_parameters, trace, is_on_gpu=is_on_gpu)
            room = partial(require_room, database, storage, job)
            if isinstance(job.spec, MergeSpec):
                run_merge(job.spec, claim, leases, library, base, reporter, read_origin(job.data), room)
            elif isinstance(job.spec, EvaluateSpec):
                EvaluationAttempt(job.spec, claim, leases, library, base, reporter, storage, native, room).run()
            else:
                TrainingAttempt(job, job.spec, claim, leases, library, base, reporter, storage, native, room).run()
    except Leave:
        return EXIT_LEFT
    except LeaseLost:
        log.warning("the job is no longer this worker's")
        return EXIT_LEFT
    except BytesUnavailable:
        log.warning("the object store can't be used: the job goes back to the queue")
        return EXIT_NO_STORE
    except LatestMoved:
        log.warning("the name's latest version moved each time while it was measured: the job is tried again")
        return EXIT_LATEST_MOVED
    except StartupError as error:
        if reserve.is_disk_full(error):  # the base doesn't fit, for example
            log.exception("the base can't be loaded")
            return EXIT_NO_ROOM
        return _cannot_work(link, "the base can't be loaded", error, EXIT_NO_BASE)
    except Exception as error:
        log.exception("the attempt failed")
        if isinstance(error, TryAgain) or is_database_locked(error):  # the database's disk may be full
            return EXIT_NO_DATABASE
        if reserve.is_disk_full(error):
            return EXIT_NO_ROOM
        if isinstance(error, SmoloraError):
            if reporter is not None:
                reporter.keep_progress()
            leases.fail(claim, str(error))
        elif is_out_of_memory(error):
            leases.fail(claim, OUT_OF_MEMORY)
        else:
            return 1
    finally:
        if tracer is not None:
            tracer.close()
    return EXIT_DONE


def _seconds_of_all(num_threads: int) -> float:
    """Return the seconds that this process would have taken so far if no thread had ever waited for a core."""
    return time.process_time() / num_threads


def _cannot_work(link: WorkerLink, what: str, error: StartupError, exit_code: int) -> int:
    """Report the error to the worker, but not in the job's events, since it may name paths. Return `exit_code`."""
    log.error(what, exc_info=error)
    link.cannot_work(str(error))
    return exit_code


def _load(settings: WorkerSettings, spec: Spec) -> tuple[BaseModel, ctypes.CDLL | None]:
    """Return the base that the settings name, and its native library (None if there is none).

    A merge needs only what describes the base, so the weights stay in their file, and no library is loaded. Raise
    StartupError if the base can't be loaded.
    """
    try:
        directory = resolve_base(settings.model, settings.home, settings.base_dir)
        if isinstance(spec, MergeSpec):
            use_threads(settings.threads)
            return load_base(directory), None
        base = load_on_device(settings, directory, log.info, lambda total: settings.train_memory, trains=True)
        if not settings.native:
            return base, None
        return base, find_library(base, Home(settings.home).native, log.info)
    except StartupError:
        raise
    except Exception as error:
        raise StartupError(repr(error)) from error
