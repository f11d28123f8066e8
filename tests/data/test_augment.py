"""Augmentation: the identities of a batch, what is drawn and how often, what is refused."""

import copy

import pytest
import torch

from tfswa_lab.data.augment import (
    AudioAugmentation,
    Augmentation,
    Chain,
    ChannelSwap,
    Gain,
    MixupAugmentation,
    PitchShift,
    Polarity,
    Remix,
    SpectrogramMasking,
    SpeedPerturbation,
    TimeStretch,
)
from tfswa_lab.data.augment.stretch import time_stretch

EVERY = {
    "remix": Remix(),
    "mixup": MixupAugmentation(tracks=3, apply_prob=1.0),
    "stretch": TimeStretch(),
    "pitch": PitchShift(),
    "speed": SpeedPerturbation((0.9, 1.1)),
    "gain": Gain(),
    "swap": ChannelSwap(),
    "polarity": Polarity(),
    "audio": AudioAugmentation(time_stretch_prob=0.5, pitch_prob=0.5),
    "chain": Chain([Remix(), MixupAugmentation(), Gain()]),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise_batch(covered=True, items=4, stems=3, channels=2, samples=9000):
    """Noise whose stems add up to the mixture, or leave the last of them as the rest."""
    sources = 0.1 * torch.randn(items, stems, channels, samples, generator=seeded(1))
    return {
        "mixture": sources.sum(1),
        "stems": sources if covered else sources[:, :-1],
        "track": [f"song {k}" for k in range(items)],
        "start_seconds": torch.arange(items, dtype=torch.float64),
    }


def rest(batch):
    return batch["mixture"] - batch["stems"].sum(1)


def difference(x, y):
    """Relative. Where neighbouring bins cancel, a vocoder makes much of a rounding error."""
    return ((x - y).norm() / y.norm()).item()


# --- what holds for all ----------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_the_mixture_is_the_sum_and_the_rest_is_changed_as_one_more_stem(name):
    batch, peer = noise_batch(covered=False), EVERY[name](noise_batch(), seeded())
    new = EVERY[name](batch, seeded())
    assert new["stems"].shape == batch["stems"].shape
    assert rest(peer).abs().max() <= 1e-6
    assert difference(rest(new), peer["stems"][:, -1]) < 0.01
    assert difference(new["stems"], peer["stems"][:, :-1]) < 0.01


@pytest.mark.parametrize("name", EVERY)
def test_the_seed_alone_decides_and_nothing_else_is_touched(name):
    batch = noise_batch(covered=False)
    before, global_state = copy.deepcopy(batch), torch.get_rng_state()
    first, second, other = (EVERY[name](batch, seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(first["mixture"], second["mixture"])
    assert torch.equal(first["stems"], second["stems"])
    assert not torch.equal(first["stems"], other["stems"])
    assert torch.equal(torch.get_rng_state(), global_state)
    for key in ("mixture", "stems", "start_seconds"):
        assert torch.equal(batch[key], before[key])
    assert first["track"] == batch["track"]


@pytest.mark.parametrize(
    "augment",
    [
        AudioAugmentation(
            time_stretch_prob=0,
            pitch_prob=0,
            gain_prob=0,
            channel_swap_prob=0,
            polarity_prob=0,
        ),
        SpeedPerturbation(prob=0),
        MixupAugmentation(apply_prob=0),
        Chain([]),
    ],
)
def test_a_probability_of_zero_changes_nothing(augment):
    batch = noise_batch()
    assert torch.equal(augment(batch, seeded())["stems"], batch["stems"])


def test_a_missing_sample_is_left_for_the_trainer_to_find():
    batch = noise_batch()
    batch["mixture"][1, 0, 5] = torch.nan
    assert Gain()(batch, seeded())["mixture"][1].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize("name", EVERY)
def test_a_card_gives_the_cpus_batch(name):
    batch = noise_batch(covered=False)
    on_card = {**batch, "mixture": batch["mixture"].cuda(), "stems": batch["stems"].cuda()}
    new, peer = EVERY[name](on_card, seeded()), EVERY[name](batch, seeded())
    assert new["stems"].is_cuda
    assert difference(new["mixture"].cpu(), peer["mixture"]) < 0.02


# --- remix and mixup -------------------------------------------------------------------------


def test_remix_keeps_every_stem_and_moves_each_on_its_own():
    """Stem j of item i holds the number 10 j + i, so a number says where it came from."""
    stems = (torch.arange(8.0)[:, None] + 10 * torch.arange(4.0)).reshape(8, 4, 1, 1)
    batch = {"mixture": stems.sum(1), "stems": stems}
    new = Remix()(batch, seeded())["stems"][..., 0, 0]
    orders = new - 10 * torch.arange(4.0)
    assert torch.equal(orders.sort(0).values, torch.arange(8.0)[:, None].expand(8, 4))
    assert len({tuple(order) for order in orders.T.tolist()}) == 4


def test_every_shuffle_of_three_items_is_equally_likely():
    stems = torch.arange(3.0).reshape(3, 1, 1, 1)
    batch, generator = {"mixture": stems[:, 0], "stems": stems}, seeded()
    drawn = [tuple(Remix()(batch, generator)["stems"].flatten().tolist()) for _ in range(1200)]
    counts = [drawn.count(order) for order in set(drawn)]
    assert len(counts) == 6
    assert all(abs(count - 200) < 60 for count in counts)  # 4.6 standard deviations


def test_mixup_weights_are_beta_and_come_from_different_items():
    """Items are unit vectors, so that a mix shows its own weights."""
    stems = torch.eye(6).reshape(6, 1, 1, 6).expand(6, 500, 1, 6)
    batch = {"mixture": stems.sum(1), "stems": stems}
    for tracks, alpha in ((2, 0.4), (2, 1.0), (3, 1.0)):
        augment = MixupAugmentation(tracks, alpha, apply_prob=1.0)
        weights = augment(batch, seeded())["stems"][:, :, 0]  # (item, draw, weight)
        torch.testing.assert_close(weights.sum(-1), torch.ones(6, 500))
        assert ((weights > 0).sum(-1) <= tracks).all()
        own = weights.diagonal(dim1=0, dim2=2)
        # the marginal of a symmetric Dirichlet: Beta(alpha, (tracks - 1) alpha)
        variance = (tracks - 1) / tracks**2 / (tracks * alpha + 1)
        assert abs(own.mean() - 1 / tracks) < 0.03
        assert abs(own.var() - variance) < 0.1 * variance
        others = weights.mean(1)[~torch.eye(6, dtype=bool)]
        assert (others - (1 - 1 / tracks) / 5).abs().max() < 0.05  # all partners alike


def test_mixup_is_applied_as_often_as_asked():
    batch = noise_batch(items=4, stems=1000, channels=1, samples=2)
    mixed = MixupAugmentation(apply_prob=0.3)(batch, seeded())["stems"] != batch["stems"]
    assert abs(mixed.any(-1).float().mean() - 0.3) < 0.03


# --- level, channels, sign -------------------------------------------------------------------


def test_gains_are_one_number_per_stem_within_their_range():
    batch = noise_batch(items=50, stems=20, samples=10)
    ratio = Gain()(batch, seeded())["stems"] / batch["stems"]
    factors = ratio.mean((2, 3), keepdim=True)
    torch.testing.assert_close(ratio, factors.expand_as(ratio))
    assert 0.7 <= factors.min() < 0.71
    assert 1.29 < factors.max() <= 1.3
    assert abs(factors.mean() - 1) < 0.02


@pytest.mark.parametrize("augment", [ChannelSwap(1.0), Polarity(1.0)])
def test_swap_and_polarity_undo_themselves(augment):
    batch = noise_batch()
    once = augment(batch, seeded())
    assert not torch.equal(once["stems"], batch["stems"])
    assert torch.equal(augment(once, seeded())["stems"], batch["stems"])


def test_swap_and_polarity_choose_half_of_the_stems_each_alone():
    batch = noise_batch(items=40, stems=50, samples=2)
    new = ChannelSwap()(batch, seeded())["stems"]
    swapped = (new == batch["stems"].flip(2)).all((2, 3))
    assert torch.equal(swapped, ~(new == batch["stems"]).all((2, 3)))
    turned = (Polarity()(batch, seeded())["stems"] == -batch["stems"]).all((2, 3))
    for chosen in (swapped.float(), turned.float()):
        assert abs(chosen.mean() - 0.5) < 0.05
        assert chosen.std(1).min() > 0  # not the same for all stems of an item


def test_mono_has_no_channels_to_swap():
    batch = noise_batch(channels=1)
    assert torch.equal(ChannelSwap(1.0)(batch, seeded())["stems"], batch["stems"])


# --- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [Remix(), MixupAugmentation()])
def test_a_single_item_has_nothing_to_mix_with(augment):
    with pytest.raises(ValueError, match="needs at least 2, got 1"):
        augment(noise_batch(items=1), seeded())


@pytest.mark.parametrize(
    ("dtype", "message"), [(torch.int16, "divide by full scale"), (torch.cfloat, "a spectrogram's")]
)
def test_whole_and_complex_numbers_are_refused(dtype, message):
    stems = torch.ones(4, 2, 1, 100).to(dtype)
    with pytest.raises(ValueError, match=f"the mixture: {dtype} .*{message}"):
        Gain()({"mixture": stems[:, 0] + stems[:, 1], "stems": stems}, torch.Generator())


def test_a_batch_whose_mixture_is_not_its_own_is_refused():
    batch = noise_batch()
    with pytest.raises(ValueError, match="expected a mixture"):
        Gain()({**batch, "mixture": batch["mixture"][..., 1:]}, seeded())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gain(prob=1.5), r"prob=1\.5"),
        (lambda: Gain((1.3, 0.7)), r"factor=\(1\.3, 0\.7\)"),
        (lambda: TimeStretch((0.0, 1.0)), "between 0.5 and 2"),
        (lambda: PitchShift((-40, 0)), "between -12 and 12"),
        (lambda: SpeedPerturbation(()), r"factors=\(\)"),
        (lambda: MixupAugmentation(tracks=1), "at least 2"),
        (lambda: MixupAugmentation(alpha=0), "alpha=0"),
        (lambda: AudioAugmentation(pitch_prob=-1), "PitchShift prob=-1"),
        (lambda: SpectrogramMasking(max_bins=-1), "max_bins=-1"),
        (lambda: SpectrogramMasking(max_share=2), "max_share=2"),
        (lambda: time_stretch(torch.zeros(1, 100), 9.0), r"factor=9\.0"),
    ],
)
def test_arguments_that_make_no_sense_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_subclass_must_say_what_it_does():
    with pytest.raises(NotImplementedError, match="Augmentation does not say"):
        Augmentation()(noise_batch(), seeded())
