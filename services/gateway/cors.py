"""Which other sites' pages may call the API from a browser (CORS, in the Fetch standard): those that are named."""

from collections.abc import Awaitable, Callable

from aiohttp import web

MAX_AGE_S = 600
"""How long a browser need not ask again."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Cors:
    """A middleware that answers preflights, and a signal that marks every other answer. `origins`: comma-separated."""

    def __init__(self, origins: str):
        self._origins = frozenset(origin.strip().rstrip("/") for origin in origins.split(",") if origin.strip())

    def join(self, application: web.Application) -> None:
        """Become a part of an application that has no routes yet."""
        if self._origins:
            application.middlewares.insert(0, self.__call__)
            application.on_response_prepare.append(self._mark)

    @web.middleware
    async def __call__(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answer what a browser asks before it sends a request; the request itself goes on."""
        asked = request.headers.get("Access-Control-Request-Method")
        if request.method != "OPTIONS" or asked is None or not self._allows(request):
            return await handler(request)
        headers = {
            "Access-Control-Allow-Methods": "GET, POST",
            "Access-Control-Allow-Headers": request.headers.get("Access-Control-Request-Headers", ""),
            "Access-Control-Max-Age": str(MAX_AGE_S),
        }
        return web.Response(status=204, headers=headers)

    async def _mark(self, request: web.Request, response: web.StreamResponse) -> None:
        response.headers.add("Vary", "Origin")
        if self._allows(request):
            origin = "*" if "*" in self._origins else request.headers["Origin"]
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = "X-Request-Id, Retry-After"

    def _allows(self, request: web.Request) -> bool:
        origin = request.headers.get("Origin")
        return origin is not None and ("*" in self._origins or origin in self._origins)
