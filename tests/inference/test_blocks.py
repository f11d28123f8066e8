"""Blocks instead of whole songs: the same numbers, and never more of the song in memory."""

import gc
import math
import resource
import signal

import pytest
import soundfile
import torch

from tfswa_lab import audio
from tfswa_lab.durable import parts_of
from tfswa_lab.inference import blocks as stream
from tfswa_lab.inference.blocks import read_blocks, resample_blocks, write_blocks
from tfswa_lab.inference.separate import (
    Segmentation,
    cut_segments,
    separate_stream,
    separate_track,
)
from tfswa_lab.models.separator import build_separator

MINI = {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": 1, "window_size": 4}


def identity(mixture):
    return mixture[:, None]


def as_module(function):
    module = torch.nn.Module()
    module.forward, module.sample_rate = function, 1  # a second is a sample
    return module


@pytest.mark.parametrize("shifts", [1, 2])
@pytest.mark.parametrize("size", [997, 4096, 50_000])
def test_a_network_fed_with_blocks_gives_what_it_gives_for_the_whole(size, shifts):
    torch.manual_seed(0)
    separator = build_separator(("vocals", "other"), n_fft=512, hop_length=128, **MINI).eval()
    mixture = 0.1 * torch.randn(2, 12_001)
    segments = Segmentation(4096 / 44_100, batch_size=2, shifts=shifts)
    whole = separate_track(separator, mixture, segments)
    finished = separate_stream(separator, mixture.split(size, dim=-1), 12_001, segments)
    assert torch.equal(torch.cat(list(finished), -1), whole)


def test_the_caller_between_two_blocks_is_not_in_inference_mode():
    mixture = torch.randn(2, 300)
    for block in separate_stream(as_module(identity), [mixture], 300, Segmentation(100)):
        assert not torch.is_inference_mode_enabled()
        assert not block.requires_grad
    separate_track(as_module(identity), mixture, Segmentation(100)).mul_(2)  # an ordinary tensor


def bytes_in_tensors():
    """What all new tensors of this process take, those in suspended generators too."""
    tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("rate_in", [44_100, 22_050])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_is_in_memory_does_not_grow_with_the_song(batch_size, rate_in, new_objects_only):
    ratio, most = 44_100 // rate_in, []
    for length in (20_000, 100_000):
        blocks = (torch.full((2, 500), 0.5) for _ in range(length // 500))
        resampled = resample_blocks(blocks, rate_in, 44_100, size=1000)
        finished = separate_stream(
            as_module(identity),
            resampled,
            ratio * length,
            Segmentation(1000, batch_size=batch_size),
        )
        held = [bytes_in_tensors() for i, _ in enumerate(finished) if i % 9 == 0]
        most.append(max(held))
    segment, block = 2 * 1000 * 4, 2 * 500 * 4  # bytes
    assert segment <= most[0]
    assert most[1] <= 1.2 * most[0]  # of five times the song
    assert most[1] <= (3 * batch_size + 4) * segment + 16 * block


def test_blocks_that_end_early_are_an_error():
    for blocks in ([torch.zeros(2, 90)], [torch.zeros(2, 50), torch.zeros(2, 40)]):
        with pytest.raises(ValueError, match="90 samples, not length=100"):
            list(separate_stream(as_module(identity), blocks, 100, Segmentation(40)))
    with pytest.raises(ValueError, match="0 samples, not length=100"):
        list(cut_segments([], [0, 60], 40))


RATES = [
    (48_000, 44_100),
    (44_100, 48_000),
    (16_000, 44_100),
    (44_100, 16_000),
    (192_000, 8_000),
    (11_025, 44_100),
    (44_100, 44_100),
]


@pytest.mark.parametrize(("rate_in", "rate_out"), RATES)
@pytest.mark.parametrize("length", [1, 999, 20_000, 41_234])
def test_resampled_blocks_are_the_resampled_whole(rate_in, rate_out, length):
    whole = torch.rand(3, 2, length) - 0.5
    expected = audio.resample(whole, rate_in, rate_out)
    for size in (700, 10_000):
        blocks = list(resample_blocks(whole.split(size, dim=-1), rate_in, rate_out, size=2000))
        torch.testing.assert_close(torch.cat(blocks, -1), expected, atol=2e-6, rtol=0)
        assert length < 20_000 or len(blocks) > 1


@pytest.mark.parametrize(("rate_in", "rate_out"), [(44_099, 44_100), (44_100, 44_099)])
def test_rates_without_a_small_ratio_are_resampled_without_seams(rate_in, rate_out):
    whole = torch.rand(1, 160_001) - 0.5
    blocks = list(resample_blocks(whole.split(30_000, dim=-1), rate_in, rate_out, size=2000))
    assert len(blocks) == 3
    expected = audio.resample(whole, rate_in, rate_out)
    torch.testing.assert_close(torch.cat(blocks, -1), expected, atol=1e-6, rtol=0)


def test_more_samples_than_float32_can_count_are_neither_lost_nor_added():
    length, size = 2**24 + 48_001, 2**20
    blocks = (torch.zeros(1, min(size, length - start)) for start in range(0, length, size))
    resampled = sum(block.shape[-1] for block in resample_blocks(blocks, 44_100, 48_000))
    assert resampled == math.ceil(length * 48_000 / 44_100)


@pytest.mark.parametrize("ending", ["wav", "flac", "ogg", "mp3"])
def test_any_format_is_read_in_blocks_as_in_one(tmp_path, ending):
    path = tmp_path / f"song.{ending}"
    soundfile.write(path, (0.1 * torch.randn(30_000, 2)).numpy(), 44_100)
    blocks = list(read_blocks(path, 7000))
    assert [block.shape[-1] for block in blocks] == [7000, 7000, 7000, 7000, 2000]
    assert torch.equal(torch.cat(blocks, -1), audio.read(path)[0])


def test_the_place_of_damage_is_named(tmp_path):
    path, read = tmp_path / "song.flac", []
    soundfile.write(path, (0.1 * torch.randn(100_000, 2)).numpy(), 44_100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"song\.flac is damaged .* samples") as raised:
        read.extend(block.shape[1] for block in read_blocks(path, 10_000))
    assert 40_000 < sum(read) <= 50_000
    assert f"it holds {sum(read)} samples" in str(raised.value)


def test_stems_are_written_to_the_sample(tmp_path):
    paths = [tmp_path / "a.wav", tmp_path / "b.wav"]
    stems = torch.randn(2, 1, 1000)
    peak = write_blocks(paths, stems.split(300, dim=-1), 8000, (1, 950), "FLOAT")
    for path, stem in zip(paths, stems, strict=True):
        written, rate = audio.read(path)
        assert rate == 8000
        assert torch.equal(written, stem[:, :950])
    assert peak == stems[..., :950].abs().max()


def test_a_file_of_more_than_4_gib_counts_its_bytes_with_64_bits(tmp_path, monkeypatch):
    path, block = tmp_path / "long.wav", torch.full((1, 2, 100), 0.25)
    for limit, expected in ((400, "RF64"), (401, "WAV")):
        monkeypatch.setattr(stream, "WAV_BYTES", limit)
        write_blocks([path], [block], 44_100, (2, 100), "PCM_16")
        assert soundfile.info(path).format == expected
        assert torch.equal(audio.read(path)[0], block[0])


@pytest.mark.parametrize("subtype", ["FLOAT", "PCM_16"])
def test_a_full_disk_is_an_error(tmp_path, subtype):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(OSError, match=r"a stem cannot be written into .* is the disk full"):
            write_blocks(
                [tmp_path / "a.wav"], [torch.zeros(1, 2, 2**20)], 8000, (2, 2**20), subtype
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(OSError, match=r"cannot be written into .*nowhere"):
        write_blocks([tmp_path / "nowhere/a.wav"], [], 8000, (1, 10), "FLOAT")
    for block, message in (
        (torch.full((1, 1, 9), torch.nan), "NaN"),
        (torch.zeros(1, 1, 7), "lack 2 of 9 samples"),
    ):
        with pytest.raises(ValueError, match=message):
            write_blocks([tmp_path / "a.wav"], [block], 8000, (1, 9), "FLOAT")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_parts_are_renamed_together_or_removed(tmp_path, error):
    paths = [tmp_path / "a.wav", tmp_path / "b.wav"]
    with parts_of(paths) as parts:
        for part in parts:
            part.write_text("whole")
        assert not any(path.exists() for path in paths)

    def fail():
        with parts_of(paths) as parts:
            parts[0].write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert [path.read_text() for path in sorted(tmp_path.iterdir())] == ["whole", "whole"]
