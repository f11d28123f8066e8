"""What a run knows of its songs: their audio is recognised anywhere, and silence is refused."""

import os
import shutil
import warnings

import pytest
import torch
from toy_run import STEMS, ToyLoss, ToyNet, ToySongs, toy_trainer

from tfswa_lab import audio
from tfswa_lab.data import tracks
from tfswa_lab.data.musdb import MUSDB18Dataset
from tfswa_lab.models.separator import Separator
from tfswa_lab.stft import STFTProcessor
from tfswa_lab.training import songs as songs_module
from tfswa_lab.training.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from tfswa_lab.training.config import TrainingConfig
from tfswa_lab.training.songs import audio_of, names_of, silent_sources
from tfswa_lab.training.trainer import Trainer

RATE, SAMPLES, COUNT = 8000, 4000, 5


def write_songs(root, seed=0, samples=SAMPLES, rate=RATE, change=None):
    """Five songs of noise as MUSDB18 keeps them; `change(k, stems)` may alter the stems of each."""
    generator = torch.Generator().manual_seed(seed)
    for k in range(COUNT):
        stems = 0.05 * torch.randn(4, 2, samples, generator=generator)
        if change:
            change(k, stems)
        folder = root / "train" / f"Band - Song {k}"
        for name, stem in zip(audio.STEMS, stems, strict=True):
            audio.write(folder / f"{name}.wav", stem, rate)
        audio.write(folder / "mixture.wav", stems.sum(0), rate)
    return root


def data(root, split="train", stems=STEMS):
    return MUSDB18Dataset(root, split, stems, 0.05, samples_per_track=1)


def silence(*indices, of=range(COUNT)):
    """A `change` that silences stems of some songs."""

    def change(k, stems):
        if k in of:
            stems[list(indices)] = 0

    return change


def trainer_on(train_set, valid_set=None, output_dir=None, stems=STEMS, **config):
    torch.manual_seed(0)
    net = ToyNet(in_channels=2, out_channels=2 * len(stems))
    separator = Separator(net, STFTProcessor(32, 8), stems)
    config = TrainingConfig(**{"batch_size": 2, "max_steps": 2, **config})
    loss = ToyLoss() if stems == STEMS else OneLoss()
    return Trainer(separator, loss, train_set, valid_set, config, output_dir)


class OneLoss(ToyLoss):
    def forward(self, estimates, targets):
        value = self.l1(estimates, targets).mean()
        return value, {"vocals/waveform": value.detach()}


# Recognised ----------------------------------------------------------------------------------


def test_songs_are_the_same_elsewhere_and_later_and_beside_other_files(tmp_path):
    write_songs(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "deep" / "b")
    here, there = (data(tmp_path / name) for name in ("a", "deep/b"))
    for path in (tmp_path / "deep").rglob("*.wav"):
        os.utime(path, (1, 1))
        (path.parent / "vocals.txt").write_text("la la la")
        (path.parent / "cover.jpg").write_bytes(b"x")
    assert audio_of(here) == audio_of(there)
    assert audio_of(here).startswith("2.0 s with digest "), "four songs of half a second"


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},  # files of the same size
        {"samples": SAMPLES + 1},
        {"rate": 16_000},
        {"change": silence(0, of=[0])},
    ],
    ids=["other noise", "longer", "other rate", "one stem of one song"],
)
def test_other_audio_under_the_same_names_is_noticed(tmp_path, change):
    first, second = data(write_songs(tmp_path / "a")), data(write_songs(tmp_path / "b", **change))
    assert names_of(first) == names_of(second)
    assert audio_of(first) != audio_of(second)


def test_only_the_files_that_are_read_count(tmp_path):
    first = data(write_songs(tmp_path / "a"), stems=["vocals"])
    second = data(write_songs(tmp_path / "b", change=silence(1)), stems=["bass"])
    for k in range(COUNT):
        shutil.copy(tmp_path / f"a/train/Band - Song {k}/mixture.wav", second.tracks[0].path)
    assert audio_of(first) != audio_of(second), "vocals are not bass"
    (tmp_path / "a/train/Band - Song 0/bass.wav").unlink()
    assert audio_of(data(tmp_path / "a", stems=["vocals"])) == audio_of(first)


def test_data_sets_without_files_have_no_audio_to_compare(tmp_path):
    assert audio_of(ToySongs()) is None
    songs = ToySongs()
    songs.tracks = ["one", "two"]  # another library's attribute of that name
    assert audio_of(songs) is None
    toy_trainer(tmp_path, train_set=songs, max_steps=2).fit()
    toy_trainer(tmp_path, train_set=songs, max_steps=4).fit(tmp_path)


