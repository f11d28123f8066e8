"""The code blocks of README.md run, in order, with a tiny model in place of a reader's own."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def make_step():
    model = nn.Linear(8, 8)
    return lambda: model(torch.zeros(4, 8)).sum().backward()


def trained():
    model = nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters())

    def step_with(items):
        optimizer.zero_grad()
        model(torch.zeros(items, 8)).sum().backward()
        optimizer.step()

    return {"model": model, "optimizer": optimizer, "step_with": step_with}


@pytest.fixture
def readers_names():
    """The variables that the blocks use and do not define."""
    generator = torch.Generator().manual_seed(0)
    references, noise = torch.randn(2, 4, 2, 44_100, generator=generator)
    return {
        "mixture": references.sum(0)[None, :, :4_410],  # (b, c, s)
        "waveform": references[0, :, :4_410],  # (c, s)
        "references": references,
        "estimates": references + 0.1 * noise,
        "features": torch.randn(2, 50, 3, generator=generator),
        "states": torch.randint(2, (2, 50), generator=generator),
        "make_step": make_step,
        "step": make_step(),
        **trained(),
        **dict.fromkeys(("load_one", "load_other"), nn.Identity),
        **dict.fromkeys(("run_one", "run_other"), nn.Module.__call__),
    }


def test_the_code_blocks_run(readers_names, tmp_path, monkeypatch, assert_no_leak):
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) >= 4
    for block in BLOCKS:
        exec(block, readers_names)
    assert readers_names["stems"].shape == (1, 4, 2, 4_410)
    assert readers_names["voice"].shape == (2, 4_410)
    assert (tmp_path / "my_model" / "separator.safetensors").is_file()
    readers_names["test_training_loses_nothing"](assert_no_leak)


def test_a_new_terminal_is_told_to_activate_the_environment_before_its_first_command():
    activate = README.index("source .venv/bin/activate")
    assert r".venv\Scripts\Activate.ps1" in README
    for command in ("tfswa-lab", "python", "papermill", "nbstripout"):
        blocks_and_spans = re.finditer(rf"(?:^|`){command} (?!-m venv)", README, re.MULTILINE)
        assert min(found.start() for found in blocks_and_spans) > activate, command


def test_the_name_is_spelt_out_at_its_first_use():
    first = re.search("TFSWA.*", README)[0]
    assert "temporal-frequency and shifted window attention" in first
