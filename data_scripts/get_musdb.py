"""Download MUSDB18 into a new folder: the 7-second sample, or MUSDB18-HQ in full.

    python data_scripts/get_musdb.py 7s DEST
    python data_scripts/get_musdb.py hq DEST

DEST gets the folders train and test, as musdb.DB and MUSDB18Dataset expect them. An interrupted
download goes on where it stopped.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from tfswa_lab.data.download import extract_zip, fetch

SAMPLE_URL = "https://github.com/sigsep/sigsep-mus-db/releases/download/v0.4.0/MUSDB18-7-STEMS.zip"
HQ_RECORD_URL = "https://zenodo.org/api/records/3338373"
HQ_NAME = "musdb18hq.zip"
LICENCE = "MUSDB18 is for academic use only: https://sigsep.github.io/datasets/musdb.html"

app = typer.Typer(add_completion=False, help=__doc__)
Dest = Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)]
KeepArchive = Annotated[bool, typer.Option(help="Keep the archive, DEST.zip, after unpacking.")]


@app.command("7s")
def sample(
    dest: Dest,
    url: Annotated[str, typer.Option(help="Address of the archive: a mirror.")] = SAMPLE_URL,
    keep_archive: KeepArchive = False,
) -> None:
    """Seven seconds of every track, as .stem.mp4 (AAC)."""
    if _absent(dest):
        # Published without size or checksum: the length that the server announces and the
        # checksums inside the archive have to do.
        _install(dest, keep_archive, url)


@app.command("hq")
def full(
    dest: Dest,
    url: Annotated[str, typer.Option(help="A mirror; Zenodo's checksum still decides.")] = "",
    record_url: Annotated[str, typer.Option(help="Zenodo's record of the data.")] = HQ_RECORD_URL,
    keep_archive: KeepArchive = False,
) -> None:
    """All tracks in full, as WAV; the archive and its contents need room side by side."""
    if _absent(dest):
        link, size, checksum = _published(record_url, HQ_NAME)
        _install(dest, keep_archive, url or link, size, checksum)


def _absent(dest: Path) -> bool:
    typer.echo(LICENCE)
    # The folder appears only when complete, so its presence is enough.
    present = (dest / "train").is_dir()
    if present:
        typer.echo(f"{dest} is already there; nothing to do")
    return not present


def _published(record_url: str, name: str) -> tuple[str, int, str]:
    """Address, size and checksum of a file, as its Zenodo record gives them now."""
    with tempfile.TemporaryDirectory() as folder:
        text = fetch(record_url, Path(folder, "record.json")).read_text()
    try:
        file = {file["key"]: file for file in json.loads(text)["files"]}[name]
        return file["links"]["self"], file["size"], file["checksum"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{record_url} is not a Zenodo record that lists {name}; check --record-url"
        ) from error


def _install(
    dest: Path,
    keep_archive: bool,
    url: str,
    size: int | None = None,
    checksum: str | None = None,
) -> None:
    archive = dest.with_name(f"{dest.name}.zip")
    fetch(url, archive, size=size, checksum=checksum, progress=sys.stderr.isatty())
    extract_zip(archive, dest, required=("train", "test"))
    if not keep_archive:
        archive.unlink()
    for split in ("train", "test"):
        typer.echo(f"{dest / split}: {len(list((dest / split).iterdir()))} tracks")


if __name__ == "__main__":
    try:
        app()
    except (OSError, ValueError) as error:
        sys.exit(str(error))
