"""Whole or not at all; broken and foreign files are told apart, and nothing in them is run."""

import io
import os
import random
import zipfile

import numpy as np
import pytest
import torch
from filelock import FileLock
from toy_run import ToyLoss, ToySongs, toy_trainer, weights

from tfswa_lab.data.augment import Gain, SpectrogramMasking
from tfswa_lab.models.storage import load_separator
from tfswa_lab.stft import RunningSpectrogramNormalizer
from tfswa_lab.training.checkpoint import (
    find_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from tfswa_lab.training.learner import NonFiniteError
from tfswa_lab.training.randomness import random_state, set_random_state

STATE = {"step": 3, "weights": {"a": torch.arange(5.0)}, "list": [1, (2.5, None, "text")]}


def test_a_state_returns_as_it_was(tmp_path):
    path = save_checkpoint(tmp_path, 3, STATE)
    loaded = load_checkpoint(path)
    assert torch.equal(loaded["weights"].pop("a"), torch.arange(5.0))
    assert loaded == {"step": 3, "weights": {}, "list": [1, (2.5, None, "text")]}
    assert find_checkpoint(tmp_path) == find_checkpoint(path) == path


def test_the_last_two_of_a_run_are_kept(tmp_path):
    notes = tmp_path / "checkpoints" / "notes.txt"
    before = None
    for step in (9, 10, 200):
        before = save_checkpoint(tmp_path, step, STATE, before)
        notes.write_text("not ours")
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step_00000010.ckpt",
        "step_00000200.ckpt",
    ]
    # A run that goes on from the older one leaves the newer one behind.
    older, _ = list_checkpoints(tmp_path)
    save_checkpoint(tmp_path, 11, STATE, older)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step_00000010.ckpt",
        "step_00000011.ckpt",
    ]
    assert notes.exists()


@pytest.mark.parametrize("victim", ["write", "fsync", "replace"])
def test_a_write_that_dies_leaves_the_old_file_as_it_was(tmp_path, monkeypatch, victim):
    path = save_checkpoint(tmp_path, 3, STATE)
    content = path.read_bytes()

    def die(*_):
        raise KeyboardInterrupt

    if victim == "fsync":
        monkeypatch.setattr(os, "fsync", die)
    elif victim == "replace":
        monkeypatch.setattr(type(path), "replace", die)
    else:
        monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 3, {**STATE, "step": 4})
    assert path.read_bytes() == content
    assert find_checkpoint(tmp_path) == path
    monkeypatch.undo()
    save_checkpoint(tmp_path, 5, STATE, path)
    assert len(list(path.parent.iterdir())) == 2, "parts are swept up"


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, type(tmp_path).replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(
        type(tmp_path), "replace", lambda *paths: (calls.append("rename"), replace(*paths))
    )
    save_checkpoint(tmp_path, 3, STATE)
    assert calls == ["fsync", "rename", "fsync"]


@pytest.fixture
def pair(tmp_path):
    older = save_checkpoint(tmp_path, 10, STATE)
    return older, save_checkpoint(tmp_path, 20, STATE, older)


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda content: content[: len(content) // 2], r"is cut off: it has \d+ of \d+ bytes"),
        (lambda content: content[:40], "is not a checkpoint of tfswa-lab"),
        (lambda content: b"", "is not a checkpoint of tfswa-lab"),
        (lambda content: content + b"x", "has extra bytes at its end"),
        (flipped, "is damaged"),
        (lambda content: b"some text\n", "is not a checkpoint of tfswa-lab"),
        (lambda content: content[content.index(b"\n") + 1 :], "is not a checkpoint"),  # torch's
    ],
)
def test_a_broken_newest_checkpoint_is_refused_and_the_one_before_offered(pair, harm, message):
    older, newest = pair
    newest.write_bytes(harm(newest.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        load_checkpoint(find_checkpoint(newest.parent.parent))
    assert str(newest) in str(error.value)
    assert f"--resume {older}" in str(error.value)
    load_checkpoint(older)
    older.write_bytes(b"")
    with pytest.raises(ValueError, match=r"no other checkpoint .* is whole"):
        load_checkpoint(newest)


def test_every_single_byte_counts(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"x": torch.zeros(4)})
    content = path.read_bytes()
    for position in random.Random(0).sample(range(len(content)), 60):
        harmed = bytearray(content)
        harmed[position] ^= 1 << position % 8
        path.write_bytes(harmed)
        with pytest.raises(ValueError, match="whole"):
            load_checkpoint(path)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hostile",)


def test_what_a_checkpoint_holds_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save_checkpoint(tmp_path, 1, {"x": Hostile()})  # with a digest that fits
    with pytest.raises(ValueError, match="holds more than tensors and plain containers"):
        load_checkpoint(path)
    assert not (tmp_path / "hostile").exists()


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing to resume.*leave resume out"):
        find_checkpoint(tmp_path)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a", "b")
    (tmp_path / "a.zip").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="is not a checkpoint of tfswa-lab"):
        load_checkpoint(find_checkpoint(tmp_path / "a.zip"))


