"""A user's word for a device, and the words that make no sense."""

import pytest
import torch

from tfswa_lab.device import pick_device


def test_auto_is_the_gpu_where_there_is_one():
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_device_that_was_picked_can_be_picked_again():
    assert pick_device(pick_device("cpu")) == torch.device("cpu")


def test_a_misspelt_device_is_named():
    for name in ("gpu0", torch.device("meta")):
        with pytest.raises(ValueError, match=f"device='{name}' is unknown"):
            pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no CUDA GPU"):
        pick_device("cuda")
