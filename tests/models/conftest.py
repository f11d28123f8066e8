"""What the tests of several heads share."""

from collections.abc import Callable

import pytest
import torch

from tfswa_lab.models.separator import Separator


@pytest.fixture
def check_mixed_precision() -> Callable[[Separator], None]:
    """Mixed precision ends inside of a separator: its estimates are float32, and nearly exact."""

    def check(separator: Separator) -> None:
        mixture = torch.randn(1, 2, 3000)
        exact = separator(mixture)
        with torch.autocast("cpu", torch.bfloat16):
            rough = separator(mixture)
        assert rough.dtype == torch.float32
        assert 0 < (rough - exact).norm() < 0.05 * exact.norm()

    return check
