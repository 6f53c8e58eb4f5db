"""From a request to its answer: what stands behind the routes."""

import asyncio
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import HTTPException, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import ClientDisconnect

from chronomoe.errors import InputError
from chronomoe.pipeline import ChronoMoEPipeline
from chronomoe.serving import answers, arrow
from chronomoe.serving.asked import Question, from_json
from chronomoe.serving.batching import Batcher
from chronomoe.serving.config import ServingConfig
from chronomoe.serving.metrics import Metrics
from chronomoe.serving.models import Answer, ModelSet, ServedModel
from chronomoe.serving.schema import ARROW, JSON
from chronomoe.serving.schema import read_request as parse_json
from chronomoe.serving.waiting import Job, QueueFull

NAME = re.compile(r"[\w.-]+")
LARGE = 2**17
"""Bytes from which a body is read on another thread, so that other requests go on."""


class Service:
    """Models, their queue and counters behind the routes of an app."""

    def __init__(self, pipelines: Mapping[str, ChronoMoEPipeline], config: ServingConfig) -> None:
        if not pipelines:
            raise InputError("a server needs at least one model, got none; name a checkpoint")
        if wrong := [name for name in pipelines if not NAME.fullmatch(name)]:
            raise InputError(
                f"a model's name has letters, digits, '.', '_' and '-', got {wrong[0]!r}; write name=folder"
            )
        self.config, self.metrics = config, Metrics()
        counts = self.metrics.count_experts
        self.models = ModelSet({name: ServedModel(name, one, count_experts=counts) for name, one in pipelines.items()})
        self.batcher = Batcher(self.models.run, config, observe=self._observe)
        self.stopping = False
        self.accepted, self.answered = 0, 0

    def find(self, name: str) -> ServedModel:
        """Return a model by name; no name reaches a file.

        Raises:
            HTTPException: there is none, with status 404.
        """
        if name not in self.models.models:
            known = ", ".join(self.models.models)
            raise HTTPException(404, f"no model {name[:60]!r} is served here. Available: {known}")
        return self.models[name]

    def _observe(self, jobs: Sequence[Job], begin: float, seconds: float) -> None:
        self.metrics.observe(jobs, begin, seconds)
        self.metrics.queue.set(self.batcher.rows)

    async def forecast(self, request: Request) -> Response:
        """Forecast series, in JSON or as an Arrow stream; `mean_forecast` is the median."""
        begin, model, status = time.monotonic(), "", 500
        try:
            async with asyncio.timeout(self.config.timeout_s):
                body = await self._body(request)
                question = await self._read(request.headers.get("content-type", ""), body)
                model = self.find(question.model).name
                found, usage = await self._ask(question)
            accept = request.headers.get("accept", "*/*")
            if ARROW in accept or (JSON not in accept and request.headers["content-type"].startswith(ARROW)):
                response = Response(arrow.write(question, found), media_type=ARROW)
            else:
                response = Response(answers.as_json(question, found, **usage), media_type=JSON)
            self.answered += 1
            status = 200
            return response
        except TimeoutError:
            status = 504
            raise HTTPException(
                504, f"the request was not done within {self.config.timeout_s:g} s; send fewer series or try later"
            ) from None
        except QueueFull as full:
            status = 429
            raise HTTPException(429, str(full), headers={"Retry-After": str(full.seconds)}) from None
        except HTTPException as refused:
            status = refused.status_code
            raise
        except InputError:
            status = 400
            raise
        except ClientDisconnect:
            status = 499  # nobody reads this
            return Response(status_code=status)
        finally:
            self.metrics.requests.labels(model, status).inc()
            self.metrics.latency.observe(time.monotonic() - begin)

    async def _body(self, request: Request) -> bytes:
        most = int(self.config.max_body_mb * 2**20)
        said = request.headers.get("content-length", "")
        too_long = HTTPException(413, f"a body may have at most {self.config.max_body_mb:g} MiB; send fewer series")
        if said.isdecimal() and int(said) > most:
            raise too_long
        if request.headers.get("content-encoding", "identity") != "identity":
            raise HTTPException(415, "a compressed body is not read here; send it as it is")
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise too_long
        return bytes(body)

    async def _read(self, kind: str, body: bytes) -> Question:
        kind = kind.partition(";")[0].strip().lower()
        if kind not in (JSON, ARROW):
            raise HTTPException(415, f"a body is {JSON} or {ARROW}, got {kind[:60]!r}")

        def read() -> Question:
            return from_json(parse_json(body)) if kind == JSON else arrow.read(body, most=self.config.max_series)

        return await asyncio.to_thread(read) if len(body) > LARGE else read()

    async def _ask(self, question: Question) -> tuple[list[Answer], dict[str, int]]:
        model, loop, mark = self.models[question.model], asyncio.get_running_loop(), object()
        jobs = [
            Job(model.key(task), len(task.context), (model.name, task), mark, loop.create_future())
            for task in question.tasks(self.config)
        ]
        rows = sum(job.rows for job in jobs)
        if rows > self.config.queue:
            raise InputError(f"a request may have at most {self.config.queue} rows here, got {rows}; send less at once")
        self.batcher.submit(jobs)
        self.metrics.queue.set(self.batcher.rows)
        self.accepted += 1
        tasks = [job.task[1] for job in jobs]
        limit = self.models[question.model].pipeline.model_context_length
        usage = {
            "read": sum(len(task.context) * model.patches(min(task.context.shape[1], limit)) for task in tasks),
            "written": sum(task.n_targets * model.patches(task.horizon) for task in tasks),
        }
        return await asyncio.gather(*(job.future for job in jobs)), usage

    async def names(self) -> list[str]:
        """Names of the models."""
        return list(self.models.models)

    async def model(self, name: str) -> dict[str, Any]:
        """Context, horizon of one pass, quantile levels and experts of a model."""
        return self.find(name).description

    async def live(self) -> dict[str, bool]:
        """Whether the process answers."""
        return {"live": True}

    async def ready(self, response: Response) -> dict[str, bool]:
        """Whether new requests should come here; status 503 while the server stops."""
        response.status_code = 503 if self.stopping else 200
        return {"ready": not self.stopping}

    async def scrape(self) -> Response:
        """Metrics for Prometheus."""
        return Response(self.metrics.scrape(), media_type=CONTENT_TYPE_LATEST)
