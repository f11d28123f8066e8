"""Published savings of memory in a TF-Locoformer: the code before and after each claimed fix.

The claims and their numbers come from a report; the code follows its description. All versions are
written out in full, because the lesson shows them.

Axis letters: `b` batch, `c` channels, `t` frames, `f` frequency bins, `s` samples, `n` sequences,
`l` tokens of one sequence, `h` heads, `d` head width. Real networks take `(b, c, t, f)`.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from tfswa_lab.memory import gauges
from tfswa_lab.memory.trace.timeline import Timeline
from tfswa_lab.models.rotary import RotaryAttention, rotary_angles, rotate
from tfswa_lab.models.tf_locoformer import LocoformerLayer, TFLocoformer
from tfswa_lab.stft import STFTProcessor

RATE, N_FFT, HOP, STEMS = 44_100, 4096, 1024, 4
# 12 heads over 2049 bins: the scores of one frequency path of 10 s take 80.89 GiB.
PATIENT = {"dim": 96, "num_blocks": 2, "hidden_dim": 128, "num_heads": 12, "attention_dim": 192}

CLAIMED_GB = {"1 del spec": 40, "2 del in the loop": 20, "3 del q, k, v": 30}
CLAIMED_GB |= {"4 Resample": 5, "5 empty_cache": 10}

Separate = Callable[[nn.Module, STFTProcessor, Tensor], Tensor]
Attend = Callable[[RotaryAttention, Tensor], Tensor]
Step = Callable[[], None]


def as_published(model: nn.Module, stft: STFTProcessor, wave: Tensor) -> Tensor:
    """Stems `(b, n, c, s)` of a mixture `(b, c, s)`."""
    spec = stft(wave)
    x = torch.stack([spec.real, spec.imag], 1).flatten(1, 2).mT  # (b, 2c, t, f)
    output = model(x)  # (b, n · 2c, t, f)
    stems = []
    for part in output.chunk(STEMS, 1):
        est = torch.complex(*part.mT.chunk(2, 1))  # (b, c, f, t)
        wav = stft.istft(est, wave.shape[-1])
        stems.append(wav)
    return torch.stack(stems, 1)


def spec_deleted(model: nn.Module, stft: STFTProcessor, wave: Tensor) -> Tensor:
    """Claim 1: `del spec` after stacking."""
    spec = stft(wave)
    x = torch.stack([spec.real, spec.imag], 1).flatten(1, 2).mT
    del spec
    output = model(x)
    stems = []
    for part in output.chunk(STEMS, 1):
        est = torch.complex(*part.mT.chunk(2, 1))
        wav = stft.istft(est, wave.shape[-1])
        stems.append(wav)
    return torch.stack(stems, 1)


def loop_deleted(model: nn.Module, stft: STFTProcessor, wave: Tensor) -> Tensor:
    """Claim 2: `del` in the loop of inverse transforms."""
    spec = stft(wave)
    x = torch.stack([spec.real, spec.imag], 1).flatten(1, 2).mT
    output = model(x)
    stems = []
    for part in output.chunk(STEMS, 1):
        est = torch.complex(*part.mT.chunk(2, 1))
        wav = stft.istft(est, wave.shape[-1])
        stems.append(wav)
        del est, wav
    return torch.stack(stems, 1)


def attention_as_published(unit: RotaryAttention, tokens: Tensor) -> Tensor:
    """The forward pass of `RotaryAttention`, `(n, l, c)` to the same shape."""
    qkv = rearrange(unit.qkv(tokens), "n l (qkv h d) -> qkv n h l d", qkv=3, h=unit.num_heads)
    angles = rotary_angles(*qkv.shape[-2:], torch.float32, qkv.device)
    q, k, v = rotate(qkv[0], angles), rotate(qkv[1], angles), qkv[2].contiguous()
    del qkv
    out = F.scaled_dot_product_attention(q, k, v)
    return unit.proj(rearrange(out, "n h l d -> n l (h d)"))


def qkv_deleted(unit: RotaryAttention, tokens: Tensor) -> Tensor:
    """Claim 3: `del q, k, v` after attention."""
    qkv = rearrange(unit.qkv(tokens), "n l (qkv h d) -> qkv n h l d", qkv=3, h=unit.num_heads)
    angles = rotary_angles(*qkv.shape[-2:], torch.float32, qkv.device)
    q, k, v = rotate(qkv[0], angles), rotate(qkv[1], angles), qkv[2].contiguous()
    del qkv
    out = F.scaled_dot_product_attention(q, k, v)
    del q, k, v
    return unit.proj(rearrange(out, "n h l d -> n l (h d)"))


FIXED = {
    "1 del spec": {"separate": spec_deleted},
    "2 del in the loop": {"separate": loop_deleted},
    "3 del q, k, v": {"attend": qkv_deleted},
}


class Attending(nn.Module):
    """A `RotaryAttention` with another attention function."""

    def __init__(self, unit: RotaryAttention, attend: Attend):
        super().__init__()
        self.unit, self.attend = unit, attend

    def forward(self, tokens: Tensor) -> Tensor:
        """`(n, l, c)` to the same shape."""
        return self.attend(self.unit, tokens)


def make_step(
    separate: Separate = as_published,
    attend: Attend = attention_as_published,
    training: bool = True,
    seconds: float = 10.0,
    device: torch.device | str = "cpu",
    half: bool = False,
    n_fft: int = N_FFT,
    **sizes,
) -> Step:
    """One step of the patient, for `predict`, `trace` or a GPU.

    Args:
        separate: from waveform to waveforms; one of the functions above.
        attend: the attention of all layers; one of the functions above.
        training: with loss, backward pass and AdamW; otherwise under `no_grad`.
        seconds: length of the stereo mixture.
        device: of network and mixture.
        half: whether autocast uses bfloat16.
        n_fft: of the transform; the hop is a quarter of it.
        sizes: of the `TFLocoformer`, where they differ from `PATIENT`.
    """
    model = TFLocoformer(4, 4 * STEMS, **PATIENT | sizes).to(device)
    for layer in model.modules():
        if isinstance(layer, LocoformerLayer):
            layer.attention = Attending(layer.attention, attend)
    stft = STFTProcessor(n_fft, n_fft // 4)
    wave = torch.randn(1, 2, round(seconds * RATE), device=device)
    optimizer = torch.optim.AdamW(model.parameters())

    def forward() -> Tensor:
        with torch.autocast(wave.device.type, torch.bfloat16, enabled=half):
            return separate(model, stft, wave)

    passes = _passes(forward, training)

    def step() -> None:
        optimizer.zero_grad()
        passes()
        optimizer.step()

    return step if training else passes


def make_alone(separate: Separate = as_published, training: bool = True) -> Step:
    """A step whose network is one convolution, so that the peak is the memory of `separate`."""
    model, stft = nn.Conv2d(4, 4 * STEMS, 1), STFTProcessor(N_FFT, HOP)
    wave = torch.randn(1, 2, 10 * RATE)
    return _passes(lambda: separate(model, stft, wave), training)


def make_attention(attend: Attend = attention_as_published, training: bool = True) -> Step:
    """A step of one attention over the bins of 10 s."""
    sizes = (PATIENT[name] for name in ("dim", "attention_dim", "num_heads"))
    unit, tokens = RotaryAttention(*sizes), torch.randn(431, N_FFT // 2 + 1, PATIENT["dim"])
    return _passes(lambda: attend(unit, tokens), training)


def _passes(forward: Callable[[], Tensor], training: bool) -> Step:
    def step() -> None:
        with torch.set_grad_enabled(training):
            loss = forward().abs().mean()
        if training:
            loss.backward()

    return step


def block_starts(timeline: Timeline) -> list[int]:
    """The event at which the forward pass of each block of the patient begins."""
    starts = {}
    for block in timeline.blocks:
        _, found, path = block.module.partition("blocks.")
        if found and block.phase == "forward":
            starts.setdefault(int(path.split(".")[0]), block.born)
    return [starts[number] for number in sorted(starts)]


def measured(make: Callable[[], Step]) -> int:
    """Peak bytes of a step on the current GPU, without what was allocated before.

    Args:
        make: makes network, mixture and optimizer on that GPU, which count, and returns the step.
    """
    gc.collect()  # garbage that is freed during the step would lower the result
    before = gauges.allocated()
    gauges.reset_peak()
    make()()
    torch.cuda.synchronize()
    return gauges.peak_allocated() - before
