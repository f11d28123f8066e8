"""Make a MUSDB18-shaped WAV tree of the Music Delta songs from a clone of MDB Drums.

    git clone https://github.com/CarlSouthall/MDBDrums CLONE
    python data_scripts/get_music_delta.py CLONE DEST

DEST/train and DEST/test get one folder a song with mixture, vocals, drums, bass and other
(44.1 kHz, stereo, 16 bit); the mixture is the exact integer sum of the four stems. A song is made
of its stereo stems or, where the clone lacks some, of its raw tracks in the centre.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import soundfile
import typer
import yaml

from tfswa_lab.audio import SAMPLE_RATE, STEMS
from tfswa_lab.data.download import whole_folder

LICENCE = "Music Delta (MedleyDB, MDB Drums) is CC BY-NC-SA 4.0: not for commercial use"
# All others are for training. Shadows and SpeedMetal have no vocals: a silent stem.
TEST_SONGS = ("Beatles", "Grunge", "Shadows", "SpeedMetal")

# MedleyDB's own names of instruments; all others are "other".
VOCALS = {
    *("male singer", "male rapper", "male speaker"),
    *("female singer", "female rapper", "female speaker", "vocalists"),
}
DRUMS = {
    *("drum set", "drum machine", "kick drum", "snare drum", "bass drum", "toms", "high hat"),
    *("cymbal", "gong", "timpani", "bongo", "conga", "tambourine", "darbuka", "doumbek", "tabla"),
    *("triangle", "sleigh bells", "cowbell", "cabasa", "guiro", "gu", "castanet", "claps"),
    *("rattle", "shaker", "maracas", "auxiliary percussion", "beatboxing"),
}
BASS = {"electric bass", "double bass"}


def stem_of(instrument: str) -> str:
    """The stem that a MedleyDB instrument belongs to.

    >>> stem_of("male rapper"), stem_of("bass drum"), stem_of("bass clarinet")
    ('vocals', 'drums', 'other')
    """
    groups = {"vocals": VOCALS, "drums": DRUMS, "bass": BASS}
    return next((stem for stem, names in groups.items() if instrument in names), "other")


def sources(song: Path) -> dict[Path, str]:
    """The sound files of a song, all stems or else all raw tracks, and the stem each belongs to.

    Raises:
        FileNotFoundError: the metadata is absent, or both sets are incomplete.
        ValueError: the metadata is not MedleyDB's.
    """
    path = song / f"{song.name}_METADATA.yaml"
    try:
        about = yaml.safe_load(path.read_text())
        stems = {
            song / about["stem_dir"] / stem["filename"]: stem_of(stem["instrument"])
            for stem in about["stems"].values()
        }
        raw = {
            song / about["raw_dir"] / track["filename"]: stem_of(track["instrument"])
            for stem in about["stems"].values()
            for track in stem["raw"].values()
        }
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not MedleyDB metadata: {error!r}") from error
    for files in (stems, raw):
        if files and all(file.is_file() for file in files):
            return files
    missing = sorted(file.name for file in (stems | raw) if not file.is_file())
    raise FileNotFoundError(f"neither all stems nor all raw tracks: no {', '.join(missing)}")


def read_stereo(path: Path) -> np.ndarray:
    """Integer samples `(s, 2)`; mono goes to the centre.

    Raises:
        ValueError: the file is not 44.1 kHz 16-bit PCM with one or two channels.
    """
    try:
        with soundfile.SoundFile(path) as file:
            form = (file.samplerate, file.subtype)
            samples = file.read(dtype="int16", always_2d=True).astype(np.int32)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{path.name} is not readable as audio ({error})") from error
    if form != (SAMPLE_RATE, "PCM_16") or samples.shape[1] > 2 or not len(samples):
        raise ValueError(
            f"{path.name} has {len(samples)} samples in {samples.shape[1]} channels, {form[0]} Hz, "
            f"{form[1]}; expected {SAMPLE_RATE} Hz, PCM_16, mono or stereo"
        )
    return np.broadcast_to(samples, (len(samples), 2))


def mix(files: dict[Path, str]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Sum the files of a song into stems and a mixture that fit 16 bits.

    Returns:
        The five signals `(s, 2)`, int32, and remarks on what was changed.
    """
    remarks = []
    tracks = {path: read_stereo(path) for path in files}
    length = max(map(len, tracks.values()))
    sounds = {stem: np.zeros((length, 2), np.int32) for stem in STEMS}
    for path, samples in tracks.items():
        sounds[files[path]][: len(samples)] += samples
        if len(samples) < length:
            remarks.append(f"{path.name} ends {length - len(samples)} samples early: silence added")
    sounds["mixture"] = sum(sounds[stem] for stem in STEMS)
    extremes = [edge for sound in sounds.values() for edge in (sound.min(), sound.max())]
    if min(extremes) < -32768 or max(extremes) > 32767:
        gain = 32765 / np.abs(extremes).max()  # four roundings may add 2 to the mixture
        for stem in STEMS:
            sounds[stem] = np.rint(sounds[stem] * gain).astype(np.int32)
        sounds["mixture"] = sum(sounds[stem] for stem in STEMS)
        remarks.append(f"would clip: all stems scaled by {20 * np.log10(gain):.1f} dB")
    return sounds, remarks


def write_song(song: Path, folder: Path) -> str:
    """Write the five files of one song; returns a line that says what was made."""
    files = sources(song)
    sounds, remarks = mix(files)
    name = song.name.removeprefix("MusicDelta_")
    split = "test" if name in TEST_SONGS else "train"
    target = folder / split / f"Music Delta - {name}"
    target.mkdir()
    for stem, sound in sounds.items():
        soundfile.write(target / f"{stem}.wav", sound.astype(np.int16), SAMPLE_RATE, "PCM_16")
    origin = sorted({path.parent.name.rpartition("_")[2] for path in files})
    remarks = [f"{split}, from {len(files)} files of {', '.join(origin)}", *remarks]
    return f"{name}: {'; '.join(remarks)}"


def main(
    clone: Annotated[Path, typer.Argument(help="Clone of CarlSouthall/MDBDrums.")],
    dest: Annotated[Path, typer.Argument(help="Folder to make.")],
) -> None:
    """Make a MUSDB18-shaped WAV tree of the Music Delta songs from a clone of MDB Drums."""
    typer.echo(LICENCE)
    root = clone / "MDB Drums" / "audio" / "multi-tracks"
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder {root}: {clone} is not a clone of https://github.com/CarlSouthall/MDBDrums"
        )
    songs = sorted(path for path in root.iterdir() if path.is_dir())
    failed = []
    with whole_folder(dest) as folder:
        (folder / "train").mkdir()
        (folder / "test").mkdir()
        for song in songs:
            try:
                typer.echo(write_song(song, folder))
            except (FileNotFoundError, ValueError) as error:
                failed.append(song)
                typer.echo(f"{song.name} cannot be made: {error}", err=True)
        if len(failed) == len(songs):
            raise ValueError(f"none of the {len(songs)} songs in {root} can be made: get it again")
    typer.echo(f"{dest}: {len(songs) - len(failed)} of {len(songs)} songs")


if __name__ == "__main__":
    try:
        typer.run(main)
    except (OSError, ValueError) as error:
        sys.exit(str(error))
