"""A user's word for a device, and the words that make no sense."""

import pytest
import torch

from tfswa_lab.device import pick_device


def test_auto_is_the_gpu_where_there_is_one():
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_misspelt_device_is_named():
    with pytest.raises(ValueError, match="device='gpu0' is unknown"):
        pick_device("gpu0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no CUDA GPU"):
        pick_device("cuda")
