"""Run all benchmarks on the CPU, one process after the other.

python benchmarks/run_all.py [NAME ...]
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def scripts() -> list[Path]:
    """The scripts here that record a result.

    A script that says `BY_HAND = True` needs more than the package, such as music of your own.
    """
    found = []
    for path in sorted(FOLDER.glob("*.py")):
        text = path.read_text()
        records = re.search(r"^from record import .*record", text, re.MULTILINE)
        by_hand = re.search(r"^BY_HAND = True$", text, re.MULTILINE)
        if records and not by_hand:
            found.append(path)
    return found


def main(names: list[str]) -> None:
    """Run the named scripts, or all; exit 1 if one fails, after the others have run."""
    failed = []
    for script in scripts():
        if names and script.stem not in names:
            continue
        print(f"== {script.stem}", flush=True)
        if subprocess.run([sys.executable, script], check=False).returncode:
            failed.append(script.stem)
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
