"""`budwood serve`: the line for vLLM, what it refuses, and that no process is left behind."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time

import pytest

from budwood.errors import InputError, MissingPackageError
from budwood.serve import launch
from tests.refusals import refused


def overrides_of(text: str) -> dict:
    words = shlex.split(text)
    return json.loads(words[words.index("--hf-overrides") + 1])


def test_dry_run_prints_the_line(budwood, next_dir):
    done = budwood("serve", next_dir, "--keep", "0.25", "--dry-run", "--port", "9000", "-tp", "2")
    assert done.exit_code == 0, done.output
    words = shlex.split(done.stdout)
    assert words[:3] == ["vllm", "serve", str(next_dir)]
    assert words[-4:] == ["--port", "9000", "-tp", "2"]
    assert overrides_of(done.stdout) == {
        "architectures": ["BudwoodLlavaNextForConditionalGeneration"],
        "budwood": {"keep": 0.25, "method": "adav", "question": "current", "seed": 0},
    }


def test_a_count_stays_a_count(budwood, model_dir):
    done = budwood("serve", model_dir, "--keep", "5", "--method", "adav:reserve=0.1", "--dry-run")
    assert overrides_of(done.stdout)["budwood"] == {
        "keep": 5,
        "method": "adav:reserve=0.1",
        "question": "current",
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--keep", "0"], "below 1"),
        (["--keep", "1.5"], "outside"),
        (["--method", "visionzip"], "reads keys of the vision encoder, which is not served"),
        (["--method", "adav-official"], "reads whole crops, which is not served"),
        (["--method", "adv"], "unknown method"),
        (["--question", "turns"], "unknown --question"),
        (["--hf-overrides", "{}"], "is written by budwood serve"),
        (["--mm_encoder_tp_mode=data"], "leave it out"),
    ],
)
def test_bad_input_is_one_line(budwood, model_dir, options, reason):
    refused(budwood("serve", model_dir, "--dry-run", *options), reason)


def test_a_model_without_vision_is_refused(budwood, blind_dir):
    refused(budwood("serve", blind_dir, "--dry-run"), "is not served; known: llava, ")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vision_config": {"model_type": "pixtral"}}, "vision tower 'pixtral' of 'llava'"),
        ({"model_type": "llava_onevision", "vision_aspect_ratio": "anyres_max_4"}, "anyres_max_9"),
        ({"model_type": "internvl", "vision_feature_layer": -4}, "vision_feature_layer=-4"),
        ({"model_type": "internvl_chat", "auto_map": {"AutoConfig": "a.B"}}, "ends in -hf"),
        ({"model_type": "gemma3"}, "known: llava, "),
    ],
)
def test_a_model_that_vllm_has_otherwise_is_refused(budwood, model_dir, tmp_path, changes, reason):
    config = json.loads((model_dir / "config.json").read_text())
    if "model_type" in changes:
        del config["vision_config"]
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    refused(budwood("serve", tmp_path, "--dry-run"), reason)


@pytest.mark.parametrize("name", ["sprout", "sprout-256", "smollm2"])
def test_an_embedded_model_is_refused(budwood, name):
    refused(budwood("serve", name, "--dry-run"), "has no directory")


def test_without_vllm_nothing_is_loaded(budwood, monkeypatch):
    monkeypatch.setattr(launch, "vllm_version", lambda: None)
    refused(budwood("serve", "/gone"), "serving needs vllm: pip install 'vllm>=0.32,<0.34'")


def test_stages_of_a_model_with_m_rope_are_refused():
    with pytest.raises(ValueError, match="--pipeline-parallel-size 2 does not work"):
        launch._check_options("qwen2_5_vl", ["-pp=2"])
    launch._check_options("llava", ["-pp=2"])
    launch._check_options("qwen2_5_vl", ["--pipeline_parallel_size", "1"])


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "serving needs vllm: pip install 'vllm>=0.32,<0.34'"),
        ("0.31.9", "vllm 0.31.9 is too old"),
        ("0.34.0rc1", "vllm 0.34.0rc1 is too new"),
        ("1.0", "too new"),
    ],
)
def test_other_versions_are_refused(monkeypatch, version, reason):
    monkeypatch.setattr(launch, "vllm_version", lambda: version)
    with pytest.raises(MissingPackageError, match=reason.replace("(", r"\(")):
        launch.check_vllm()


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1+cpu"])
def test_known_versions_are_fine(monkeypatch, version):
    monkeypatch.setattr(launch, "vllm_version", lambda: version)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    launch.check_vllm()
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(InputError, match="keeps vLLM from loading budwood"):
        launch.check_vllm()


SERVER = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""
"""Which ends neither by itself nor when it is asked to, as its child does not."""

PARENT = """
import signal, subprocess, sys
from budwood.serve import launch
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup
real, launch._GRACE_S = subprocess.Popen, 2
launch.subprocess.Popen = lambda command, **more: real([sys.executable, "-c", sys.argv[1]], **more)
launch.run(launch.Line("model", {}))
"""


@pytest.mark.parametrize("kinds", [["SIGTERM"], ["SIGHUP"], ["SIGINT", "SIGINT"]])
def test_no_process_is_left_behind(kinds):
    command = [sys.executable, "-c", PARENT, SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert is_running(child)
        for kind in kinds:
            parent.send_signal(getattr(signal, kind))
            time.sleep(0.2)
        parent.wait(30)
    until = time.monotonic() + 10
    while is_running(child) and time.monotonic() < until:
        time.sleep(0.1)
    assert not is_running(child)


HASTY = """
import os, signal, subprocess, sys
from budwood.serve import launch
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
real = subprocess.Popen
def start(command, **more):
    server = real([sys.executable, "-c", "import time; time.sleep(60)"], **more)
    print(server.pid, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    return server
launch.subprocess.Popen = start
launch.run(launch.Line("model", {}))
"""
"""Is told to end while it starts the server."""


def test_a_server_that_is_just_starting_is_ended():
    done = subprocess.run([sys.executable, "-c", HASTY], capture_output=True, text=True, timeout=50)
    assert not is_running(int(done.stdout)) and "KeyboardInterrupt" in done.stderr


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_server_that_does_not_start_is_one_line(monkeypatch):
    real = subprocess.Popen
    monkeypatch.setattr(
        launch.subprocess,
        "Popen",
        lambda _, **more: real([sys.executable, "-c", "exit(3)"], **more),
    )
    with pytest.raises(InputError, match="vllm serve ended with exit code 3"):
        launch.run(launch.Line("model", {}))
