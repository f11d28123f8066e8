"""Pack MIR-1K's training clips so that they travel to a GPU machine with the checkout.

    python benchmarks/gpu.py carry mir1k ROOT .gpu/mir1k

The lowest two of 16 bits are rounded off, since FLAC stores such samples in 14 bits. That adds
noise of -88.6 dB relative to full scale (-84.3 dB at its peaks), at least 63 dB below either
channel of any clip. Labels stay as they are.

The pack is read like any folder of MIR-1K: `MIR1K(folder, "train")`.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path

import numpy as np
import soundfile
from wheels import CHECKOUT, TRAVELS, folder_bytes, total, tree_bytes

from tfswa_lab import audio
from tfswa_lab.data.mir1k import MIR1K, RATE, Clip

TITLE = "# MIR-1K's training clips, rounded to 14 bits"
CARD = f"""{TITLE}

The clips of the singers abjones and amy, for training on a machine without network. Left channel:
accompaniment; right channel: voice; 16 kHz FLAC. Beside each clip, unchanged: pitch (`.f0.txt`) and
voice (`.vocal.txt`) every 20 ms.

The lowest two of 16 bits are rounded off to save room: noise of -88.6 dB relative to full scale.
Do not score on these clips.

Made by `python benchmarks/gpu.py carry mir1k`, which replaces this folder as a whole.

Source: MIR-1K, Chao-Ling Hsu and Jyh-Shing Roger Jang, "On the Improvement of Singing Voice
Separation for Monaural Recordings Using the MIR-1K Dataset", IEEE TASLP 18(2), 2010. It states no
licence: keep this folder out of git and do not pass it on.
"""


def round_off(samples: np.ndarray) -> np.ndarray:
    """The nearest multiples of 4 among 16-bit integers; 32767 has none above, so it goes down."""
    return (np.minimum(np.rint(samples / 4), 8191) * 4).astype(np.int16)


def encode(clip: Clip) -> bytes:
    """A clip as FLAC, rounded off and compressed as far as FLAC goes."""
    waveform, _ = audio.read(clip.path)
    samples = round_off(audio.to_int16(waveform).T.numpy())
    file = io.BytesIO()
    soundfile.write(file, samples, RATE, format="FLAC", subtype="PCM_16", compression_level=1.0)
    return file.getvalue()


def pack(clips: list[Clip]) -> dict[str, bytes]:
    """All files of the pack by name, in memory, so that their size is known before any is there."""
    files = {"README.md": CARD.encode()}
    for clip in clips:
        files[f"train/{clip.name}.flac"] = encode(clip)
        files[f"train/{clip.name}.f0.txt"] = clip.pitch_path.read_bytes()
        files[f"train/{clip.name}.vocal.txt"] = clip.vocal_path.read_bytes()
    return files


def carry(root: str | Path, folder: str | Path, limit: int = TRAVELS) -> None:
    """Pack the training clips of `root` into `folder`, or leave everything as it was.

    Prints what travels in all.

    Args:
        root: the folder of MIR-1K, in either layout.
        folder: where the pack goes; an earlier pack there is replaced.
        limit: bytes that the checkout, `.whl/core` and the pack must stay below together.

    Raises:
        FileExistsError: `folder` is there and no such pack.
        FileNotFoundError, ValueError: `root` is not MIR-1K, or a clip is broken.
        ValueError: the pack would be too large.
    """
    folder = Path(folder).expanduser()
    refuse_foreign(folder)
    clips = MIR1K(root, "train").clips
    files = pack(clips)
    sizes = {
        "checkout": tree_bytes(),
        ".whl/core": folder_bytes(CHECKOUT / ".whl" / "core"),
        f"{len(clips)} clips": sum(map(len, files.values())),
    }
    if sum(sizes.values()) >= limit:
        raise ValueError(
            f"too much to travel to the GPU machine: {total(sizes, limit)}; make the checkout "
            "smaller (git status --short names what git neither tracks nor ignores)"
        )
    write(files, folder)
    print(f"{folder}: {total(sizes, limit)}")


def refuse_foreign(folder: Path) -> None:
    """Stop before a folder is replaced that this script did not make."""
    card = folder / "README.md"
    if folder.exists() and not (card.is_file() and card.read_bytes().startswith(TITLE.encode())):
        raise FileExistsError(
            f"{folder} is there and no pack of MIR-1K; delete it or choose another folder"
        )


def write(files: dict[str, bytes], folder: Path) -> None:
    """Write a folder whole: under another name, beside it, and then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as beside:
        new = Path(beside) / "new"
        for name, content in files.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_bytes(content)
        if folder.exists():
            folder.replace(Path(beside) / "old")
        new.replace(folder)