def test_random_states_return_through_a_file(tmp_path):
    cpu = torch.device("cpu")
    path = save_checkpoint(tmp_path, 1, {"random": random_state(cpu)})

    def draw():
        legacy = np.random.normal(size=3)  # noqa: NPY002
        return random.random(), legacy.tolist(), torch.randn(3).tolist()

    first = draw()
    draw()
    set_random_state(load_checkpoint(path)["random"], cpu)
    assert draw() == first


class L1Only(ToyLoss):
    """Another class."""


class NamedSongs(ToySongs):
    def __init__(self, names):
        super().__init__()
        self.track_names = list(names)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"learning_rate": 0.5}, "training.learning_rate was 0.01, is 0.5"),
        ({"batch_size": 2}, "training.batch_size was 4, is 2"),
        ({"norm": "batch"}, "separator.sizes.norm was group, is batch"),
        ({"train_set": ToySongs(30)}, "segments was 20, is 30"),
        ({"loss": L1Only()}, r"loss was ToyLoss\(.*, is L1Only\("),
        ({"augment": Gain((1, 2))}, r"augment was None, is Gain\(factor=\(1, 2\), prob=1.0\)"),
        ({"masking": SpectrogramMasking(3)}, r"is SpectrogramMasking\(max_bins=3, "),
        ({"train_set": NamedSongs("abc")}, r"songs was without names, is 3, of names [0-9a-f]{8}"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path, config, named):
    toy_trainer(tmp_path, max_steps=2).fit()
    with pytest.raises(ValueError, match=named):
        toy_trainer(tmp_path, max_steps=2, **config).fit(tmp_path)


def test_a_run_goes_on_in_its_folder_or_an_empty_one_never_in_anothers(tmp_path):
    for name in ("a", "b"):
        toy_trainer(tmp_path / name, max_steps=2).fit()
    with pytest.raises(FileExistsError, match="b holds a run already"):
        toy_trainer(tmp_path / "b", max_steps=4).fit(tmp_path / "a")
    assert len(list_checkpoints(tmp_path / "b")) == 1
    toy_trainer(tmp_path / "c", max_steps=4).fit(tmp_path / "a")
    assert len(list_checkpoints(tmp_path / "a")) == len(list_checkpoints(tmp_path / "c")) == 1


def test_an_augmentation_without_words_of_its_own_does_not_stand_in_the_way(tmp_path):
    for _ in range(2):  # another object, at another address

        def nothing(batch, generator):
            return batch

        trainer = toy_trainer(tmp_path, max_steps=2, augment=nothing)
        trainer.fit(tmp_path if list_checkpoints(tmp_path) else None)


def test_weights_of_a_run_whose_checkpoints_are_gone_are_not_written_over(tmp_path):
    toy_trainer(tmp_path, max_steps=2).fit()
    for checkpoint in list_checkpoints(tmp_path):
        checkpoint.unlink()
    with pytest.raises(FileExistsError, match=r"best holds the weights of a run"):
        toy_trainer(tmp_path, max_steps=2).fit()


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    with FileLock(tmp_path / ".lock"):
        with pytest.raises(FileExistsError, match="another process is training in"):
            toy_trainer(tmp_path, max_steps=2).fit()
        assert not list_checkpoints(tmp_path)
    toy_trainer(tmp_path, max_steps=2).fit()


def test_a_folder_that_cannot_be_one_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file cannot be the folder of a run .*another output_dir"):
        toy_trainer(tmp_path / "file")


def test_a_trainer_goes_on_where_it_stands(tmp_path):
    trainer = toy_trainer(tmp_path)
    trainer.learner.loss = OverflowsOnce()
    with pytest.raises(NonFiniteError):
        trainer.fit()
    trainer.fit()
    assert trainer.step == 10


def test_other_versions_are_warned_of(tmp_path, monkeypatch):
    toy_trainer(tmp_path, max_steps=2).fit()
    monkeypatch.setattr("tfswa_lab.training.checkpoint.versions", lambda: {"torch": "3.0"})
    with pytest.warns(UserWarning, match=r"this is \{'torch': '3.0'\}"):
        toy_trainer(tmp_path, max_steps=4).fit(tmp_path)


