"""The step against plain PyTorch, the loop against a run in one go, and what stops it."""

import io
import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import soundfile
import torch
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import default_collate
from toy_run import STEMS, ToyLoss, ToySongs, toy_separator, toy_trainer, weights

from tfswa_lab.data.augment import Gain, SpectrogramMasking
from tfswa_lab.models.storage import load_separator
from tfswa_lab.performance import Monitor
from tfswa_lab.training import launch
from tfswa_lab.training.learner import NonFiniteError
from tfswa_lab.training.randomness import generator_for
from tfswa_lab.training.trainer import Trainer
from tfswa_lab.training.validation import validate, validation_loader

pytestmark = pytest.mark.usefixtures("one_thread")


def batches(count, size=4):
    songs = ToySongs()
    return [default_collate([songs[size * i + j] for j in range(size)]) for i in range(count)]


def test_one_step_is_the_step_that_one_would_write_by_hand():
    trainer = toy_trainer(learning_rate=3e-3, warmup_steps=2, gradient_clip_val=0.01)
    (batch,) = batches(1)
    scalars = trainer.learner.step([batch])

    separator = toy_separator()
    optimizer = torch.optim.AdamW(separator.parameters(), 3e-3 / 2, weight_decay=1e-2)
    estimates = separator(batch["mixture"])
    loss = (estimates - batch["stems"]).abs().mean((2, 3)).mean(0).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(separator.parameters(), 0.01)
    optimizer.step()

    assert norm > 0.01, "nothing was clipped"
    assert scalars["loss"] == loss.item()
    assert scalars["grad_norm"] == norm.item()
    assert scalars["lr"] == 3e-3 / 2
    for name, tensor in separator.state_dict().items():
        assert torch.equal(trainer.separator.state_dict()[name], tensor), name


@pytest.mark.parametrize("fails", [False, True])
def test_callbacks_are_open_for_the_run_and_hear_of_each_step(tmp_path, fails):
    class Stop(Exception):
        pass

    class Listener:
        heard = []

        def __enter__(self):
            self.heard.append("begin")

        def __exit__(self, *error):
            self.heard.append("end")

        def after_step(self, trainer, batches):
            self.heard.append((trainer.step, [len(batch["mixture"]) for batch in batches]))
            if fails and trainer.step == 2:
                raise Stop

    trainer = toy_trainer(max_epochs=None, max_steps=3, accumulate=2, batch_size=4)
    monitor = Monitor(interval_seconds=1000, log=tmp_path / "run.jsonl", shown=False)
    trainer.callbacks = [Listener(), monitor]
    with pytest.raises(Stop) if fails else nullcontext():
        trainer.fit()
    steps = [(step, [4, 4]) for step in range(1, 3 if fails else 4)]
    assert Listener.heard == ["begin", *steps, "end"]
    assert monitor.readings[-1].items_per_second > 0


def test_accumulated_parts_make_the_step_of_the_whole():
    parts = batches(3)
    whole = {name: torch.cat([part[name] for part in parts]) for name in ("mixture", "stems")}
    whole |= {"track": ["x"] * 12, "start_seconds": torch.zeros(12)}
    trainers = [toy_trainer(accumulate=1), toy_trainer(accumulate=1)]
    scalars = [trainers[0].learner.step(parts), trainers[1].learner.step([whole])]
    assert scalars[0]["loss"] == pytest.approx(scalars[1]["loss"], rel=1e-6)
    for name, tensor in weights(trainers[1]).items():
        torch.testing.assert_close(weights(trainers[0])[name], tensor, atol=1e-6, rtol=0)


