"""What several rooms' tests share: the embedded band and the real stems."""

import gc
import os
import sys
import tomllib
import venv
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

import numpy as np
import pytest
import soundfile

CHECKOUT = Path(__file__).resolve().parents[1]
os.environ["COLUMNS"] = "300"  # messages name paths, which a narrow terminal breaks in two


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread of torch's, so that sums come out the same to the bit."""
    from tfswa_lab.device import compute_threads

    with compute_threads(1):
        yield


@pytest.fixture(scope="module")
def new_objects_only() -> Iterator[None]:
    """Freeze what was there before, so that a look through the heap takes little time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def band_root() -> Path:
    """The embedded band, made now if it is absent."""
    from tfswa_lab.data.band import ensure_band

    return ensure_band()


def audio_folder() -> Path:
    """Where real recordings are looked for."""
    return Path(os.environ.get("TFSWA_LAB_AUDIO", CHECKOUT.parent / "shared" / "audio"))


@pytest.fixture(scope="session")
def audio_root() -> Path:
    """Real recordings, with `music_delta` and `mir1k` in it; they are not part of the project."""
    folder = audio_folder()
    if not folder.is_dir():
        pytest.skip(f"no real stems in {folder}; set TFSWA_LAB_AUDIO")
    return folder


@pytest.fixture(scope="session")
def music_delta(audio_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real FLAC stems as a MUSDB18-shaped WAV tree; the mixture is their integer sum."""
    root = tmp_path_factory.mktemp("music_delta")
    source = audio_root / "music_delta"
    for flac in sorted(source.glob("*/*/*.flac")):
        wav = (root / flac.relative_to(source)).with_suffix(".wav")
        wav.parent.mkdir(parents=True, exist_ok=True)
        samples, rate = soundfile.read(flac, dtype="int16")
        soundfile.write(wav, samples, rate)
    for track in root.glob("*/*"):
        stems = [soundfile.read(stem, dtype="int16") for stem in track.glob("*.wav")]
        mixture = sum(samples.astype(np.int32) for samples, _ in stems)
        soundfile.write(track / "mixture.wav", mixture.astype(np.int16), stems[0][1])
    return root


@pytest.fixture(scope="session")
def songs_folder(request: pytest.FixtureRequest) -> str:
    """Real songs where there are some, elsewhere the empty name that means the band to lessons."""
    return str(request.getfixturevalue("music_delta")) if audio_folder().is_dir() else ""


@pytest.fixture(scope="session")
def lab_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with what `pip install -e ".[lab]"` installs, and nothing else.

    The packages are links to those of the running environment: nothing is downloaded or copied.
    """
    folder = tmp_path_factory.mktemp("lab_only")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    (site_packages,) = folder.glob("lib/python*/site-packages")
    for found in lab_distributions():
        for name in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (site_packages / name).exists():
                (site_packages / name).symlink_to(found.locate_file(name))
        write_commands(found, python)
    for name in ("share", "etc", "bin/ffmpeg", "bin/ffprobe"):
        if (Path(sys.prefix) / name).exists():
            (folder / name).symlink_to(Path(sys.prefix) / name)
    return python


def lab_distributions() -> list[Distribution]:
    """This project, what it and `[lab]` require, and what these require in turn."""
    from packaging.requirements import Requirement

    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["lab"]]
    found, ahead = {}, [Requirement(line) for line in lines]
    while ahead:
        need = ahead.pop()
        extras = ("", *sorted(need.extras))
        if (need.name, extras) not in found:
            found[need.name, extras] = distribution(need.name)
            ahead += [
                more
                for more in map(Requirement, distribution(need.name).requires or ())
                if not more.marker or any(more.marker.evaluate({"extra": e}) for e in extras)
            ]
    return [distribution("tfswa-lab"), *found.values()]


def write_commands(found: Distribution, python: Path) -> None:
    """The package's programs, which start that Python."""
    for entry in found.entry_points.select(group="console_scripts"):
        program = python.with_name(entry.name)
        name = entry.attr.partition(".")[0]
        program.write_text(
            f"#!{python}\nimport sys\nfrom {entry.module} import {name}\nsys.exit({entry.attr}())\n"
        )
        program.chmod(0o755)
