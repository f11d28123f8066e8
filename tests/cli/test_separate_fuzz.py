"""Hundreds of malformed files: each gives whole stems or one line, never a traceback or silence."""

import json
import random
import struct

import numpy as np
import pytest
import soundfile
from torch import nn
from typer.testing import CliRunner

from tfswa_lab.cli import app
from tfswa_lab.models import storage

SAMPLES = 12_000
KINDS = {"wav": "PCM_16", "aiff": "PCM_16", "flac": "PCM_16", "ogg": None, "mp3": None, "w64": None}


class Copies(nn.Module):
    """One stem, the mixture itself."""

    stems, audio_channels, sample_rate = ("same",), 2, 44_100

    def forward(self, mixture):
        return mixture[:, None]


def healthy(folder):
    """The bytes of one short song in every kind of file."""
    rng = np.random.default_rng(0)
    samples = 0.2 * np.sin(np.arange(SAMPLES) / 9)[:, None] + 0.05 * rng.standard_normal((1, 2))
    found = {}
    for ending, subtype in KINDS.items():
        soundfile.write(folder / f"song.{ending}", samples, 44_100, subtype)
        found[ending] = (folder / f"song.{ending}").read_bytes()
    return found


def cut(content, draw):
    return content[: draw.randrange(len(content))]


def flip(content, draw):
    """Some bytes of the first kilobyte, where headers are."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(min(1024, len(changed)))] = draw.randrange(256)
    return bytes(changed)


def resize(content, draw):
    """A size or count of 32 bits near the start is another number."""
    changed, place = bytearray(content), draw.randrange(4, 64)
    changed[place : place + 4] = struct.pack("<I", draw.choice([0, 1, 2**16, 2**31 - 1, 2**32 - 1]))
    return bytes(changed)


def splice(content, draw):
    """A hole in the middle."""
    start = draw.randrange(len(content) // 2)
    return content[:start] + content[start + draw.randrange(1, 2000) :]


def noise(_content, draw):
    return draw.randbytes(draw.randrange(4000))


def faulty(folder, count):
    """Malformed songs: file → what was done to it."""
    draw, sound, made = random.Random(0), healthy(folder), {}
    damages = {"cut": cut, "flip": flip, "resize": resize, "splice": splice, "noise": noise}
    weights = (4, 6, 6, 3, 1)
    for number in range(count):
        ending = draw.choice([*KINDS])
        damage = draw.choices([*damages], weights)[0]
        path = folder / "faulty" / f"{number:03d} {damage}.{ending}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(damages[damage](sound[ending], draw))
        made[path] = damage
    return made


@pytest.mark.filterwarnings("ignore")
def test_malformed_files_end_in_whole_stems_or_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "load_separator", lambda model: Copies().eval())
    songs, out, log = faulty(tmp_path, 320), tmp_path / "out", tmp_path / "log.jsonl"
    options = ["--out", str(out), "--jsonl", str(log)]
    result = CliRunner().invoke(app, ["separate", *map(str, songs), *options])
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    records = {record["song"]: record for record in map(json.loads, log.read_text().splitlines())}
    assert len(records) == len(songs)
    stems = set()
    for path, damage in songs.items():
        record = records[str(path)]
        if "error" in record:
            assert path.name in record["error"]
            assert "\n" not in record["error"]
            continue
        stem = out / path.stem / "same.wav"
        stems.add(stem)
        seconds = soundfile.info(stem).duration
        assert abs(seconds - record["seconds"]) < 1e-3
        # What a header says of rate or size may be lies; but samples do not vanish unsaid.
        if damage == "cut" and path.suffix not in (".ogg",):
            assert seconds * 44_100 >= SAMPLES, (path, seconds * 44_100)
    assert {path for path in out.rglob("*") if path.is_file()} == stems
    assert 0 < len(stems) < len(songs)