def test_the_average_follows_its_recursion():
    trainer = toy_trainer(ema_decay=0.25)
    name = "model.layers.4.weight"
    average = None
    for k, batch in enumerate(batches(5)):
        trainer.learner.step([batch])
        newest = trainer.separator.state_dict()[name].clone()
        decay = min(0.25, (1 + k) / (10 + k))  # 2/11, 3/12, then 0.25
        average = newest if k == 0 else decay * average + (1 - decay) * newest
    torch.testing.assert_close(trainer.ema.module.state_dict()[name], average)
    assert not trainer.ema.module.training


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_an_average_of_one_step_is_the_model_itself_with_its_statistics(norm):
    trainer = toy_trainer(norm=norm, ema_decay=0.0)
    for batch in batches(3):
        trainer.learner.step([batch])
    averaged = trainer.ema.module.state_dict()
    for name, tensor in trainer.separator.state_dict().items():
        assert torch.equal(averaged[name], tensor), name


def test_running_statistics_are_averaged_like_weights():
    trainer = toy_trainer(norm="batch", ema_decay=0.1)
    average = None
    for batch in batches(3):
        trainer.learner.step([batch])
        newest = trainer.separator.model.layers[1].running_mean.clone()
        average = newest if average is None else 0.1 * average + 0.9 * newest
    torch.testing.assert_close(trainer.ema.module.model.layers[1].running_mean, average)


def test_learning_lowers_the_loss_and_beats_the_mixture():
    trainer = toy_trainer(valid_set=ToySongs(5), max_epochs=20, log_every_n_steps=5)
    history = trainer.fit()
    steps, losses = history["train/loss"]
    assert steps == list(range(5, 101, 5))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert history["valid/sdr"][0] == list(range(5, 101, 5))  # once an epoch
    assert history["valid/sdr"][1][-1] > history["valid/floor"][1][-1] + 3
    assert history["train/lr"][1][-1] < 1e-4 < max(history["train/lr"][1])


def test_augmentation_and_masking_depend_on_the_step_not_on_what_came_before(monkeypatch):
    drawn = []

    def augment(batch, generator):
        drawn.append(torch.rand(1, generator=generator).item())
        return Gain()(batch, generator)

    masking = SpectrogramMasking(max_bins=8, max_frames=8)
    first = toy_trainer(augment=augment, masking=masking)
    for batch in batches(3):
        first.learner.step([batch])
    late = toy_trainer(augment=augment, masking=masking)
    late.learner.steps = 2
    late.learner.step([batches(3)[2]])
    assert len(set(drawn[:3])) == 3
    assert drawn[3] == drawn[2]
    assert drawn[0] == torch.rand(1, generator=generator_for(0, 0, 0, 0)).item()


def test_masking_changes_training_and_leaves_validation_alone():
    (batch,) = batches(1)
    masked = toy_trainer(masking=SpectrogramMasking(max_bins=8, max_frames=20))
    plain = toy_trainer()
    assert masked.learner.step([batch])["loss"] != plain.learner.step([batch])["loss"]
    again = plain.ema.module(batch["mixture"])
    masked.ema.load_state_dict(plain.ema.state_dict())
    assert torch.equal(masked.ema.module(batch["mixture"]), again)


def test_the_best_average_is_kept_and_can_separate(tmp_path):
    trainer = toy_trainer(tmp_path, valid_set=ToySongs(5), max_epochs=4)
    history = trainer.fit()
    best = load_separator(tmp_path / "best")
    values = history["valid/sdr"][1]
    assert trainer.best_sdr == max(values)
    assert trainer.best_step == history["valid/sdr"][0][values.index(max(values))]
    loader = validation_loader(ToySongs(5), 4, 0, trainer.fabric)
    scores = validate(best, trainer.learner.loss, loader, trainer.fabric)
    assert scores["sdr"] == pytest.approx(trainer.best_sdr, abs=1e-6)


def test_resumed_into_another_folder_the_best_is_there_as_well(tmp_path):
    first = toy_trainer(tmp_path / "a", valid_set=ToySongs(5), max_epochs=1)
    first.fit()
    first.best_sdr = 100.0  # the rest of the run will not reach it
    first.save()
    toy_trainer(tmp_path / "b", valid_set=ToySongs(5), max_epochs=2).fit(tmp_path / "a")
    load_separator(tmp_path / "b" / "best")


