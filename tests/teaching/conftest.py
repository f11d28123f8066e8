"""What tests of figures share."""

import matplotlib
import matplotlib.pyplot as plt
import pytest


@pytest.fixture
def headless():
    """No window opens, and no setting is left behind."""
    plt.switch_backend("Agg")
    settings = dict(matplotlib.rcParams)
    yield
    plt.close("all")
    assert dict(matplotlib.rcParams) == settings
