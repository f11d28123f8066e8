"""How a run is watched: curves for notebooks and TensorBoard, a progress bar, speed and memory.

Axis letters: `n` stems, `c` channels, `s` samples, `f` bins, `t` frames.

Notebook: 07_training
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from tfswa_lab.memory import gauges
from tfswa_lab.memory.sizes import MIB
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
        """Mixture, targets and estimates `(n, c, s)` of a segment, to be heard and seen."""
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


def memory_mib(device: torch.device) -> dict[str, float]:
    """Memory in MiB by kind: what torch allocated and reserved on a GPU, else the process's RSS.

    >>> list(memory_mib(torch.device("cpu")))
    ['process_rss']
    """
    if device.type != "cuda":
        return {"process_rss": gauges.process_rss() / MIB}
    return {
        "allocated": gauges.allocated(device) / MIB,
        "reserved": gauges.reserved(device) / MIB,
    }


def progress_bar(step: int, total: int, shown: bool) -> tqdm:
    """A bar from `step` on; where it is not shown, it costs nothing."""
    return tqdm(initial=step, total=total, unit="it", disable=not shown, dynamic_ncols=True)


def advance(bar: tqdm, scalars: dict[str, float], device: torch.device) -> None:
    """One step more, with loss, learning rate and memory beside the speed."""
    if not bar.disable:
        memory = " ".join(f"{name} {mib:.0f} MiB" for name, mib in memory_mib(device).items())
        note = f"loss {scalars['loss']:.4g} lr {scalars['lr']:.2g} {memory}"
        bar.set_postfix_str(note, refresh=False)
    bar.update()


class Pace:
    """How fast steps are made, and how much of the time they wait for data."""

    def __init__(self):
        self._begin()

    def _begin(self) -> None:
        self.waited = 0.0
        self.steps = 0
        self.since = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what fetches the data of one step."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Steps per second and the share of waiting since the last reading."""
        seconds = time.perf_counter() - self.since
        scalars = {"steps_per_second": self.steps / seconds, "data_share": self.waited / seconds}
        self._begin()
        return scalars
