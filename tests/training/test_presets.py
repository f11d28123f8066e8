"""A recipe is the same wherever it is trained."""

from dataclasses import replace

import pytest

from tfswa_lab.training.presets import DEFAULT, PRESETS, SMALL, TINY
from tfswa_lab.training.run import augmentation_for


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("augment", ["none", "light", "full"])
def test_the_augmentation_is_the_same_for_any_number_of_devices(name, augment):
    preset = replace(PRESETS[name], augment=augment)
    counts = [count for count in (1, 2, 4, 8) if preset.batch_size % count == 0]
    recipes = {repr(augmentation_for(preset, preset.batch_size // count)) for count in counts}
    assert recipes == {repr(augmentation_for(preset))}


def test_batches_of_two_or_more_are_remixed_and_a_single_segment_is_not():
    for preset in (SMALL, DEFAULT, replace(TINY, batch_size=2)):
        assert repr(augmentation_for(preset)).startswith("Chain(augmentations=[Remix(), Gain(")
    assert "Remix" not in repr(augmentation_for(TINY))
    assert "Remix" not in repr(augmentation_for(replace(SMALL, batch_size=1)))


def test_the_presets_go_by_name():
    assert PRESETS == {"tiny": TINY, "small": SMALL, "default": DEFAULT}
    assert {preset.size: preset for preset in PRESETS.values()} == PRESETS


@pytest.mark.parametrize("preset", PRESETS.values())
def test_a_preset_can_be_cut_to_any_number_of_steps(preset):
    for steps in (1, 2, 30):
        assert replace(preset, max_steps=steps).warmup(steps) <= steps
