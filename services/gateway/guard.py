"""What every HTTP request passes: limits, API keys, and the translation of every error into OpenAI's shape."""

import hmac
import logging
from collections.abc import Awaitable, Callable, Sequence

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from services.gateway.call import StreamLost
from services.gateway.metrics import Metrics
from services.gateway.responses import error_body, error_type
from shared.config import GatewaySettings
from shared.errors import RequestRejected
from shared.service import check_bind

log = logging.getLogger(__name__)

RETRY_AFTER_S = 1
OPERATORS = "/v1/fault_tolerance/"
PROBES = ("/live", "/health", "/metrics")
"""Always answered."""
_CODES = {
    400: "invalid_http",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    417: "expectation_failed",
}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Guard:
    """The application's one middleware.

    `keys`: those of which a client must have one for paths under /v1; empty: no check. `operator`: what opens the paths
    for operators, and all others too. Without one, these are open where no keys are, and closed to all where some are.
    """

    def __init__(self, keys: Sequence[str], operator: str, metrics: Metrics):
        self._keys = [key.encode() for key in keys]
        self._operator = operator.encode()
        self._metrics = metrics
        self.is_full: Callable[[], bool] = lambda: False
        """Whether more requests are in work than may be."""

    @web.middleware
    async def __call__(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Pass the request on, or answer with an error."""
        response = await self._answer(request, handler)
        self._metrics.responses.labels(str(response.status)).inc()
        return response

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if self.is_full() and request.path not in PROBES:
                response = self.refuse(503, "too many requests in work", code="overloaded")
                response.force_close()
                return response
            if request.path.startswith(OPERATORS):
                self.check_operator(request)
            elif request.path.startswith("/v1/") and self._keys and not self._has(request, *self._keys):
                raise _unauthorised("Incorrect API key provided")
            return await handler(request)
        except RequestRejected as error:
            return self.refuse(error.status, str(error), code=error.code, param=error.param)
        except StreamLost as error:
            return self.refuse(error.status, str(error), code="stream_lost")
        except web.HTTPException as error:
            headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
            message = f"{request.method} {request.path}: {error.reason}"[:300]
            return self.refuse(error.status, message, headers=headers)
        except ConnectionError:
            raise
        except Exception as error:
            log.exception("error in %s %s", request.method, request.path)
            return self.refuse(500, f"internal error: {type(error).__name__}", code="internal_error")

    def refuse(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> web.Response:
        """An error in OpenAI's shape; those that pass say when to try again."""
        code = code or _CODES.get(status)
        self._metrics.errors.labels(code or str(status)).inc()
        headers = dict(headers or {})
        if status in (429, 503):
            headers.setdefault("Retry-After", str(RETRY_AFTER_S))
        if status == 401:
            headers.setdefault("WWW-Authenticate", "Bearer")
        body = error_body(message, kind=error_type(status), code=code, param=param)
        return web.json_response(body, status=status, headers=headers)

    def check_operator(self, request: web.Request) -> None:
        """Raise RequestRejected unless the request comes from an operator."""
        if self._operator and not self._has(request):
            raise _unauthorised("this is for operators: their token is needed")
        if self._keys and not self._operator:
            raise RequestRejected(
                "this is for operators, of whom this gateway has none: GHOST_OPERATOR_TOKEN is not set",
                status=403,
                code="operators_only",
            )

    def _has(self, request: web.Request, *keys: bytes) -> bool:
        """Whether a request has one of these keys, or the operators' token."""
        scheme, _, text = request.headers.get("Authorization", "").partition(" ")
        given = text.encode(errors="replace")
        known = (*keys, self._operator) if self._operator else keys
        matches = [hmac.compare_digest(given, key) for key in known]  # all: the same time, whichever it is
        return scheme.lower() == "bearer" and any(matches)


def _unauthorised(message: str) -> RequestRejected:
    return RequestRejected(message, status=401, code="invalid_api_key")


def client_keys(settings: GatewaySettings) -> list[str]:
    """The keys of which clients need one. Raises ConfigError where others can reach us and none is set."""
    given = settings.api_keys.get_secret_value() if settings.api_keys else ""
    check_bind(settings.host, given.strip(" ,"), "API keys (GHOST_API_KEYS)")
    return [key.strip() for key in given.split(",") if key.strip()]


def http_log() -> logging.Logger:
    """aiohttp's log, with one line for what is not HTTP: in aiohttp's own traceback its bytes may show a key."""
    logger = logging.getLogger("services.gateway.http")
    if not logger.filters:
        logger.addFilter(_without_bytes)
    return logger


def _without_bytes(record: logging.LogRecord) -> bool:
    if record.exc_info and isinstance(record.exc_info[1], HttpProcessingError):
        record.levelno, record.levelname = logging.INFO, "INFO"
        record.msg, record.args = "not HTTP: %s", (type(record.exc_info[1]).__name__,)
        record.exc_info = record.exc_text = None
    return True
