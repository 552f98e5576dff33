"""Print the tables of the documentation again, from the records that are kept here.

    python benchmarks/tables.py

A table stands below a comment with the command that prints it:
`<!-- budwood bench show RECORD --columns … -->`. A test holds each to its record.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
TABLE = re.compile(r"<!-- budwood (bench show .+?) -->\n(?:\n(?:\|.*\n)+)?")


def printed(match: re.Match[str]) -> str:
    """The comment, and below it what its command prints."""
    command = [sys.executable, "-m", "budwood.cli", *shlex.split(match[1])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{match[1]}\n{done.stderr}")
    return f"<!-- budwood {match[1]} -->\n\n{done.stdout}"


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(TABLE.sub(printed, page.read_text()))
        print(page.relative_to(ROOT))
