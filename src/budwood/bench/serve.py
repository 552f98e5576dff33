"""Requests a second and latency of running servers with OpenAI's chat protocol."""

from __future__ import annotations

import base64
import http.client
import io
import json
import statistics
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Any

from budwood.checks import need_at_least, need_seed
from budwood.errors import InputError, first_line
from budwood.records import Row

_TIMEOUT_S = 600.0
_WORDS = ("left", "right", "top", "bottom", "middle", "back", "front", "corner")


@dataclass(frozen=True)
class Server:
    """A server under measurement.

    Attributes:
        name: what its rows are called, such as ``"keep 0.1"``.
        url: such as ``"http://127.0.0.1:8000"``.
    """

    name: str
    url: str

    @classmethod
    def parse(cls, text: str) -> Server:
        """Read ``NAME=URL``.

        Raises:
            InputError: it has another form, or the URL is not an http one.
        """
        name, equals, url = text.partition("=")
        parts = urllib.parse.urlsplit(url)
        if not equals or not name or parts.scheme != "http" or not parts.hostname:
            raise InputError(f"server {text!r}; give NAME=URL, such as full=http://127.0.0.1:8000")
        return cls(name, url.rstrip("/"))

    def call(self, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        """Send a request and return the response, of which nothing is read yet.

        Raises:
            InputError: the server does not answer, or answers with an error.
        """
        parts = urllib.parse.urlsplit(self.url)
        assert parts.hostname is not None
        connection = http.client.HTTPConnection(
            parts.hostname, parts.port or 80, timeout=_TIMEOUT_S
        )
        try:
            text = None if body is None else json.dumps(body)
            headers = {"Content-Type": "application/json"}
            connection.request("GET" if body is None else "POST", parts.path + path, text, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise InputError(
                f"{self.url} does not answer ({first_line(error)}); start it with budwood serve"
            ) from error
        if response.status != 200:
            said = response.read(500).decode(errors="replace")
            connection.close()
            raise InputError(f"{self.url}{path} answered {response.status}: {said}")
        return response

    def model(self) -> str:
        """The name of the model that it serves."""
        with self.call("/v1/models") as response:
            return json.load(response)["data"][0]["id"]

    def version(self) -> str | None:
        """The version of vLLM that it runs; None if it does not tell one."""
        try:
            with self.call("/version") as response:
                return json.load(response)["version"]
        except (InputError, ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class ServeConfig:
    """What is sent.

    Attributes:
        concurrency: requests under way at the same time, one number a row.
        pictures: ``"same"``: one picture throughout; ``"many"``: another one each time.
        questions: the same for questions.
        n_requests: of each row; at least as many as are under way at the same time.
        new_tokens: tokens of an answer.
        side: of a picture in pixels.
        seed: of pictures.

    Raises:
        InputError: a value is out of range.
    """

    concurrency: tuple[int, ...] = (1, 4, 16)
    pictures: tuple[str, ...] = ("same", "many")
    questions: tuple[str, ...] = ("same", "many")
    n_requests: int = 32
    new_tokens: int = 16
    side: int = 336
    seed: int = 0

    def __post_init__(self) -> None:
        need_at_least(1, n_requests=self.n_requests, new_tokens=self.new_tokens, side=self.side)
        for number in self.concurrency:
            need_at_least(1, concurrency=number)
        need_seed(self.seed)
        for name, values in (("pictures", self.pictures), ("questions", self.questions)):
            for value in values:
                if value not in ("same", "many"):
                    raise InputError(f"{name}={value!r}; give same, many, or both with a comma")


@dataclass(frozen=True)
class Answer:
    """When an answer came, in seconds from its request on, and how long its prompt was."""

    first_s: float
    total_s: float
    n_prompt: int


def measure(servers: Sequence[Server], config: ServeConfig) -> list[Row]:
    """Send the same requests to each server, one setting after the other.

    The servers take turns within a setting, so that a busy machine hits all alike. Before its
    requests each row sends one of its own kind, which no cache helps with later.

    Raises:
        InputError: a server does not answer, or answers with an error.
    """
    served = {
        server.name: {
            "server": server.name,
            "model": server.model(),
            "version": server.version(),
        }
        for server in servers
    }
    rows, settings = [], product(config.concurrency, config.pictures, config.questions)
    for setting, (concurrency, pictures, questions) in enumerate(settings):
        first = config.seed + (setting + 1) * 10_000
        n_requests = max(config.n_requests, concurrency)
        bodies = list(_bodies(config, n_requests, pictures, questions, first))
        for server in servers:
            model = {"model": served[server.name]["model"]}
            ask(server, next(_bodies(config, 1, "many", "many", first + 5_000)) | model)
            started = time.perf_counter()
            with ThreadPoolExecutor(concurrency) as pool:
                answers = list(pool.map(lambda body, s=server, m=model: ask(s, body | m), bodies))
            wall_s = time.perf_counter() - started
            setup = {"pictures": pictures, "questions": questions, "concurrency": concurrency}
            rows.append({**served[server.name], **setup, **_row(answers, wall_s)})
    return rows


def _row(answers: Sequence[Answer], wall_s: float) -> Row:
    totals = sorted(answer.total_s for answer in answers)
    return {
        "n_requests": len(answers),
        "requests_per_s": len(answers) / wall_s,
        "first_token_ms": 1e3 * statistics.median(answer.first_s for answer in answers),
        "total_ms": 1e3 * statistics.median(totals),
        "slow_ms": 1e3 * totals[-(-95 * len(totals) // 100) - 1],
        "n_prompt": round(statistics.mean(answer.n_prompt for answer in answers)),
    }


def ask(server: Server, body: dict[str, Any]) -> Answer:
    """Send one request and read its answer as it streams.

    Raises:
        InputError: the server does not answer, or without any token.
    """
    started, first, n_prompt = time.perf_counter(), None, 0
    with server.call("/v1/chat/completions", body) as response:
        for line in response:
            data = line.strip().removeprefix(b"data: ")
            if not data.startswith(b"{"):
                continue
            event = json.loads(data)
            n_prompt = (event.get("usage") or {}).get("prompt_tokens", n_prompt)
            delta = (event.get("choices") or [{}])[0].get("delta") or {}
            if first is None and "content" in delta and delta.get("role") is None:
                first = time.perf_counter()
    if first is None:
        raise InputError(f"{server.url} ended its answer without any token")
    return Answer(first - started, time.perf_counter() - started, n_prompt)


def _bodies(
    config: ServeConfig, n_requests: int, pictures: str, questions: str, first: int
) -> Iterator[dict[str, Any]]:
    for number in range(n_requests):
        picture = _picture(config.side, first + (number if pictures == "many" else 0))
        place = number if questions == "many" else 0
        word = _WORDS[place % len(_WORDS)]
        yield {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": picture}},
                        {"type": "text", "text": f"What is at the {word} ({first + place})?"},
                    ],
                }
            ],
            "max_tokens": config.new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }


def _picture(side: int, seed: int) -> str:
    """A picture of coloured squares as a data URL."""
    import numpy as np
    from PIL import Image

    squares = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(squares).resize((side, side), Image.Resampling.NEAREST).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