def test_a_finished_run_is_already_where_it_should_be_and_can_be_prolonged(tmp_path):
    first = toy_trainer(tmp_path, max_epochs=1)
    first.fit()
    again = toy_trainer(tmp_path, max_epochs=1)
    again.fit(tmp_path)
    assert again.step == 5
    assert again.history == first.history
    for name, tensor in weights(first).items():
        assert torch.equal(weights(again)[name], tensor), name
    settings = {"max_epochs": 2, "log_every_n_steps": 1}
    longer = toy_trainer(tmp_path, **settings)
    longer.fit(tmp_path)
    assert longer.step == 10
    rates = toy_trainer(**settings).fit()["train/lr"][1]
    assert longer.history["train/lr"][1][-5:] == pytest.approx(rates[5:])


def test_a_run_with_running_statistics_goes_on_bit_for_bit(tmp_path):
    def trainer(folder, **config):
        normalizer = RunningSpectrogramNormalizer(1, 17)
        return toy_trainer(folder, normalizer=normalizer, valid_set=ToySongs(4), **config)

    whole = trainer(tmp_path / "whole", checkpoint_every_n_steps=7)
    whole.fit()
    middle, _ = list_checkpoints(tmp_path / "whole")
    resumed = trainer(tmp_path / "rest", checkpoint_every_n_steps=7)
    resumed.fit(middle)
    assert (middle.stem, resumed.step) == ("step_00000007", 10)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(resumed)[name], tensor), name
    best = load_separator(tmp_path / "whole" / "best")
    assert best.normalizer.running_mean.abs().min() > 0.01, "it has moved"


def test_a_run_that_is_already_longer_than_its_end_is_not_resumed(tmp_path):
    toy_trainer(tmp_path, max_steps=3).fit()
    shorter = toy_trainer(tmp_path, max_steps=2)
    with pytest.raises(ValueError, match=r"is of step 3, but the run ends after step 2; raise"):
        shorter.fit(tmp_path)
    assert shorter.step == 0


def test_what_the_user_keeps_beside_the_checkpoints_stays(tmp_path):
    trainer = toy_trainer(tmp_path, max_epochs=1, checkpoint_every_n_steps=1)
    mine = tmp_path / "checkpoints" / "step_00000002_mine.ckpt"
    mine.parent.mkdir()
    mine.write_text("mine")
    trainer.fit()
    assert mine.exists()
    assert find_checkpoint(tmp_path).name == "step_00000005.ckpt"


class OverflowsOnce(ToyLoss):
    """The first gradient is infinite, as 16-mixed has it until it knows its scale."""

    def __init__(self, calls=0):
        super().__init__()
        self.calls = calls

    def forward(self, estimates, targets):
        total, terms = super().forward(estimates, targets)
        self.calls += 1
        return total + (estimates * 0).sum().sqrt() if self.calls == 1 else total, terms


def test_the_scale_that_half_precision_found_is_restored(tmp_path):
    toy_trainer(tmp_path, max_steps=3, precision="16-mixed", loss=OverflowsOnce()).fit()
    resumed = toy_trainer(tmp_path, max_steps=6, precision="16-mixed", loss=OverflowsOnce(calls=1))
    resumed.fit(tmp_path)
    scaler = resumed.fabric.strategy.precision.scaler
    assert scaler.get_scale() == 65_536 / 2
    assert scaler.state_dict()["_growth_tracker"] == 5  # two steps, then three
    assert resumed.learner.scheduler.last_epoch == resumed.ema.n_averaged == 5


def test_a_full_disk_leaves_the_good_one_and_no_part(tmp_path, monkeypatch):
    trainer = toy_trainer(tmp_path, max_epochs=1)
    trainer.fit()
    (good,) = list_checkpoints(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    trainer.learner.steps += 1
    with pytest.raises(OSError, match=r"step_00000006.ckpt .*No space left.*make room and resume"):
        trainer.save()
    assert list((tmp_path / "checkpoints").iterdir()) == [good]
    assert load_checkpoint(good)["step"] == 5


def test_a_checkpoint_of_before_segments_were_called_so_is_resumed(tmp_path):
    toy_trainer(tmp_path, max_steps=2).fit()
    (path,) = list_checkpoints(tmp_path)
    state = load_checkpoint(path)
    state["settings"]["stretches"] = state["settings"].pop("segments")
    save_checkpoint(tmp_path, 2, state)
    trainer = toy_trainer(tmp_path, max_steps=4)
    trainer.fit(tmp_path)
    assert trainer.step == 4