def test_without_validation_the_last_average_is_kept(tmp_path):
    trainer = toy_trainer(tmp_path, max_steps=3)
    trainer.fit()
    mixture = ToySongs()[0]["mixture"][None]
    assert torch.equal(load_separator(tmp_path / "best")(mixture), trainer.ema.module(mixture))


def test_patience_ends_a_run():
    trainer = toy_trainer(
        valid_set=ToySongs(5), max_epochs=50, learning_rate=1e-9, ema_decay=0.0, patience=3
    )
    trainer.best_sdr = 100.0  # never reached
    trainer.fit()
    assert trainer.finished
    assert trainer.step == 3 * 5


class Poison(ToyLoss):
    """NaN as soon as song 3 is in the batch."""

    def forward(self, estimates, targets):
        total, terms = super().forward(estimates, targets)
        return total * (math.nan if self.poisoned(targets) else 1), terms

    def poisoned(self, targets):
        return (targets - ToySongs()[3]["stems"]).abs().amax((1, 2, 3)).min() == 0


def test_a_loss_that_is_not_finite_names_the_songs_and_keeps_the_batch(tmp_path):
    trainer = toy_trainer(tmp_path, loss=Poison())
    before = weights(trainer)
    good, bad = batches(2)[1], batches(1)[0]
    with pytest.raises(NonFiniteError, match=r"loss is nan in step 1.*song 3 at 0\.30 s") as error:
        trainer.learner.step([good, bad])
    assert "song 4" not in str(error.value), "only the part that is to blame is named"
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor, before[name]), "no update was made"
    (file,) = tmp_path.glob("non_finite_batch*")
    assert str(file) in str(error.value)
    with safe_open(file, "pt") as saved:
        assert torch.equal(saved.get_tensor("stems"), bad["stems"])
        assert json.loads(saved.metadata()["track"]) == bad["track"]


class Steep(ToyLoss):
    """A finite loss whose gradient is not: the root of zero."""

    def forward(self, estimates, targets):
        total, terms = super().forward(estimates, targets)
        return total + (estimates * 0).sum().sqrt(), terms


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_gradient_that_is_not_finite_stops_the_run(precision):
    trainer = toy_trainer(loss=Steep(), precision=precision)
    with pytest.raises(NonFiniteError, match="norm of the gradients is nan"):
        trainer.learner.step(batches(1))


def test_half_precision_skips_steps_until_its_scale_cannot_be_to_blame():
    trainer = toy_trainer(loss=Steep(), precision="16-mixed")
    before = weights(trainer)
    for _ in range(16):  # 65 536 halved sixteen times is 1
        trainer.learner.step(batches(1))
    with pytest.raises(NonFiniteError, match="step 17"):
        trainer.learner.step(batches(1))
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_stays_close_and_leaves_the_waveform_whole(precision):
    seen = []
    mixed = toy_trainer(precision=precision, learning_rate=1e-3)
    mixed.separator.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    whole = toy_trainer(learning_rate=1e-3)
    for batch in batches(4):
        losses = [trainer.learner.step([batch])["loss"] for trainer in (mixed, whole)]
    assert seen == [torch.float32] * 4
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


def test_a_run_is_not_begun_over_another(tmp_path):
    toy_trainer(tmp_path, max_steps=2).fit()
    with pytest.raises(FileExistsError, match=r"holds a run already.*--resume"):
        toy_trainer(tmp_path, max_steps=2).fit()


