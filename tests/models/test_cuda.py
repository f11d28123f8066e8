"""The same numbers on a GPU, and the memory that checkpointing saves there."""

import pytest
import torch

from tfswa_lab.models.attention import ShiftedWindowAttention
from tfswa_lab.models.separator import build_separator
from tfswa_lab.models.tfswa_unet import SIZES, TFSWAUNet
from tfswa_lab.stft import STFTProcessor

pytestmark = pytest.mark.gpu


def test_the_separator_gives_the_cpus_samples():
    torch.manual_seed(0)
    separator = build_separator(("vocals", "other"), **SIZES["tiny"]).eval()
    mixture = 0.1 * torch.randn(1, 2, 44_100)
    with torch.inference_mode():
        on_cpu = separator(mixture)
        on_card = separator.cuda()(mixture.cuda()).cpu()
    torch.testing.assert_close(on_card, on_cpu, atol=1e-3, rtol=0)


def test_masked_windows_give_the_cpus_values_and_gradients():
    torch.manual_seed(0)
    unit = ShiftedWindowAttention(16, 2, window_size=8, shift_size=4)
    x = torch.randn(2, 16, 19, 27)
    results = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).requires_grad_()
        output = unit.to(device)(leaf)
        output.square().sum().backward()
        results.append((output.detach().cpu(), leaf.grad.cpu()))
    for on_cpu, on_card in zip(*results, strict=True):
        torch.testing.assert_close(on_card, on_cpu, atol=1e-3, rtol=1e-3)


def test_the_round_trip_is_as_good_as_on_the_cpu():
    assert 0 < STFTProcessor().reconstruction_error(torch.randn(2, 100_001, device="cuda")) <= 1e-6


def test_checkpointing_lowers_the_peak():
    def peak_bytes(activation_checkpointing):
        torch.manual_seed(0)
        model = TFSWAUNet(**SIZES["tiny"], activation_checkpointing=activation_checkpointing).cuda()
        x = torch.randn(1, 2, 128, 512, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        model(x).mean().backward()
        return torch.cuda.max_memory_allocated()

    assert peak_bytes(True) < 0.8 * peak_bytes(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_stays_close_to_float32(dtype):
    torch.manual_seed(0)
    model = TFSWAUNet(**SIZES["tiny"]).cuda()
    x = torch.randn(1, 2, 64, 128, device="cuda")
    with torch.no_grad():
        exact = model(x)
        with torch.autocast("cuda", dtype):
            rough = model(x)
    assert (rough.float() - exact).abs().mean() < 0.02
