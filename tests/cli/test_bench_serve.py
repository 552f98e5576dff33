"""`budwood bench serve` against a server that answers as vLLM does."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from budwood import records


class Fake(BaseHTTPRequestHandler):
    seen: list[dict]
    version: str | None = "0.32.0"

    def do_GET(self):
        if self.path == "/version":
            self.answer(json.dumps({"version": self.version} if self.version else "?").encode())
        else:
            self.answer(json.dumps({"data": [{"id": "tiny"}]}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(body)
        events = [
            {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
            {"choices": [{"delta": {"content": "a"}}]},
            {"choices": [{"delta": {"content": "b"}}]},
            {"choices": [], "usage": {"prompt_tokens": 40}},
        ]
        time.sleep(0.02)
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        self.answer((text + "data: [DONE]\n\n").encode())

    def answer(self, content: bytes):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """A server's URL and the requests that it got."""
    kind = type("Own", (Fake,), {"seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", kind.seen
        running.shutdown()
        thread.join()


def test_a_record_and_a_table(budwood, server, tmp_path):
    url, seen = server
    done = budwood(
        "bench", "serve", f"pruned={url}", "--concurrency", "1,5", "--requests", 4,
        "--pictures", "many", "--side", 24, "--out", tmp_path / "serve.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    record = records.read(tmp_path / "serve.json")
    assert [(row["questions"], row["concurrency"]) for row in record.rows] == [
        ("same", 1),
        ("many", 1),
        ("same", 5),
        ("many", 5),
    ]
    for row in record.rows:
        assert row["n_requests"] == max(4, row["concurrency"]) and row["n_prompt"] == 40
        assert row["model"] == "tiny" and row["version"] == "0.32.0"
        assert 20 <= row["first_token_ms"] <= row["total_ms"] <= row["slow_ms"]
    assert record.rows[2]["requests_per_s"] > record.rows[0]["requests_per_s"]
    assert len(seen) == 2 * (4 + 1) + 2 * (5 + 1)
    of_first_row = seen[1:5]
    pictures = {body["messages"][0]["content"][0]["image_url"]["url"] for body in of_first_row}
    texts = {body["messages"][0]["content"][1]["text"] for body in of_first_row}
    assert len(pictures) == 4 and len(texts) == 1
    assert all(body["model"] == "tiny" and body["stream"] for body in seen)
    shown = budwood("bench", "show", tmp_path / "serve.json")
    assert "| pruned | many | same | 1 |" in shown.stdout


def test_a_server_that_tells_no_version_is_measured(budwood, server, monkeypatch):
    url, _ = server
    monkeypatch.setattr(Fake, "version", None)
    few = ["--concurrency", "1", "--requests", 1, "--pictures", "same", "--questions", "same"]
    done = budwood("bench", "serve", f"other={url}", *few, "--side", 24, "--json")
    assert done.exit_code == 0, done.output
    assert [row["version"] for row in json.loads(done.stdout)["rows"]] == [None]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["http://127.0.0.1:1"], "give NAME=URL"),
        (["full=https://127.0.0.1:1"], "give NAME=URL"),
        (["full=http://127.0.0.1:1"], "does not answer"),
        (["full=http://127.0.0.1:1", "--pictures", "few"], "give same, many"),
        (["full=http://127.0.0.1:1", "--concurrency", "0"], "below 1"),
    ],
)
def test_bad_input_is_one_line(budwood, arguments, reason):
    done = budwood("bench", "serve", *arguments)
    assert done.exit_code == 2
    assert reason in done.stderr and done.stderr.count("\n") == 1
