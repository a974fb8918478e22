"""Where a page of jobs goes on."""

from adapters.errors import InvalidInput, NotFound
from server.training.queue.jobs import Jobs


def check_after(jobs: Jobs, after: str) -> None:
    """Raise InvalidInput where there is no job `after` which a page could begin."""
    try:
        jobs.get(after)
    except NotFound as error:
        raise InvalidInput.of("after", f"{error}; if it was deleted, begin with the first page") from None
