"""The songs of a run: how a resumed run recognises them, and a look for stems that are silent.

A data set whose `tracks` are `data.tracks.Track`s and whose `parts` say which files add up to a
stem, such as `MUSDB18Dataset`, is asked for its files; any other for its items.

Axis letters: `n` stems, `c` channels, `s` samples.

Notebook: 07_training
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from tfswa_lab.data.tracks import Track
from tfswa_lab.training.losses import SILENT_POWER

LOOK_SECONDS = 30  # read at once in the look for silence
SAMPLED_BYTES = 4096  # bytes that are compared at each of three places of a file

# The same songs ------------------------------------------------------------------------------


def names_of(songs: Dataset) -> str:
    """How many songs, and a digest of their names, of a data set that has `track_names`."""
    names = getattr(songs, "track_names", None)
    if names is None:
        return "without names"
    return f"{len(names)}, of names {hashlib.sha256(repr(sorted(names)).encode()).hexdigest()[:8]}"


def audio_of(songs: Dataset) -> str | None:
    """How long the songs are, and a digest of their audio; None for a data set without `Track`s.

    The digest is of names, rates, lengths, sizes of the files, and 12 KiB from each file, so it
    takes moments. It does not depend on where the files are or when they were written. It does not
    notice a change of some samples between these places that keeps the size.
    """
    tracks = tracks_of(songs)
    if not tracks:
        return None
    digest = hashlib.sha256()
    for track in sorted(tracks, key=lambda track: track.name):
        digest.update(repr((track.name, track.rate, track.samples)).encode())
        for path in sorted(track.files()):
            digest.update(path.name.encode() + _sampled(path))
    seconds = sum(track.samples / track.rate for track in tracks)
    return f"{seconds:.1f} s with digest {digest.hexdigest()[:8]}"


def tracks_of(songs: Dataset) -> list[Track]:
    """The tracks of a data set that has some, else none."""
    tracks = getattr(songs, "tracks", None)
    known = isinstance(tracks, list) and all(isinstance(track, Track) for track in tracks)
    return tracks if known and hasattr(songs, "parts") else []


def _sampled(path: Path) -> bytes:
    """The size of a file, and some bytes at a quarter, at half and at three quarters of it."""
    size = path.stat().st_size
    seen = [str(size).encode()]
    with path.open("rb") as file:
        for quarter in (1, 2, 3):
            file.seek(size * quarter // 4)
            seen.append(file.read(SAMPLED_BYTES))
    return b" ".join(seen)


# Silence -------------------------------------------------------------------------------------


def refuse_silence(songs: Dataset, stems: Sequence[str]) -> None:
    """Refuse a training set in which a stem or the mixture is silent in all songs.

    Raises:
        ValueError: names the stems, the folder and what to do.
    """
    if silent := silent_sources(songs, stems):
        raise ValueError(
            f"training: {_said(silent, songs)}: there is nothing to learn from; "
            f"{_advice(silent, songs, stems)}"
        )


def refuse_silent_validation(songs: Dataset, stems: Sequence[str]) -> None:
    """Refuse a validation set that can score no stem, and warn of a stem that it cannot score.

    Raises:
        ValueError: the mixture or all stems are silent in all songs.
    """
    silent = silent_sources(songs, stems)
    if "mixture" in silent or len(silent) == len(stems):
        raise ValueError(
            f"validation: {_said(silent, songs)}, so no score can tell which weights are best; "
            "validate on songs in which they sound (another seed may draw some), or not at all"
        )
    if silent:
        warnings.warn(
            f"validation: {_said(silent, songs)}: the best weights are chosen by the other stems",
            stacklevel=2,
        )


def silent_sources(songs: Dataset, stems: Sequence[str]) -> list[str]:
    """Which of "mixture" and the stems are silent in all songs.

    Songs are read in a random order, the same in all processes, until each source was heard: in
    most data sets that takes one or two blocks of 30 s. Everything is read only before a source is
    called silent.

    Args:
        songs: a training or validation set.
        stems: names of the stems, in the order of its items.
    """
    unheard, places = ["mixture", *stems], _places(songs)
    random.Random(0).shuffle(places)
    for place in places:
        sounds = _sounds(songs, stems, place, unheard)
        unheard = [name for name in unheard if _is_silent(sounds[name])]
        if not unheard:
            break
    return unheard


def _places(songs: Dataset) -> list:
    """Tracks and first samples of blocks that cover them; of other data sets, the indices."""
    tracks = tracks_of(songs)
    if not tracks:
        return list(range(len(songs)))
    return [
        (track, start)
        for track in tracks
        for start in range(0, track.samples, int(LOOK_SECONDS * track.rate))
    ]


def _sounds(
    songs: Dataset, stems: Sequence[str], place: int | tuple[Track, int], names: Sequence[str]
) -> dict[str, Tensor]:
    """Waveforms `(c, s)` of the sources of these names at one place."""
    if isinstance(place, int):
        item = songs[place]
        return {"mixture": item["mixture"], **dict(zip(stems, item["stems"], strict=True))}
    (track, start), parts = place, _parts(songs, stems)
    frames = min(int(LOOK_SECONDS * track.rate), track.samples - start)
    needed = dict.fromkeys(part for name in names for part in parts[name])
    waveforms = track.read(tuple(needed), start, frames, track.rate)
    return {name: sum(waveforms[part] for part in parts[name]) for name in names}


def _parts(songs: Dataset, stems: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The files that add up to each source."""
    return {"mixture": ("mixture",), **dict(zip(stems, songs.parts.values(), strict=True))}


def _is_silent(waveform: Tensor) -> bool:
    """Whether a waveform is below the level that losses call silence; NaN is not."""
    return waveform.double().square().mean().item() <= SILENT_POWER


def _said(silent: Sequence[str], songs: Dataset) -> str:
    """Which sources are silent, and where."""
    subject = f"{' and '.join(silent)} {'is' if len(silent) == 1 else 'are'} silent in all"
    if tracks := tracks_of(songs):
        return f"{subject} {len(tracks)} songs of {tracks[0].path.parent}"
    return f"{subject} {len(songs)} items of the data set"


def _advice(silent: Sequence[str], songs: Dataset, stems: Sequence[str]) -> str:
    """What to do about silent sources."""
    if not tracks_of(songs):
        return "look at what its items hold"
    parts = _parts(songs, stems)
    files = ", ".join(dict.fromkeys(part for name in silent for part in parts[name]))
    return f"check data_root, listen to the files of {files}, or choose other target_stems"
