"""``python -m budwood.evaluate HARNESS`` prints the folder of the tasks, for ``--include_path``."""

from __future__ import annotations

import sys

from budwood.errors import UnknownNameError
from budwood.evaluate.scenes import HARNESSES, task_folder


def main(arguments: list[str]) -> int:
    """Print the folder of one harness.

    Returns:
        Exit status: 2 if there is no such harness.
    """
    try:
        print(task_folder(arguments[0] if len(arguments) == 1 else " ".join(arguments)))  # noqa: T201
    except UnknownNameError as error:
        known = " or ".join(HARNESSES)
        print(f"{error}; usage: python -m budwood.evaluate {known}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