def test_a_run_goes_on_with_moved_songs_and_refuses_other_audio(tmp_path):
    write_songs(tmp_path / "a")
    run = tmp_path / "run"
    trainer_on(data(tmp_path / "a"), output_dir=run).fit()
    other = trainer_on(data(write_songs(tmp_path / "b", seed=1)), output_dir=run, max_steps=3)
    with pytest.raises(ValueError, match=r"another run: audio was 2\.0 s with digest \w+, is 2\.0"):
        other.fit(run)
    (tmp_path / "a").rename(tmp_path / "moved")
    moved = trainer_on(data(tmp_path / "moved"), output_dir=run, max_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moved.fit(run)
    assert moved.step == 3


def test_a_checkpoint_of_before_audio_was_compared_goes_on_with_a_warning(tmp_path):
    songs, run = data(write_songs(tmp_path / "songs")), tmp_path / "run"
    trainer_on(songs, output_dir=run).fit()
    (path,) = list_checkpoints(run)
    state = load_checkpoint(path)
    del state["settings"]["audio"]
    save_checkpoint(run, 2, state)
    trainer = trainer_on(songs, output_dir=run, max_steps=3)
    with pytest.warns(UserWarning, match="earlier version, which kept only the names"):
        trainer.fit(run)
    assert trainer.step == 3


# Silence -------------------------------------------------------------------------------------


def heard_in_full(songs):
    """The silent sources by brute force: every sample of every file."""
    energy = dict.fromkeys(songs.sources, 0.0)
    for track in songs.tracks:
        waveforms = track.read(songs.sources, 0, track.samples, track.rate)
        for name, waveform in waveforms.items():
            energy[name] += waveform.square().sum().item()
    parts = {"mixture": ("mixture",), **songs.parts}
    return [name for name, files in parts.items() if sum(energy[file] for file in files) == 0]


def beep(k, stems):
    """Vocals that sound for an eighth of a second, at the end of the last song only."""
    stems[0, :, : -RATE // 8 if k == COUNT - 1 else SAMPLES] = 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (None, []),
        (silence(0), ["vocals"]),
        (silence(1, 2, 3), ["other"]),
        (silence(1, 2), []),  # the target "other" has other.wav left
        (silence(0, 1, 2, 3), ["mixture", "vocals", "other"]),
        (silence(0, of=range(COUNT - 1)), []),
        (beep, []),
    ],
)
def test_what_is_silent_is_what_all_samples_say(tmp_path, monkeypatch, change, expected):
    monkeypatch.setattr(songs_module, "LOOK_SECONDS", 0.125)  # several places in a song
    songs = MUSDB18Dataset(
        write_songs(tmp_path, change=change), "train", STEMS, 0.05, valid_fraction=0
    )
    assert silent_sources(songs, STEMS) == expected == heard_in_full(songs)


def test_dither_is_silence_as_it_is_for_the_losses(tmp_path):
    def dither(_, stems):
        stems[0] = torch.randint(-1, 2, stems[0].shape) / 32_768

    assert silent_sources(data(write_songs(tmp_path, change=dither)), STEMS) == ["vocals"]


def test_where_all_sounds_one_look_is_enough_and_it_is_the_same_for_all(tmp_path, monkeypatch):
    read, looks = tracks.Track.read, []

    def counted(track, sources, start, frames, rate):
        looks.append((track.name, sources, start))
        return read(track, sources, start, frames, rate)

    monkeypatch.setattr(tracks.Track, "read", counted)
    root = write_songs(tmp_path)
    for _ in range(2):  # as two processes would
        assert silent_sources(data(root), STEMS) == []
    assert len(looks) == 2
    assert looks[0] == looks[1]


def test_a_silent_target_is_refused_before_the_first_step(tmp_path):
    root = write_songs(tmp_path / "songs", change=silence(0))
    trainer = trainer_on(data(root), output_dir=tmp_path / "run")
    with pytest.raises(ValueError, match="vocals is silent in all 4 songs of ") as error:
        trainer.fit()
    assert str(root / "train") in str(error.value)
    assert "check data_root, listen to the files of vocals, or choose other" in str(error.value)
    assert trainer.step == 0
    assert not list_checkpoints(tmp_path / "run")


def test_a_silent_sum_names_its_files(tmp_path):
    root = write_songs(tmp_path, change=silence(1, 2, 3))
    with pytest.raises(ValueError, match=r"other is silent .* files of drums, bass, other"):
        trainer_on(data(root)).fit()


def test_instrumentals_among_the_songs_are_normal(tmp_path):
    songs = data(write_songs(tmp_path, change=silence(0, of=[0, 1, 3])))
    trainer = trainer_on(songs)
    trainer.fit()
    assert trainer.step == 2


class Muted(ToySongs):
    """Sources that are silent in all items, of `mixture`, `vocals` and `other`."""

    def __init__(self, *names):
        super().__init__(8)
        self.names = names

    def __getitem__(self, index):
        item = super().__getitem__(index)
        if "mixture" in self.names:
            item["mixture"] = 0 * item["mixture"]
        gains = torch.tensor([float(stem not in self.names) for stem in STEMS])
        return item | {"stems": item["stems"] * gains[:, None, None]}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["vocals"], "vocals is silent in all 8 items"),
        (["mixture"], "mixture is silent in all 8 items"),
        (["vocals", "other"], "vocals and other are silent in all 8 items"),
    ],
)
def test_any_data_set_is_looked_through(names, said):
    with pytest.raises(ValueError, match=f"training: {said} .*nothing to learn from"):
        toy_trainer(train_set=Muted(*names)).fit()


def test_validation_that_can_score_nothing_is_refused():
    for names in (["vocals", "other"], ["mixture"]):
        with pytest.raises(ValueError, match=r"validation: .* no score can tell"):
            toy_trainer(valid_set=Muted(*names)).fit()


def test_validation_without_one_stem_warns_and_is_scored_by_the_other(tmp_path):
    trainer = toy_trainer(tmp_path, valid_set=Muted("vocals"), max_epochs=1)
    with pytest.warns(UserWarning, match="validation: vocals is silent in all 8 items"):
        history = trainer.fit()
    assert trainer.best_sdr == history["valid/sdr/other"][1][0] == history["valid/sdr"][1][0]


def test_a_single_target_that_no_validation_song_has_is_refused(tmp_path):
    root = write_songs(tmp_path)
    train_set, valid_set = (data(root, split, ["vocals"]) for split in ("train", "valid"))
    (song,) = valid_set.tracks
    audio.write(song.path / "vocals.wav", torch.zeros(2, SAMPLES), RATE)
    with pytest.raises(ValueError, match="validation: vocals is silent in all 1 songs"):
        trainer_on(train_set, valid_set, stems=("vocals",)).fit()
