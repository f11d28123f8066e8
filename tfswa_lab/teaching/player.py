"""Listen to several excerpts at their true levels.

Axis letters: `c` channels, `s` samples.

`IPython.display.Audio` scales every excerpt to full scale: a residual 40 dB below the music sounds
as loud as the music. It also embeds WAV, 2.4 MB for ten stereo seconds. Here a set of excerpts
shares one gain, and Ogg Vorbis takes about a sixteenth of the space.

Notebook: 01_sound_to_spectrogram
"""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Mapping
from html import escape

import soundfile
import torch
from IPython.display import HTML
from torch import Tensor

from tfswa_lab.audio import SAMPLE_RATE, rms_db, to_stereo

MAX_SECONDS = 8.0  # longer excerpts make notebooks large


def play(
    excerpts: Mapping[str, Tensor], rate: int = SAMPLE_RATE, seconds: float = MAX_SECONDS
) -> HTML:
    """Players for a set of excerpts, which keep their levels.

    If an excerpt exceeds full scale, the whole set is turned down by one gain, and the caption
    says so. The levels in the captions are those of the data.

    Args:
        excerpts: caption to waveform `(s,)`, `(1, s)` or `(2, s)`.
        rate: samples per second.
        seconds: at most this much of each excerpt from its start, no more than 8.

    Raises:
        ValueError: no excerpts, too many seconds, or a waveform that cannot be played.
    """
    if not excerpts:
        raise ValueError("play() needs at least one excerpt: play({'mixture': waveform})")
    if not 0 < seconds <= MAX_SECONDS:
        raise ValueError(f"seconds={seconds} must lie in (0, {MAX_SECONDS:g}]; cut an excerpt")
    samples = round(seconds * rate)
    stereo = {name: _checked(name, excerpt)[:, :samples] for name, excerpt in excerpts.items()}
    gain = common_gain(stereo)
    players = "".join(_player(name, excerpt, gain, rate) for name, excerpt in stereo.items())
    return HTML(f'<div style="display:flex;flex-wrap:wrap;gap:1em">{players}</div>{_note(gain)}')


def common_gain(excerpts: Mapping[str, Tensor]) -> float:
    """The gain that brings the loudest peak of a set to full scale, and 1 if none exceeds it.

    >>> common_gain({"soft": torch.tensor([0.5]), "hot": torch.tensor([-1.25])})
    0.8
    """
    peak = max(excerpt.abs().max().item() for excerpt in excerpts.values())
    return min(1.0, 1.0 / peak) if peak else 1.0


def encode_vorbis(waveform: Tensor, rate: int = SAMPLE_RATE) -> bytes:
    """A waveform `(c, s)` as an Ogg Vorbis file in memory."""
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform.T.numpy(), rate, format="OGG", subtype="VORBIS")
    return buffer.getvalue()


def _checked(name: str, excerpt: Tensor) -> Tensor:
    excerpt = torch.as_tensor(excerpt).detach().float().cpu()
    excerpt = excerpt[None] if excerpt.ndim == 1 else excerpt
    if excerpt.ndim != 2 or not excerpt.shape[-1]:
        raise ValueError(f"{name!r}: expected (channels, samples), got {tuple(excerpt.shape)}")
    if not torch.isfinite(excerpt).all():
        raise ValueError(f"{name!r} contains NaN or infinite samples; nothing to hear in those")
    return to_stereo(excerpt)


def _player(name: str, excerpt: Tensor, gain: float, rate: int) -> str:
    source = b64encode(encode_vorbis(gain * excerpt, rate)).decode("ascii")
    level = f"{rms_db(excerpt):.1f} dB" if excerpt.any() else "silent"
    return (
        f'<figure style="margin:0"><figcaption>{escape(name)} · {level}</figcaption>'
        f'<audio controls src="data:audio/ogg;base64,{source}"></audio></figure>'
    )


def _note(gain: float) -> str:
    if gain == 1.0:
        return "<small>Levels kept. dB: RMS relative to full scale.</small>"
    return (
        f"<small>Levels kept relative to each other. All excerpts are turned down by "
        f"{-20 * torch.tensor(gain).log10().item():.1f} dB, because one exceeds full scale. "
        "dB: RMS of the data, before that.</small>"
    )
