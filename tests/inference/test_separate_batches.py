"""Several segments at once give what they give one by one, with as many as memory allows."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from tfswa_lab.inference.separate import Segmentation, separate_track
from tfswa_lab.models.separator import build_separator

MINI = {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": 1, "window_size": 4}


@pytest.fixture(scope="module")
def separator():
    torch.manual_seed(0)
    return build_separator(("vocals", "other"), n_fft=512, hop_length=128, **MINI).eval()


@pytest.mark.parametrize(("batch_size", "shifts"), [(2, 1), (3, 1), (100, 1), (4, 2)])
def test_batches_give_what_segments_give_one_by_one(separator, batch_size, shifts):
    mixture = 0.1 * torch.randn(2, 15_000)
    segments = Segmentation(2048 / 44_100, shifts=shifts)
    one_by_one = separate_track(separator, mixture, segments)
    batched = separate_track(separator, mixture, replace(segments, batch_size=batch_size))
    torch.testing.assert_close(batched, one_by_one, atol=1e-6, rtol=0)


class Small(nn.Module):
    """An identity that `fail`s with more than `room` segments; remembers the sizes it was given."""

    sample_rate = 1  # a second is a sample

    def __init__(self, room, fail):
        super().__init__()
        self.room, self.fail, self.sizes = room, fail, []

    def forward(self, mixture):
        self.sizes.append(len(mixture))
        if len(mixture) > self.room:
            self.fail()
        return mixture[:, None]


def on_cuda():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def on_cpu():
    torch.empty(2**50)  # a pebibyte: torch itself says so


def in_a_transform():
    raise RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED")


@pytest.mark.parametrize("fail", [on_cuda, on_cpu, in_a_transform])
def test_a_batch_too_large_is_halved_until_it_fits_and_stays_so(fail):
    mixture, model = torch.randn(2, 64 * 20), Small(3, fail)
    estimates = separate_track(model, mixture, Segmentation(64, 0.0, batch_size=16))
    torch.testing.assert_close(estimates[0], mixture)
    assert model.sizes == [16, 8, 4, *[2] * 10]


def test_a_last_batch_of_fewer_segments_is_halved_itself():
    mixture, model = torch.randn(2, 64 * 5), Small(2, on_cuda)
    estimates = separate_track(model, mixture, Segmentation(64, 0.0, batch_size=100))
    torch.testing.assert_close(estimates[0], mixture)
    assert model.sizes == [5, 2, 2, 1]


@pytest.mark.parametrize("fail", [on_cuda, on_cpu])
def test_one_segment_too_large_says_what_to_do(fail):
    with pytest.raises(torch.OutOfMemoryError, match="one segment of 64 samples; shorten"):
        separate_track(Small(0, fail), torch.zeros(2, 1000), Segmentation(64, batch_size=4))


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def fail():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    model = Small(1, fail)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        separate_track(model, torch.zeros(2, 1000), Segmentation(64, batch_size=4))
    assert model.sizes == [4]


def test_progress_counts_segments_that_are_done():
    model, done = Small(4, on_cuda), []

    def progress(starts):
        for start in starts:
            yield start
            done.append((start, sum(model.sizes)))

    separate_track(model, torch.zeros(2, 64 * 8), Segmentation(64, 0.0, batch_size=4), progress)
    assert [start for start, _ in done] == list(range(0, 512, 64))
    assert all(start // 64 < separated for start, separated in done)


@pytest.mark.gpu
def test_a_gpu_gives_what_the_cpu_gives(separator):
    mixture = 0.1 * torch.randn(2, 30_000)
    segments = Segmentation(4096 / 44_100, batch_size=4)
    on_the_cpu = separate_track(separator, mixture, segments)
    on_the_gpu = separate_track(separator.cuda(), mixture, segments).cpu()
    separator.cpu()
    torch.testing.assert_close(on_the_gpu, on_the_cpu, atol=1e-3, rtol=0)
