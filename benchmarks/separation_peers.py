"""How fast do other projects separate, and how fast do we, on the same audio?

    python benchmarks/separation_peers.py [--seconds 10.5] [--threads 1]

BS-RoFormer (`pip install BS-RoFormer`) is measured where it is installed.

Each system separates the same stereo song in memory as its own program does by default, in a
process of its own, after a second of warm-up. All but ours have random weights, which take the same
time as trained ones; so do our two presets. Speed is all that is compared: networks of random
weights separate nothing.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from fractions import Fraction
from importlib.util import find_spec

import torch
from record import record, table
from subprocess_benchmark import peak_gib, run, start
from torch import Tensor, nn

from tfswa_lab.audio import SAMPLE_RATE, STEMS
from tfswa_lab.inference.separate import Segmentation, separate_track
from tfswa_lab.models.storage import load_separator
from tfswa_lab.training.presets import PRESETS
from tfswa_lab.training.run import separator_of
from tfswa_lab.weights import BAND

WARM_UP_SECONDS = 1
System = tuple[nn.Module, Callable[[Tensor], Tensor]]  # and what separates a song (2, s) with it


def ours(separator: nn.Module) -> System:
    """Segments of 6 s that overlap by a quarter."""
    return separator, lambda song: separate_track(separator.eval(), song)


def htdemucs() -> System:
    """As large as its model `htdemucs`; segments of 7.8 s overlap by a quarter, one shift."""
    from demucs.apply import apply_model
    from demucs.htdemucs import HTDemucs

    model = HTDemucs(STEMS, bottom_channels=512, dconv_mode=3, segment=Fraction(39, 5)).eval()
    return model, lambda song: apply_model(model, song[None])


def open_unmix(name: str) -> System:
    """Whole songs, with a round of Wiener filtering."""
    import openunmix
    from openunmix.predict import separate

    separator = getattr(openunmix, name)(pretrained=False)
    separator.freeze()
    return separator, lambda song: separate(song, SAMPLE_RATE, separator=separator)


def bs_roformer() -> System:
    """The six layers of its paper, which trains a network for each stem; segments of about 8 s."""
    from bs_roformer import BSRoformer

    plain = {"time_transformer_depth": 1, "freq_transformer_depth": 1, "num_residual_streams": 1}
    model = BSRoformer(384, depth=6, stereo=True, **plain).eval()
    segmentation = Segmentation(689 * 512 / SAMPLE_RATE)  # it drops what is less than a hop
    model.sample_rate = SAMPLE_RATE
    return model, lambda song: separate_track(model, whole_hops(song), segmentation)


def whole_hops(song: Tensor) -> Tensor:
    """Without what is less than a hop."""
    return song[:, : song.shape[1] // 512 * 512]


SYSTEMS = {
    "ours, shipped weights": lambda: ours(load_separator(BAND)),
    "ours, preset small": lambda: ours(separator_of(PRESETS["small"])),
    "ours, preset default": lambda: ours(separator_of(PRESETS["default"])),
    "HTDemucs": htdemucs,
    "Open-Unmix, umxhq": lambda: open_unmix("umxhq"),
    "Open-Unmix, umxl": lambda: open_unmix("umxl"),
}
if find_spec("bs_roformer"):
    SYSTEMS["BS-RoFormer, 6 layers, one stem"] = bs_roformer


def song(seconds: float) -> Tensor:
    """Stereo noise `(2, s)`."""
    samples = round(seconds * SAMPLE_RATE)
    return 0.1 * torch.randn(2, samples, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def measure(name: str, seconds: float) -> dict:
    """Parameters, speed and peak memory of one system, in this process."""
    torch.manual_seed(0)
    random.seed(0)  # of Demucs's shift
    model, separate = SYSTEMS[name]()
    separate(song(WARM_UP_SECONDS))
    mixture = song(seconds)
    wall, cpu = time.perf_counter(), time.process_time()
    separate(mixture)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "audio_seconds_per_second": round(seconds / wall, 3),
        "cpu_seconds_per_audio_second": round(cpu / seconds, 3),
        "peak_rss_gib": peak_gib(),
    }


def row(name: str, result: dict) -> list[str]:
    """A line of the table."""
    return [
        name,
        f"{result['parameters'] / 1e6:.2f} M",
        f"{result['audio_seconds_per_second']:.2f}",
        f"{result['cpu_seconds_per_audio_second']:.2f}",
        f"{result['peak_rss_gib']:.2f} GiB",
        "not measured",
    ]


def main() -> None:
    """Measure, record, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.5, help="of the song")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    rows = {
        name: run(__file__, asked.threads, name=name, seconds=asked.seconds) for name in SYSTEMS
    }
    record("separation_peers", "cpu", {"systems": rows, **vars(asked)})
    columns = ["system", "parameters", "audio, s per s", "CPU, s per s of audio", "peak", "GPU"]
    print(table(columns, [row(name, result) for name, result in rows.items()]))


if __name__ == "__main__":
    start(main, measure)
