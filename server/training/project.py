"""What a project has beside adapters: whoever deletes it asks here first."""

from adapters.errors import Conflict
from adapters.viewpoint import Viewpoint
from server.counted import counted
from server.storage import Storage
from server.training.data.datasets import DatasetStore
from server.training.data.files import FileStore
from server.training.queue.jobs import Jobs


def refuse_with_uploads(storage: Storage, jobs: Jobs, project: str) -> None:
    """Raises Conflict where the project has data sets, files, or jobs that haven't ended. Blocks on disk."""
    datasets, files = storage.home.datasets(project), storage.home.files(project)
    has = {
        "data set": len(DatasetStore(datasets, bucket=storage.at(datasets)).ids()),
        "file": len(FileStore(files, bucket=storage.at(files)).ids()),
        "unfinished job": jobs.of(Viewpoint(project)).num_unfinished(),
    }
    if told := [counted(number, what) for what, number in has.items() if number]:
        raise Conflict(f"{project} has {', '.join(told)}: delete or cancel them first")
