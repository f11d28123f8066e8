"""Make the embedded band: a synthetic MUSDB18-shaped tree with notes, F0, syllables and chords.

    python data_scripts/make_band.py [ROOT] [--train 12] [--test 6] [--seconds 12]

The lessons make the default band by themselves when they need it; this makes it on purpose, or a
larger one elsewhere. A band that is already there is replaced.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from tfswa_lab.data.band import make_band


def main(
    root: Annotated[Path | None, typer.Argument(help="Folder; the lab's own if left out.")] = None,
    train: Annotated[int, typer.Option(min=1, max=100, help="Songs to train on.")] = 12,
    test: Annotated[int, typer.Option(min=1, help="Songs to test on.")] = 6,
    seconds: Annotated[float, typer.Option(help="Length of a song.")] = 12.0,
) -> None:
    """Make the embedded band and say where it is."""
    start = time.perf_counter()
    # Training songs have the seeds below 100, test songs those from 100 on: no song is in both.
    made = make_band(root, seconds, range(train), range(100, 100 + test))
    took = time.perf_counter() - start
    typer.echo(f"{made}: {train} + {test} songs of {seconds:g} s, made in {took:.0f} s")


if __name__ == "__main__":
    try:
        typer.run(main)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
