"""Pages of lists: `?limit=&after=`, and a `Link` header with the URL of the next page.

OpenAI's lists under /v1 have `after` and `has_more`, as its client expects.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

from fastapi import Query, Request

from adapters.errors import InvalidInput

MAX_ALL = 10_000

T = TypeVar("T")

Limit = Annotated[int, Query(ge=1, le=1000, description="the most items on a page")]
AllLimit = Annotated[int, Query(ge=1, le=MAX_ALL, description="the most items on a page; default: the maximum")]
"""The limit of lists that are usually short. Its default is `MAX_ALL`."""
After = Annotated[str | None, Query(max_length=256, description="`next` of the previous page")]
LINK = {"Link": {"schema": {"type": "string"}, "description": 'rel="next": the next page, if there is one'}}
"""The OpenAPI description of the header that `link` returns."""


def link(request: Request, after: object) -> dict[str, str]:
    """Return the header with the URL of the page after `after`, or no header if that is None."""
    if after is None:
        return {}
    url = request.url.include_query_params(after=after)
    return {"Link": f'<{url.path}?{url.query}>; rel="next"'}


def page_of(
    items: Sequence[T], id_of: Callable[[T], str], limit: int, after: str | None
) -> tuple[Sequence[T], str | None]:
    """Return at most `limit` items after the item whose id is `after`, and the `after` of the next page.

    Raise InvalidInput if no item has that id.
    """
    if after is not None:
        place = next((number for number, item in enumerate(items) if id_of(item) == after), None)
        if place is None:
            raise InvalidInput.of("after", "nothing on the list has this id; begin with the first page")
        items = items[place + 1 :]
    page = items[:limit]
    return page, id_of(page[-1]) if len(items) > limit else None
