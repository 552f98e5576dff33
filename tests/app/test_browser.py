"""The page in headless Chromium; `make test-app` installs gradio and playwright and runs this."""

from __future__ import annotations

import json
import shutil
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from budwood.app import Sources, points, prune, serve
from tests import tiny_vlm
from tests.app import parts
from tests.points import shipped

pytest.importorskip("gradio", reason="gradio is not installed (make test-app)")
browsers = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (make test-app)"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("there is no chromium on PATH", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WAIT = 120_000
"""Milliseconds at most for a step; tiny models need a second, a busy machine many."""
UNNAMED = """() => [...document.querySelectorAll('input, textarea, select, button, [role=tab]')]
  .filter(e => e.offsetParent !== null && !e.disabled)
  .filter(e => !(e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.title
    || e.innerText?.trim() || [...(e.labels || [])].some(l => l.innerText.trim())))
  .map(e => e.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The page with tiny models."""
    folder = tmp_path_factory.mktemp("page")
    np.save(folder / "frame.npy", points.room().xyz)
    with pytest.MonkeyPatch.context() as patch:
        shipped.tiny(folder, patch)
        patch.setattr("budwood.app.models.STEPS", 2)
        patch.setattr("budwood.app.models.COUNTS", (16,))
        vlm = str(tiny_vlm.save_llava(folder / "vlm"))
        sources = Sources(vlm, tuned=str(parts.tuned(folder / "tuned")))
        page = serve(sources, port=0, blocking=False)
        yield page.local_url.rstrip("/"), folder
        page.close()


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    with browsers.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=CHROMIUM,
            args=ARGUMENTS,
            headless=True,
        )
        context.set_default_timeout(WAIT)
        yield context
        context.close()


@pytest.fixture
def page(context, address):
    """The page, open; afterwards nothing has been asked of another host."""
    url, _ = address
    asked = []
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    page.wait_for_function("document.querySelector('textarea')?.value.endsWith('?')")
    yield page
    page.close()
    assert [one for one in asked if not one.startswith((url, "data:", "blob:"))] == []


def open_tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def upload(page, label, file):
    block = page.locator(f"div.block:has(label:has-text('{label}')):visible").last
    block.locator("input[type=file]").set_input_files(file)


def test_the_front_end_is_kept_by_the_browser(context, address):
    """And the first view loads no 3D figures."""
    kept = {}
    page = context.new_page()
    page.on("response", lambda one: kept.update({one.url: one.headers.get("cache-control", "")}))
    page.goto(address[0])
    page.get_by_role("button", name="Answer").wait_for()
    page.close()
    files = {url: rule for url, rule in kept.items() if "/assets/" in url}
    assert len(files) > 20 and not any("plotly" in url.lower() for url in files)
    assert [url for url, rule in files.items() if "immutable" not in rule] == []


def test_prune(page):
    assert page.get_by_role("img", name="the layer kept").count() == 0
    page.get_by_role("button", name="Answer").click()
    page.get_by_role("table", name="Answers, and time to the first token").wait_for()
    assert page.get_by_role("img", name="the layer kept").is_visible()
    page.get_by_label("relevance").check()
    page.get_by_role("img", name="the layer relevance").wait_for()
    page.get_by_role("button", name="Several methods side by side").click()
    page.get_by_role("button", name="Compare").click()
    page.get_by_role("img", name="visual tokens that scope keeps").wait_for()


def test_two_visitors_at_once(context, page, address):
    other = context.new_page()
    other.goto(address[0])
    for one, percent in ((page, "25"), (other, "50")):
        one.get_by_label("number input for Visual tokens").fill(percent)
        one.get_by_role("button", name="Answer").click()
    for one, counted in ((page, "4 of 16"), (other, "8 of 16")):
        one.get_by_role("img", name=f"the layer kept, adav+, {counted}").wait_for()
    other.close()


def test_a_question_by_keyboard(page):
    page.get_by_label("Question").focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("Is it red ?")
    page.keyboard.press("Enter")
    page.get_by_role("table", name="Answers, and time to the first token").wait_for()


def test_a_slider_answers_when_it_has_moved(page, monkeypatch):
    budgets = []

    def noting(models, picture, question, method, percent):
        budgets.append(percent)
        return answer(models, picture, question, method, percent)

    answer = prune.answer
    monkeypatch.setattr(prune, "answer", noting)
    budget = page.get_by_label("number input for Visual tokens")
    budget.focus()
    page.keyboard.press("Tab")
    page.wait_for_timeout(1500)
    assert budgets == []
    budget.fill("50")
    page.keyboard.press("Tab")
    page.get_by_role("img", name="8 of 16").wait_for()
    assert budgets == [50]


