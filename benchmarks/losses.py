"""How large are the gradients of each loss, and how does the floor of the logarithm change them?

    python benchmarks/losses.py

Gradients of every loss with respect to the estimates, for the band's test songs and estimates that
hold so much of the rest of the song that their SDR is 10 dB. The weights of
`SourceSeparationLoss` have to balance the ratios of their norms.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from record import record, table
from torch import Tensor, nn

from tfswa_lab.data.band import ensure_band
from tfswa_lab.data.musdb import MUSDB18Dataset
from tfswa_lab.stft import STFTProcessor
from tfswa_lab.training.losses import (
    L1SpectrogramLoss,
    L1WaveformLoss,
    MultiResolutionSTFTLoss,
    SDRLoss,
    SISDRLoss,
)

SDR_DB = 10.0
FLOORS = (1.0, 0.1, 0.01, 1e-3, 1e-4)


def pairs() -> list[tuple[Tensor, Tensor]]:
    """Estimates and targets `(1, n, c, s)`, one pair for each segment of the test songs."""
    found = []
    for item in MUSDB18Dataset(ensure_band(), "test", segment_seconds=6.0):
        targets = item["stems"][None]
        power = targets.square().mean((2, 3), keepdim=True)
        if power.min() < 1e-6:
            continue  # a stem is silent: no ratio
        rest = item["mixture"] - targets
        gain = (power / rest.square().mean((2, 3), keepdim=True)).sqrt() * 10 ** (-SDR_DB / 20)
        found.append((targets + gain * rest, targets))
    return found


def gradient(loss: nn.Module, estimates: Tensor, targets: Tensor) -> Tensor:
    """Of the mean of a loss with respect to the estimates."""
    estimates = estimates.clone().requires_grad_()
    loss(estimates, targets).mean().backward()
    return estimates.grad


def norms(losses: dict[str, nn.Module], segments: list) -> dict[str, float]:
    """Median norm of the gradient over segments, as multiples of the first loss's."""
    found = defaultdict(list)
    for estimates, targets in segments:
        for name, loss in losses.items():
            found[name].append(gradient(loss, estimates, targets).norm())
    medians = {name: torch.stack(values).median().item() for name, values in found.items()}
    first = next(iter(medians.values()))
    return {name: round(value / first, 2) for name, value in medians.items()}


def logarithm(floor: float, segments: list) -> dict[str, float]:
    """Norm of the logarithm's gradient over the magnitudes', and how much of it is treble."""
    both = MultiResolutionSTFTLoss(floor=floor)
    linear = MultiResolutionSTFTLoss(log_weight=0.0)
    stft, ratios, treble = STFTProcessor(), [], []
    for estimates, targets in segments:
        plain = gradient(linear, estimates, targets)
        logs = gradient(both, estimates, targets) - plain
        power = stft(logs).abs().square()
        ratios.append(logs.norm() / plain.norm())
        treble.append(power[..., round(16_000 / 44_100 * stft.n_fft) :, :].sum() / power.sum())
    return {
        "over_magnitudes": round(torch.stack(ratios).median().item(), 2),
        "share_above_16_khz": round(torch.stack(treble).median().item(), 3),
    }


def main() -> None:
    """Measure, record, print."""
    segments = pairs()
    losses = {
        "waveform": L1WaveformLoss(),
        "l1": L1SpectrogramLoss(),
        "mrstft": MultiResolutionSTFTLoss(),
        "sdr": SDRLoss(),
        "si_sdr": SISDRLoss(),
    }
    result = {
        "segments": len(segments),
        "sdr_db": SDR_DB,
        "gradient_norms": norms(losses, segments),
        "floors": {str(floor): logarithm(floor, segments) for floor in FLOORS},
    }
    record("losses", "cpu", result)
    print(table(["loss", "norm of the gradient"], result["gradient_norms"].items()))
    rows = [
        (floor, row["over_magnitudes"], f"{row['share_above_16_khz']:.0%}")
        for floor, row in result["floors"].items()
    ]
    print("\n" + table(["floor", "over magnitudes", "share above 16 kHz"], rows))


if __name__ == "__main__":
    main()
