"""The band on disk: a MUSDB18-shaped tree that is whole and current, or not there at all."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import soundfile

from .song import render_song
from .timeline import RATE

# Both subsets visit all four registers of singers (`seed % 4`).
TRAIN_SEEDS = tuple(range(12))
TEST_SEEDS = tuple(range(100, 106))
SECONDS = 12.0
_CARD = "band.json"


def _fingerprint() -> str:
    """A hash of the generator's source files."""
    digest = sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + source.read_text("utf-8").encode())
    return digest.hexdigest()


# Taken on import: what runs is what was loaded, even if the files change while it runs.
_FINGERPRINT = _fingerprint()


def band_root() -> Path:
    """Where the band lies unless told otherwise.

    `$TFSWA_LAB_DATA/band` if that is set, `data/band` in a checkout, else the user's cache.
    """
    if os.environ.get("TFSWA_LAB_DATA"):
        return Path(os.environ["TFSWA_LAB_DATA"]).expanduser() / "band"
    checkout = Path(__file__).parents[3]
    if (checkout / "pyproject.toml").is_file():
        return checkout / "data" / "band"
    import pooch  # slow to import, and a checkout never comes here

    return Path(pooch.os_cache("tfswa_lab")) / "band"


def ensure_band(root: str | Path | None = None, workers: int = -1) -> Path:
    """The folder of the full band, made now if it is absent or by another version.

    Several processes may call this at once: each builds in a folder of its own, and whoever
    finishes second keeps the other's.

    Args:
        root: where it is or shall be, `band_root()` if None.
        workers: processes that render side by side; -1 for one on each core.

    Raises:
        FileExistsError: the folder holds something that is not a band.

    Notebook: 00_start_here
    """
    root, card = _check(root), _card(SECONDS, TRAIN_SEEDS, TEST_SEEDS)
    if _is(root, card):
        return root
    with _scratch(root) as scratch:
        fresh = _render(Path(scratch), SECONDS, TRAIN_SEEDS, TEST_SEEDS, workers)
        if not _is(root, card):
            _replace(root, fresh)
    return root


def make_band(
    root: str | Path | None = None,
    seconds: float = SECONDS,
    train_seeds: Sequence[int] = TRAIN_SEEDS,
    test_seeds: Sequence[int] = TEST_SEEDS,
    workers: int = 2,
) -> Path:
    """Render songs into a MUSDB18-shaped folder, all of them or none.

    Args:
        root: folder to make, `band_root()` if None; a band that lies there is replaced.
        seconds: length of every song.
        train_seeds: one song for each, see `render_song`.
        test_seeds: likewise.
        workers: processes that render side by side.

    Raises:
        FileExistsError: the folder holds something that is not a band.

    Notebook: 00_start_here
    """
    root = _check(root)
    with _scratch(root) as scratch:
        _replace(root, _render(Path(scratch), seconds, train_seeds, test_seeds, workers))
    return root


def _check(root: str | Path | None) -> Path:
    """The folder as an absolute path, if it is ours to replace."""
    root = (band_root() if root is None else Path(root)).expanduser().resolve()
    if root.exists() and not (root / _CARD).is_file() and (root.is_file() or any(root.iterdir())):
        raise FileExistsError(f"{root} is not a band (no {_CARD} in it); name a new folder")
    return root


def _card(seconds: float, train_seeds: Sequence[int], test_seeds: Sequence[int]) -> str:
    """What was made by which generator: equal cards mean equal bands."""
    card = {
        "generator": _FINGERPRINT,
        "seconds": seconds,
        "train_seeds": list(train_seeds),
        "test_seeds": list(test_seeds),
    }
    return json.dumps(card, indent=1)


def _is(root: Path, card: str) -> bool:
    return (root / _CARD).is_file() and (root / _CARD).read_text("utf-8") == card


def _scratch(root: Path) -> TemporaryDirectory:
    """A private folder beside the root, so that moving a band into place is one rename."""
    root.parent.mkdir(parents=True, exist_ok=True)
    # When one worker fails, another may still be writing while the folder is removed.
    return TemporaryDirectory(prefix=".band-", dir=root.parent, ignore_cleanup_errors=True)


def _render(
    scratch: Path,
    seconds: float,
    train_seeds: Sequence[int],
    test_seeds: Sequence[int],
    workers: int,
) -> Path:
    """A finished band inside the scratch folder."""
    # joblib's processes, unlike multiprocessing's, start from a notebook or an unguarded script.
    from joblib import Parallel, delayed

    fresh = scratch / "band"
    jobs = [(fresh / "train", seed) for seed in train_seeds]
    jobs += [(fresh / "test", seed) for seed in test_seeds]
    Parallel(workers)(delayed(_write_song)(subset, seed, seconds) for subset, seed in jobs)
    (fresh / _CARD).write_text(_card(seconds, train_seeds, test_seeds), "utf-8")
    return fresh


def _write_song(subset: Path, seed: int, seconds: float) -> None:
    song = render_song(seed, seconds)
    folder = subset / song.name
    folder.mkdir(parents=True)
    for name, samples in {"mixture": song.mixture, **song.stems}.items():
        soundfile.write(folder / f"{name}.wav", samples, RATE, subtype="PCM_16")
    text = json.dumps(song.annotations, separators=(",", ":"))
    (folder / "annotations.json").write_text(text, "utf-8")


def _replace(root: Path, fresh: Path) -> None:
    """Move a finished band into place; the old one leaves with the scratch folder."""
    if root.exists():
        root.rename(fresh.with_name("old"))
    try:
        fresh.rename(root)
    except OSError:
        # Another process put its band there in this very moment: it is as good as ours.
        if not _is(root, (fresh / _CARD).read_text("utf-8")):
            raise
