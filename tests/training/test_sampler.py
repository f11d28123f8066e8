"""Every segment once an epoch, whoever reads it and wherever the epoch is resumed."""

import pytest
import torch
from toy_run import ToySongs

from tfswa_lab.training.config import TrainingConfig
from tfswa_lab.training.randomness import generator_for
from tfswa_lab.training.sampler import ShuffledBatches, TrainingLoader


def in_fours(**config):
    return TrainingConfig(batch_size=4, **config)


def test_an_epoch_holds_every_index_once_and_the_next_in_another_order():
    batches = ShuffledBatches(24, in_fours(seed=7))
    first = [index for batch in batches for index in batch]
    batches.start_at(1, 0)
    second = [index for batch in batches for index in batch]
    assert sorted(first) == sorted(second) == list(range(24))
    assert first != second
    assert first != [index for batch in ShuffledBatches(24, in_fours(seed=8)) for index in batch]


def test_over_the_epochs_nothing_is_left_out():
    batches, seen = ShuffledBatches(10, in_fours()), set()
    for epoch in range(6):
        batches.start_at(epoch, 0)
        seen |= {index for batch in batches for index in batch}
    assert seen == set(range(10))


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_each_batch_of_one(processes):
    whole = list(ShuffledBatches(20, in_fours()))
    shares = [ShuffledBatches(20, in_fours(), rank, processes) for rank in range(processes)]
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert sorted(batch) == sorted(index for part in parts for index in part)
        assert {len(part) for part in parts} == {4 // processes}


@pytest.mark.parametrize("first", [0, 1, 3, 5])
def test_an_epoch_goes_on_where_it_was_left(first):
    batches = ShuffledBatches(23, in_fours())
    whole = list(batches)
    batches.start_at(0, first)
    assert list(batches) == whole[first:]


def test_only_whole_steps_count():
    assert len(ShuffledBatches(23, in_fours())) == 5
    assert len(ShuffledBatches(23, in_fours(accumulate=2))) == 4
    with pytest.raises(ValueError, match="batch_size=4 cannot be shared by 3 devices"):
        ShuffledBatches(23, in_fours(), processes=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_repeats_itself_from_any_point_and_draws_from_nothing_else(workers):
    loader = TrainingLoader(ToySongs(12), ShuffledBatches(12, in_fours()), workers, False)
    state = torch.get_rng_state()
    epochs = [[batch["stems"] for batch in loader.epoch(epoch, 0)] for epoch in (0, 1)]
    resumed = [batch["stems"] for batch in loader.epoch(1, 1)]
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(epochs[0][1], epochs[1][1])
    assert [torch.equal(a, b) for a, b in zip(resumed, epochs[1][1:], strict=True)] == [True] * 2
    dataset = ToySongs(12)
    dataset.set_epoch(1)
    (batch, *_) = loader.batches
    assert torch.equal(torch.stack([dataset[index]["stems"] for index in batch]), resumed[0])


def test_neighbouring_numbers_give_unrelated_streams():
    draws = [
        torch.rand(1000, generator=generator_for(seed, step)) for seed in (0, 1) for step in (0, 1)
    ]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(4)
    assert correlation.abs().max() < 0.15
