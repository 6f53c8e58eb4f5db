"""The HTTP application: routes, refusals and the page."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from chronomoe import __version__
from chronomoe.errors import InputError
from chronomoe.pipeline import ChronoMoEPipeline
from chronomoe.serving.config import ServingConfig
from chronomoe.serving.schema import ARROW, JSON, ROUTE, Error, ErrorResponse, ForecastRequest, ForecastResponse
from chronomoe.serving.service import Service

PAGE = {
    "/": ("index.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
SAFE = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def create_app(pipelines: Mapping[str, ChronoMoEPipeline], config: ServingConfig | None = None) -> FastAPI:
    """Make an ASGI application that serves pipelines by name; ``app.state.service`` is what stands behind it.

    Raises:
        InputError: there is no pipeline.
    """
    service = Service(pipelines, config or ServingConfig())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.batcher.close)

    app: FastAPI = FastAPIOffline(
        title="ChronoMoE",
        version=__version__,
        description="Forecasts by the time-series protocol of KServe.",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.service = service
    _describe(app)

    async def refuse(request: Request, error: Exception) -> Response:
        status, headers = 500, {}
        message = "the server failed; its log says why"
        if isinstance(error, HTTPException):
            status, message, headers = error.status_code, str(error.detail), dict(error.headers or {})
        elif isinstance(error, InputError | RequestValidationError):
            status, message = 400, str(error)
        kind = {400: "BadRequestError", 404: "NotFoundError", 429: "TooManyRequestsError", 500: "InternalServerError"}
        body = ErrorResponse(error=Error(code=str(status), message=message, type=kind.get(status, "RequestError")))
        return Response(body.model_dump_json(), status, headers, JSON)

    for error in (HTTPException, InputError, RequestValidationError, Exception):
        app.add_exception_handler(error, refuse)

    app.add_api_route(
        ROUTE,
        service.forecast,
        methods=["POST"],
        tags=["forecast"],
        response_model=ForecastResponse,
        responses={status: {"model": ErrorResponse} for status in (400, 404, 413, 415, 429, 500, 504)},
        openapi_extra={"requestBody": REQUEST_BODY},
    )
    for path, answer, tag in (
        ("/v1/timeseries/models", service.names, "models"),
        ("/v1/models/{name}", service.model, "models"),
        ("/v2/health/live", service.live, "health"),
        ("/v2/health/ready", service.ready, "health"),
        ("/metrics", service.scrape, "metrics"),
    ):
        app.add_api_route(path, answer, tags=[tag])

    def show(name: str, kind: str) -> Callable[[], Response]:
        page = Response((Path(__file__).parent / "page" / name).read_bytes(), headers=SAFE, media_type=kind)
        return lambda: page

    for path, named in PAGE.items():
        app.add_api_route(path, show(*named), include_in_schema=False)

    app.add_middleware(CloseWhenStopping, service=service)
    return app


class CloseWhenStopping:
    """Ends connections after their answer while the server stops, so that clients open their next one elsewhere."""

    def __init__(self, app: Any, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Add ``Connection: close``."""

        async def closing(message: Any) -> None:
            if message["type"] == "http.response.start" and self.service.stopping:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await self.app(scope, receive, closing)


REQUEST_BODY = {
    "required": True,
    "content": {
        JSON: {
            "schema": {"$ref": "#/components/schemas/ForecastRequest"},
            "example": {
                "model": "moe",
                "inputs": [
                    {
                        "type": "univariate_time_series",
                        "name": "sales",
                        "series": [120, 122, 125, None, 130, 133, 135],
                        "frequency": "D",
                        "start_timestamp": "2025-06-05T00:00:00Z",
                    }
                ],
                "options": {"horizon": 4, "quantiles": [0.1, 0.5, 0.9]},
            },
        },
        ARROW: {"schema": {"type": "string", "format": "binary"}},
    },
}


def _describe(app: FastAPI) -> None:
    """Add the request's schema to the OpenAPI document: its body is read by us, not by FastAPI."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document: dict[str, Any] = plain()
        template = "#/components/schemas/{model}"
        _, found = models_json_schema([(ForecastRequest, "validation")], ref_template=template)
        document["components"]["schemas"] |= found["$defs"]
        return document

    app.openapi = openapi  # type: ignore[method-assign]
