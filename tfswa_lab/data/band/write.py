"""The band on disk: a MUSDB18-shaped tree, complete and of this version, or no tree at all."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import soundfile

from .song import render_song
from .sound import RATE

# Both subsets visit all four registers of singers (`seed % 4`).
TRAIN_SEEDS = tuple(range(12))
TEST_SEEDS = tuple(range(100, 106))
SECONDS = 12.0
_RECIPE = "band.json"


def _fingerprint() -> str:
    """A hash of the generator's source files."""
    digest = sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + source.read_text("utf-8").encode())
    return digest.hexdigest()


# Computed at import, because the files may change while the loaded code runs.
_FINGERPRINT = _fingerprint()


def band_root() -> Path:
    """The default folder of the band.

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
    """The folder of the full band, made now if it is absent or of another version.

    Several processes may call this at once: each builds in a folder of its own, and the second to
    finish keeps the band of the first.

    Args:
        root: its folder, `band_root()` if None.
        workers: processes that render side by side; -1 for one on each core.

    Raises:
        FileExistsError: the folder holds something that is not a band.

    Notebook: 00_start_here
    """
    root, recipe = _check(root), _recipe(SECONDS, TRAIN_SEEDS, TEST_SEEDS)
    if _was_made_by(root, recipe):
        return root
    with _scratch(root) as scratch:
        fresh = _render(Path(scratch), SECONDS, TRAIN_SEEDS, TEST_SEEDS, workers)
        if not _was_made_by(root, recipe):
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
        root: folder to make, `band_root()` if None; a band in it is replaced.
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
    """The absolute path, if the folder is a band, empty or absent, so that it may be replaced."""
    root = (band_root() if root is None else Path(root)).expanduser().resolve()
    if root.exists() and not (root / _RECIPE).is_file() and (root.is_file() or any(root.iterdir())):
        raise FileExistsError(f"{root} is not a band (no {_RECIPE} in it); name a new folder")
    return root


def _recipe(seconds: float, train_seeds: Sequence[int], test_seeds: Sequence[int]) -> str:
    """The songs and the version of the generator: equal recipes mean equal bands."""
    recipe = {
        "generator": _FINGERPRINT,
        "seconds": seconds,
        "train_seeds": list(train_seeds),
        "test_seeds": list(test_seeds),
    }
    return json.dumps(recipe, indent=1)


def _was_made_by(root: Path, recipe: str) -> bool:
    return (root / _RECIPE).is_file() and (root / _RECIPE).read_text("utf-8") == recipe


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
    (fresh / _RECIPE).write_text(_recipe(seconds, train_seeds, test_seeds), "utf-8")
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
        # Another process has just put its band there, which is equal to ours.
        if not _was_made_by(root, (fresh / _RECIPE).read_text("utf-8")):
            raise
