"""Tiny MUSDB18-shaped trees of noise, whose samples are known as integers."""

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tfswa_lab.audio import ensure_ffmpeg

STEMS = ("vocals", "drums", "bass", "other")
RATE = 8000  # low, so that the tests read and write little


@pytest.fixture(scope="session")
def musdb():
    """The package musdb: the peer that reads the same trees, and part of reading them here."""
    try:
        ensure_ffmpeg()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    return importlib.import_module("musdb")


@pytest.fixture(scope="session")
def make_track(musdb) -> Callable[..., dict[str, np.ndarray]]:
    """A function that writes a track folder and returns its int16 samples `(s, 2)`."""

    def make(folder: Path, samples: int = 4000, rate: int = RATE, seed: int = 0) -> dict:
        generator = np.random.default_rng(seed)
        sources = {
            stem: generator.integers(-8000, 8000, (samples, 2)).astype(np.int16) for stem in STEMS
        }
        sources["mixture"] = sum(sources.values())
        folder.mkdir(parents=True)
        for source, waveform in sources.items():
            soundfile.write(folder / f"{source}.wav", waveform, rate, subtype="PCM_16")
        return sources

    return make


@pytest.fixture(scope="session")
def tree(tmp_path_factory, make_track) -> Path:
    """Five train and two test tracks of 0.5 to 1.1 s at 8 kHz; leave it as it is."""
    root = tmp_path_factory.mktemp("tree")
    for number in range(5):
        make_track(root / "train" / f"Noise - {number}", 4000 + 1201 * number, seed=number)
    for number in range(2):
        make_track(root / "test" / f"Hiss - {number}", 4000 + number, seed=100 + number)
    return root


@pytest.fixture
def lone_tree(tmp_path, make_track) -> Path:
    """A train folder with one track, `Noise - 0`, free to be damaged."""
    make_track(tmp_path / "train" / "Noise - 0")
    return tmp_path
