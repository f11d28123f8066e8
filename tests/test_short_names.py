"""Each short name is called in a fresh interpreter, because imports depend on their order."""

import subprocess
import sys
from textwrap import dedent

import pytest

SNIPPETS = {
    "networks": """
        import torch
        from tfswa_lab.models import MaskResUNet, TFLocoformer, TFSWAResUNet, TFSWAUNet
        x = torch.zeros(1, 2, 32, 32)
        sizes = {"dims": (8,) * 4, "depths": (1,) * 4, "num_heads": 1}
        locoformer = TFLocoformer(2, 2, dim=8, num_blocks=1, hidden_dim=8, attention_dim=8)
        networks = (TFSWAUNet(2, 2, **sizes), TFSWAResUNet(2, 2), MaskResUNet(2, 2), locoformer)
        for network in networks:
            assert network.eval()(x).shape == x.shape
    """,
    "blocks": """
        import torch
        from tfswa_lab.models import RotaryAttention, TFLocoformerBlock, TFSWABlock, TFSWAModule
        x = torch.zeros(1, 8, 8, 8)
        for block in (TFSWABlock(8, 1), TFSWAModule(8, 1)):
            assert block(x).shape == x.shape
        assert RotaryAttention(8, 8, 2)(x[0]).shape == x[0].shape
    """,
    "separators": """
        import tempfile, torch
        from tfswa_lab.models import build_separator, load_separator, save_separator
        sizes = {"dims": (8,) * 4, "depths": (1,) * 4, "num_heads": 1}
        separator = build_separator(("vocals", "other"), n_fft=128, hop_length=32, **sizes)
        with tempfile.TemporaryDirectory() as folder:
            again = load_separator(save_separator(separator, folder))
        x = torch.zeros(1, 2, 500)
        assert torch.equal(again(x), separator.eval()(x))
    """,
    "a song": """
        from tfswa_lab.data import render_song
        assert len(render_song(0, 4.0).stems) == 4
    """,
    "data sets": """
        from tfswa_lab.data import MIR1K, MUSDB18Dataset
        for data_set in (MIR1K, MUSDB18Dataset):
            try:
                data_set("/no such folder")
            except FileNotFoundError as error:
                assert "no such folder" in str(error)
            else:
                raise AssertionError(data_set)
    """,
}


@pytest.mark.parametrize("name", SNIPPETS)
def test_short_names_can_be_called(name):
    code = dedent(SNIPPETS[name])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
