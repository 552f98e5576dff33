"""Scan frames past one machine, with Ray Data: each worker holds an encoder.

    pip install "budwood[points]" "ray[data]"
    python examples/points/scan_with_ray.py velodyne/ --labels car,pedestrian --output found.jsonl

The folder must be at the same place on every machine of the cluster.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ray
import ray.data

from budwood.points import find_files, load_encoder, scan


class Scanner:
    """Names the objects in batches of frames; one in each worker.

    Args:
        labels: to choose from.
        device: of the encoder, such as ``"cuda"``.
    """

    def __init__(self, labels: list[str], device: str) -> None:
        self.labels, self.encoder = labels, load_encoder(device=device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """From a column of paths to a column of JSON, one for each frame or error."""
        rows: list[dict[str, Any]] = []
        found = scan(
            batch["path"].tolist(),
            self.labels,
            encoder=self.encoder,
            on_error=lambda name, error: rows.append({"frame": name, "error": str(error)}),
        )
        rows += [frame.as_json() for frame in found]
        return {"frame": [json.dumps(row) for row in rows]}


def main() -> None:
    """Scan a folder, and write a line of JSON for each frame."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("frames", type=Path)
    parser.add_argument("--labels", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    paths = [{"path": str(path.resolve())} for path in find_files(given.frames)]
    frames = ray.data.from_items(paths).map_batches(
        Scanner,
        fn_constructor_args=(given.labels.split(","), given.device),
        compute=ray.data.ActorPoolStrategy(size=given.workers),
        batch_size=8,
    )
    with given.output.open("x", encoding="utf-8") as file:
        for row in frames.iter_rows():
            file.write(row["frame"] + "\n")


if __name__ == "__main__":
    main()