def test_what_cannot_be_saved_is_refused_before_training(tmp_path):
    separator = toy_separator()
    separator.model = torch.nn.Sequential(separator.model)
    with pytest.raises(ValueError, match="cannot save a Sequential"):
        Trainer(separator, ToyLoss(), ToySongs(), output_dir=tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation_checkpointing": True}, r"a ToyNet has no activation_checkpointing"),
        ({"batch_size": 21}, r"a step takes 21 segments .* has 20"),
        ({"batch_size": 8, "accumulate": 3}, r"a step takes 24 segments"),
        ({"device": "cuda:99"}, r"cuda:99"),
        ({"precision": "64-true"}, r"precision='64-true': choose among 32-true"),
        ({"max_epochs": 0}, r"max_epochs=0: a whole number, 1 or more"),
        ({"batch_size": 2.5}, r"batch_size=2.5: a whole number"),
        ({"seed": 10**30}, r"seed=10+: a whole number"),
        ({"learning_rate": math.inf}, r"learning_rate=inf: must be above 0, and finite"),
        ({"ema_decay": math.nan}, r"ema_decay=nan"),
        ({"warmup_steps": 11}, r"warmup_steps=11, but the run ends after step 10"),
        ({"warmup_steps": 3, "max_steps": 2}, r"warmup_steps=3, but the run ends after step 2"),
        ({"warmup_steps": -1}, r"warmup_steps=-1: a whole number, 0 or more"),
        ({"weight_decay": -1.0}, r"weight_decay=-1.0"),
        ({"ema_decay": 1.0}, r"ema_decay=1.0"),
        ({"learning_rate": math.nan}, r"learning_rate=nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        toy_trainer(**config)


@pytest.mark.parametrize(
    ("warmup_steps", "steps", "rising"),
    [(None, 100, 5), (None, 2, 0), (None, 10, 0), (None, 40_000, 1000), (10, 10, 10), (0, 10, 0)],
)
def test_the_rate_reaches_its_highest_after_the_warm_up(warmup_steps, steps, rising):
    trainer = toy_trainer(
        warmup_steps=warmup_steps, max_steps=steps, max_epochs=None, learning_rate=1.0
    )
    factor = trainer.learner.scheduler.lr_lambdas[0]
    assert [factor(step) for step in range(rising)] == [(k + 1) / rising for k in range(rising)]
    later = [factor(step) for step in range(rising, steps)]
    assert later == sorted(later, reverse=True)
    assert later[:1] in ([1.0], [])


def test_apples_gpus_are_refused_for_training(monkeypatch):
    monkeypatch.setattr(launch, "pick_device", torch.device)
    with pytest.raises(ValueError, match=r"device='mps': training was not measured .* use cpu"):
        toy_trainer(device="mps")


def test_segments_of_other_lengths_in_another_process_are_refused(monkeypatch):
    batch = {"mixture": torch.zeros(2, 1, 400), "track": ["a", "b"]}
    other = {"mixture": torch.Size((2, 1, 401)), "track": ["c", "d"]}
    monkeypatch.setattr(launch, "gathered", lambda _, mine: [mine, other])
    with pytest.raises(ValueError, match=r"must be equally long, they are .*401"):
        launch.whole_batch(SimpleNamespace(world_size=2), batch)


def test_tensorboard_gets_scalars_sound_at_its_level_and_images(tmp_path):
    trainer = toy_trainer(tmp_path, valid_set=ToySongs(5), max_epochs=1, log_every_n_steps=1)
    history = trainer.fit()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == set(history)
    for name in ("train/loss", "train/vocals/waveform", "train/lr", "train/grad_norm"):
        assert [event.step for event in events.Scalars(name)] == [1, 2, 3, 4, 5]
    assert {"speed/steps_per_second", "memory_mib/process_rss", "valid/sdr/vocals"} < set(history)
    names = {f"{stem}/{what}" for stem in STEMS for what in ("estimate", "target")} | {"mixture"}
    assert set(tags["audio"]) == set(tags["images"]) == names
    samples, _ = soundfile.read(io.BytesIO(events.Audio("mixture")[0].encoded_audio_string))
    expected = ToySongs(5)[2]["mixture"][0]
    torch.testing.assert_close(torch.from_numpy(samples).float(), expected, atol=1e-4, rtol=0)
