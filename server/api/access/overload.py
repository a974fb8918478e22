"""A request to generate is refused where the queue is full before its body is read: then that costs least.

So is whatever changes something once the server is about to end: it might be cut off in the middle.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from server.api.access.authentication import principal_of
from server.api.access.bodies import drain
from server.api.deps import Services
from server.api.errors.faults import form_of
from server.api.generate.generation import ask_queue
from server.api.routes import Routes
from server.errors import Draining, TryAgain

_READS = frozenset({"GET", "HEAD", "OPTIONS"})


class Overload:
    """Asks for one place; once the body is known, its route asks for as many as it takes."""

    def __init__(self, app: ASGIApp, services: Services, routes: Routes) -> None:
        self.app = app
        self._services = services
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] not in _READS:
            try:
                required = self._routes.find(scope["path"]).methods.get(scope["method"])
                if required is not None and required.queued:
                    ask_queue(self._services.of(principal_of(scope) or self._services.principal), 1)
                elif self._services.engine.draining:
                    raise Draining
            except TryAgain as error:
                await drain(scope, receive)
                await form_of(scope["path"]).of_error(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)
