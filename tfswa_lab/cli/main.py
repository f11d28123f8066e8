"""The command line, `tfswa-lab`: `separate`, `train`, `evaluate`, `export` and `memory`.

Notebook: 03_tfswa_unet
"""

from __future__ import annotations

from typing import Annotated

import typer

from tfswa_lab import __version__
from tfswa_lab.cli.errors import PlainErrors
from tfswa_lab.cli.evaluate import evaluate
from tfswa_lab.cli.export import export
from tfswa_lab.cli.memory import memory
from tfswa_lab.cli.separate import separate
from tfswa_lab.cli.train import train

app = typer.Typer(no_args_is_help=True, add_completion=False, cls=PlainErrors)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tfswa-lab {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Music source separation with time-frequency attention."""


app.command()(separate)
app.command()(train)
app.command()(evaluate)
app.command()(export)
app.add_typer(memory, name="memory")

if __name__ == "__main__":
    app()