def test_errors_are_toasts(page, address, tmp_path):
    page.get_by_label("Question").fill(" ")
    page.get_by_role("button", name="Answer").click()
    page.get_by_text("the question is empty; ask something about the picture").wait_for()
    open_tab(page, "Points")
    (tmp_path / "<b>x.ply").write_text("no cloud")
    upload(page, "Cloud (instead", tmp_path / "<b>x.ply")
    page.get_by_test_id("toast-text").filter(has_text="x.ply").wait_for()
    said = page.get_by_test_id("toast-text").last.inner_text()
    assert str(address[1]) not in said and "/" not in said


def test_points(page, address):
    open_tab(page, "Points")
    upload(page, "Cloud (instead", parts.cloud(address[1]))
    page.get_by_role("columnheader", name="before adaptation").wait_for()
    page.locator(".js-plotly-plot:visible").first.wait_for()
    page.get_by_role("button", name="Adapt the encoder").click()
    page.get_by_role("columnheader", name="after", exact=True).wait_for()
    open_tab(page, "A frame of a sensor")
    upload(page, "Frame (without", address[1] / "frame.npy")
    page.get_by_role("button", name="Find the objects").click()
    page.get_by_role("table", name=f"{len(points.ROOM)} objects").wait_for()


def test_an_adaptation_that_is_stopped(page, monkeypatch):
    def slow(models, progress):
        for step in range(1_000):
            progress(step, 1_000)
            time.sleep(0.1)

    monkeypatch.setattr(points, "adapt", slow)
    open_tab(page, "Points")
    stop = page.get_by_role("button", name="Stop", exact=True)
    for _ in range(2):  # it can be started again
        page.get_by_role("button", name="Adapt the encoder").click()
        page.get_by_text("adapting").wait_for()
        stop.click()
        page.get_by_test_id("toast-text").filter(has_text="the encoder is as it was").wait_for()
        page.get_by_label("Close").last.click()
        browsers.expect(stop).to_be_disabled()


def test_tune(page, tmp_path):
    open_tab(page, "Tune")
    page.get_by_role("button", name="Reply").click()
    page.locator(".budwood-tokens span").first.wait_for()
    row = {"method": "slim", "lr": 1e-2, "target": 0.5, "kl_chat": 0.2}
    about = {"name": "bench tune", "command": "", "seed": 0, "config": {}, "format": 1}
    (tmp_path / "record.json").write_text(json.dumps({**about, "rows": [row]}))
    upload(page, "Record", tmp_path / "record.json")
    page.get_by_role("table", name="Numbers of the record").wait_for()
    page.locator(".js-plotly-plot:visible .main-svg").first.wait_for()


def test_every_control_has_a_name(page):
    found = {}
    for tab in ("Prune", "Points", "A frame of a sensor", "Tune"):
        open_tab(page, tab)
        page.wait_for_timeout(500)
        found[tab] = page.evaluate(UNNAMED)
    assert found == {tab: [] for tab in found}
    assert page.evaluate("[...document.images].filter(i => !i.hasAttribute('alt')).length") == 0


# Without a browser


def status(url, data=None):
    request = urllib.request.Request(url, data and json.dumps(data).encode())
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_no_file_of_the_machine_can_be_read(address):
    url, folder = address
    secret = folder / "secret.txt"
    secret.write_text("a secret")
    for path in (secret, "pyproject.toml", "/etc/passwd", f"{folder}/vlm/../secret.txt"):
        code, text = status(f"{url}/gradio_api/file={path}")
        assert code in (403, 404) and "a secret" not in text


@pytest.mark.parametrize("size", [1_000, 60_000_000])
def test_uploads_are_limited(size, address):
    start = b'--X\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n'
    request = urllib.request.Request(f"{address[0]}/gradio_api/upload")
    request.data = start + bytes(size) + b"\r\n--X--\r\n"
    request.add_header("Content-Type", "multipart/form-data; boundary=X")
    if size == 1_000:
        with urllib.request.urlopen(request, timeout=60) as response:
            assert response.status == 200
        return
    with pytest.raises(urllib.error.URLError):  # it stops reading, or answers 413
        urllib.request.urlopen(request, timeout=60)


def test_a_path_in_place_of_an_upload_is_refused(address):
    url, folder = address
    secret = parts.picture(folder)
    _, config = status(f"{url}/config")
    for number, event in enumerate(json.loads(config)["dependencies"]):
        inputs = len(event["inputs"])
        given = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
        body = {"data": [given] * inputs, "fn_index": number, "session_hash": "mine"}
        status(f"{url}/gradio_api/queue/join", body)
    _, said = status(f"{url}/gradio_api/queue/data?session_hash=mine")
    ended = [json.loads(line[6:]) for line in said.splitlines() if '"process_completed"' in line]
    assert ended and not any(
        one["success"] and str(secret) in json.dumps(one["output"]) for one in ended
    )


def test_it_listens_on_this_machine_alone(address):
    assert address[0].startswith("http://127.0.0.1:")


def test_a_port_that_is_taken(address):
    from budwood.errors import InputError

    port = int(address[0].rpartition(":")[2])
    with pytest.raises(InputError, match=rf"cannot listen at 127\.0\.0\.1:{port}"):
        serve(port=port, blocking=False)
