"""The curves of a run, for plots in a notebook and for TensorBoard.

Axis letters: `n` stems, `c` channels, `s` samples, `f` bins, `t` frames.

Notebook: 07_training
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tfswa_lab.models.separator import Separator
from tfswa_lab.stft import STFTProcessor

FLOOR_DB = -80.0  # black in the images of spectrograms


class Logbook:
    """Scalars by name as plain lists, and everything as TensorBoard events if there is a folder.

    Args:
        folder: where the events go, None for nowhere.
        history: curves so far.
        step: steps done; what an earlier process logged after that is hidden by TensorBoard.

    >>> logbook = Logbook()
    >>> logbook.scalars(10, {"train/loss": 0.5})
    >>> logbook.scalars(20, {"train/loss": 0.4})
    >>> logbook.history["train/loss"]
    ([10, 20], [0.5, 0.4])
    """

    def __init__(self, folder: Path | None = None, history: dict | None = None, step: int = 0):
        self.history: dict[str, tuple[list[int], list[float]]] = history or {}
        self.writer = None
        self.truth_shown = False
        if folder is not None:
            # Imported here: tensorboard takes seconds, and not every run writes events.
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point for each curve."""
        for name, value in values.items():
            steps, points = self.history.setdefault(name, ([], []))
            steps.append(step)
            points.append(value)
            if self.writer:
                self.writer.add_scalar(name, value, step)

    def separation(self, step: int, separator: Separator, item: dict, estimates: Tensor) -> None:
        """Mixture, targets and estimates `(n, c, s)` of a stretch, to be heard and seen."""
        stems = separator.stems
        waveforms = {f"{s}/estimate": x.cpu() for s, x in zip(stems, estimates, strict=True)}
        if not self.truth_shown:  # it stays the same
            waveforms |= {f"{s}/target": x for s, x in zip(stems, item["stems"], strict=True)}
            waveforms["mixture"] = item["mixture"]
            self.truth_shown = True
        for name, waveform in waveforms.items():
            mono = waveform.mean(0)
            image = spectrogram_image(mono, separator.stft)
            self.writer.add_audio(name, mono.clamp(-1, 1), step, separator.sample_rate)
            self.writer.add_image(name, image, step, dataformats="HW")

    def flush(self) -> None:
        """Put on disk what was logged so far."""
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        """The last events."""
        if self.writer:
            self.writer.close()


def means(terms: list[dict]) -> dict[str, float]:
    """The mean of each of some scalars over several dicts that have the same.

    >>> means([{"loss": 1.0}, {"loss": torch.tensor(2.0)}])
    {'loss': 1.5}
    """
    values = torch.stack([torch.stack([torch.as_tensor(x) for x in t.values()]) for t in terms])
    return dict(zip(terms[0], values.double().mean(0).tolist(), strict=True))


def spectrogram_image(waveform: Tensor, stft: STFTProcessor) -> Tensor:
    """Level in each bin as a grey value in [0, 1], low bins at the bottom.

    White is a full-scale tone, black is 80 dB below, in every image: they can be compared.

    Args:
        waveform: `(s,)`.
        stft: window and hop.
    """
    full_scale = stft.n_fft / 4  # of a Hann window
    db = 20 * (stft(waveform).abs() / full_scale).clamp(min=1e-9).log10()
    return (1 - db / FLOOR_DB).clamp(0, 1).flip(0).to(torch.float32)
