"""`budwood serve` starts a server that answers about a picture, and leaves nothing behind."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

from tests.vllm import tiny


def test_a_served_model_answers(tmp_path):
    folder, port, before = tiny.save_llava(tmp_path / "llava"), free_port(), processes()
    command = serve(folder, port)
    log = tmp_path / "log.txt"
    with (
        log.open("w") as out,
        subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=os.environ.copy()
        ) as server,
    ):
        try:
            until_healthy(port, server, log)
            said = asked(port, tiny.picture(0))
            assert len(processes() - before) >= 2, "the server and its engine"
            assert said["usage"]["prompt_tokens"] < 16 + 5, said
            assert len(said["choices"][0]["message"]["content"]) > 0
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)
    text = log.read_text(errors="replace")
    assert "BudwoodLlavaForConditionalGeneration" in text
    assert processes() <= before


def test_a_server_that_ends_while_it_starts_is_one_line(tmp_path):
    """The engine, which is a process of its own, finds no weights."""
    folder, port, before = tiny.save_llava(tmp_path / "llava"), free_port(), processes()
    (folder / "model.safetensors").unlink()
    done = subprocess.run(
        serve(folder, port), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert "budwood: error: vllm serve ended with exit code" in done.stderr.splitlines()[-1]
    assert processes() <= before


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve(folder, port):
    """The command that serves a tiny LLaVA."""
    command = [sys.executable, "-m", "budwood.cli", "serve", str(folder), "--keep", "5"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256"]
    command += ["--dtype", "float32", "--block-size", "32", "--enforce-eager"]
    return [*command, "--served-model-name", "tiny"]


def processes():
    """All of vLLM's; a server's engine has a title of its own."""
    command = ["pgrep", "-f", "VLLM::|vllm.entrypoints"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {*done.stdout.split()}


def until_healthy(port, server, log):
    until = time.monotonic() + 240
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(log.read_text(errors="replace")[-3000:])


def asked(port, picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "what is on the left ?"},
    ]
    body = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": content}]}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)
