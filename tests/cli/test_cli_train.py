"""`tfswa-lab train` as a user types it."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from tfswa_lab import audio
from tfswa_lab.cli import app
from tfswa_lab.cli import main as cli
from tfswa_lab.cli.train import TrainOptions
from tfswa_lab.models.separator import HEADS as separator_heads
from tfswa_lab.models.storage import load_separator
from tfswa_lab.performance import set_up
from tfswa_lab.training.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint
from tfswa_lab.training.launch import checkpoint_activations
from tfswa_lab.training.losses import SourceSeparationLoss
from tfswa_lab.training.presets import PRESETS, Preset
from tfswa_lab.training.run import NETWORKS, loss_of, named_preset, separator_of

RATE = 8000
QUICK = [
    *("--dims", "8,8,8,8", "--depths", "1,1,1,1", "--num-heads", "1", "--window-size", "4"),
    *("--n-fft", "64", "--hop-length", "16", "--sample-rate", str(RATE), "--mrstft-weight", "0"),
    *("--segment-seconds", "0.1", "--samples-per-track", "2", "--batch-size", "2"),
    *("--max-epochs", "1", "--log-every-n-steps", "1", "--warmup-steps", "1"),
]
OPTIONS_OF_THE_FIELD = """
    data-root target-stems segment-seconds batch-size max-epochs learning-rate weight-decay
    gradient-clip-val use-amp precision depths dims window-size num-heads n-fft hop-length
    l1-weight mrstft-weight output-dir log-every-n-steps device devices resume preset
"""


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    """Five songs of noise, half a second each."""
    root = tmp_path_factory.mktemp("songs")
    generator = torch.Generator().manual_seed(0)
    for k in range(5):
        stems = 0.05 * torch.randn(4, 2, RATE // 2, generator=generator)
        folder = root / "train" / f"Band - Song {k}"
        for name, stem in zip(audio.STEMS, stems, strict=True):
            audio.write(folder / f"{name}.wav", stem, RATE)
        audio.write(folder / "mixture.wav", stems.sum(0), RATE)
    return root


def run(*arguments):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    torch.set_num_threads(before)
    return result


def words(result):
    """What is printed, without the frame around it and its line breaks."""
    return re.sub(r"[│╭╰─╮╯\s]+", " ", result.output)


@pytest.fixture(scope="module")
def finished(songs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "first"
    result = run("--data-root", songs, "--output-dir", folder, *QUICK)
    assert result.exit_code == 0, result.output
    return folder


def test_the_help_names_the_fields_options_without_loading_torch():
    code = (
        "import sys; from tfswa_lab.cli import app; app(['train', '--help'], standalone_mode=False)"
        "; sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0
    for option in OPTIONS_OF_THE_FIELD.split():
        assert f"--{option} " in result.stdout, option
    (line,) = (line for line in result.stdout.splitlines() if "--mask " in line)
    for head in separator_heads:
        assert re.search(rf"\b{head}\b", line), head


def test_a_run_leaves_a_separator_that_the_next_command_uses(finished, songs, tmp_path):
    song = songs / "train" / "Band - Song 0" / "mixture.wav"
    arguments = [song, "--model", finished / "best", "--out", tmp_path]
    result = CliRunner().invoke(app, ["separate", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    stems = [audio.read(tmp_path / f"{stem}.wav")[0] for stem in ("vocals", "other")]
    torch.testing.assert_close(sum(stems), audio.read(song)[0], atol=3 / 32_768, rtol=0)


def test_options_override_the_preset_and_nothing_else(finished):
    training = load_checkpoint(find_checkpoint(finished))["settings"]["training"]
    assert training["dims"] == (8, 8, 8, 8)
    assert training["segment_seconds"] == 0.1
    assert training["learning_rate"] == PRESETS["tiny"].learning_rate
    assert training["target_stems"] == PRESETS["tiny"].target_stems


def test_resuming_needs_no_option_again(finished):
    result = run("--resume", finished)
    assert result.exit_code == 0, result.output
    assert "4 of 4 steps" in words(result)
    result = run("--resume", finished, "--max-epochs", 2)
    assert "8 of 8 steps" in words(result)
    result = run("--resume", finished, "--max-steps", 2)
    assert result.exit_code == 1
    assert "is of step 8, but the run ends after step 2" in words(result)
    result = run("--resume", list_checkpoints(finished)[0], "--batch-size", 4)
    assert result.exit_code == 1
    assert "batch_size was 2, is 4" in words(result)


def test_songs_may_move_but_not_change_while_a_run_is_away(finished, songs, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    other = silenced(songs, tmp_path / "other", "bass")  # files of the same names and sizes
    result = run("--resume", tmp_path / "run", "--data-root", other)
    assert result.exit_code == 1
    assert "audio was 2.0 s with digest" in words(result)
    shutil.copytree(songs, tmp_path / "moved")
    result = run("--resume", tmp_path / "run", "--data-root", tmp_path / "moved")
    assert result.exit_code == 0, result.output


def test_a_broken_checkpoint_is_refused_with_the_command_that_helps(finished, tmp_path):
    older, newest = list_checkpoints(finished)
    content = newest.read_bytes()
    newest.write_bytes(content[:-100])
    result = run("--resume", finished)
    newest.write_bytes(content)
    assert result.exit_code == 1
    assert f"--resume {older}" in result.output


def silenced(songs, folder, stem):
    """The same songs with a stem that is silent in all."""
    shutil.copytree(songs, folder)
    for path in folder.rglob(f"{stem}.wav"):
        audio.write(path, torch.zeros(2, RATE // 2), RATE)
    return folder


def test_mistakes_are_named(finished, songs, tmp_path):
    silent = silenced(songs, tmp_path / "silent", "vocals")
    for arguments, message in [
        (["--output-dir", finished], "holds a run already"),
        (["--resume", tmp_path], "nothing to resume"),
        (["--preset", "huge"], "choose among tiny, small, default"),
        (["--model", "locoformers"], "did you mean 'locoformer'?"),
        (["--model", "locoformer"], "model='locoformer' has no dims, depths, window_size"),
        (["--mask", "mapping"], "mask='mapping' does not suit the outputs of TFSWAUNet"),
        (["--mask", "foo"], "unknown mask 'foo'; choose among magnitude, complex"),
        (["--target-stems", "vocals,voice"], "unknown stem 'voice'"),
        (["--dims", "8,8"], "four entries"),
        (["--dims", "8,x"], "'--dims': '8,x' is not a list of whole numbers; write them as 8,16"),
        (["--depths", "1,,1"], "'--depths': '1,,1' is not a list of whole numbers"),
        (["--warmup-steps", 5], "warmup_steps=5, but the run ends after step 4"),
        (["--max-steps", 1, "--warmup-steps", 2], "warmup_steps=2, but the run ends after step 1"),
        (
            ["--target-stems", "vocals", "--data-root", silent],
            f"songs of {silent / 'train'}: there",
        ),
        (["--batch-size", "999"], "a step takes 999 segments"),
        (["--precision", "8-bit"], "choose among 32-true"),
        (["--use-amp", "--precision", "32-true"], "drop use_amp"),
        (["--device", "tpu"], "device='tpu'"),
        (["--data-root", tmp_path / "nowhere"], "nowhere"),
        (["--segment-seconds", 0.007], "must hold a window of n_fft=64 (0.01 s)"),
        (["--segment-seconds", 0.6], "the longest song has 0.50 s"),
        (["--augment", "ful"], "did you mean 'full'?"),
        (
            ["--output-dir", songs / "train" / "Band - Song 0" / "bass.wav"],
            "choose another output_dir",
        ),
        (["--resume", finished, "--preset", "small"], "keeps its preset"),
        (["--resume", finished, "--model", "resunet"], "keeps its model='tfswa_unet'"),
    ]:
        usual = [*QUICK, "--data-root", songs, "--output-dir", tmp_path / "new"]
        result = run(*usual, *arguments)
        assert result.exit_code in (1, 2), arguments
        assert message in words(result), result.output


def test_stems_are_listed_with_commas_and_amp_picks_what_fits(songs, tmp_path):
    result = run(
        *("--data-root", songs, "--output-dir", tmp_path, *QUICK),
        *("--target-stems", "drums,bass", "--use-amp", "--augment", "none", "--max-steps", 1),
    )
    assert result.exit_code == 0, result.output
    separator = load_separator(tmp_path / "best")
    assert separator.stems == ("drums", "bass")
    assert not separator.mixture_consistency, "drums and bass are not all"
    training = load_checkpoint(find_checkpoint(tmp_path))["settings"]["training"]
    assert training["precision"] == "bf16-mixed"


@pytest.mark.parametrize(("ratio", "said"), [(2.84, True), (1.02, False), (0.5, False)])
def test_mixed_precision_that_is_slower_says_so(songs, tmp_path, monkeypatch, ratio, said):
    monkeypatch.setattr(set_up, "mixed_precision_ratio", lambda device: ratio)
    usual = ["--data-root", songs, "--output-dir", tmp_path, *QUICK, "--max-steps", 1]
    result = run(*usual, "--use-amp")
    assert result.exit_code == 0, result.output
    assert ("takes 2.8 times as long as float32" in words(result)) == said
    assert ("times as long" in words(result)) == said


@pytest.mark.parametrize("model", NETWORKS)
@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_networks_that_exist(name, model):
    preset = named_preset(name, model)
    with torch.device("meta"):
        separator, loss = separator_of(preset), loss_of(preset)
    assert separator.stems == loss.stems == preset.target_stems
    assert type(separator.model) is NETWORKS[model][0]
    if preset.activation_checkpointing:
        checkpoint_activations(separator.model)


def test_the_options_are_the_fields_of_a_preset():
    own = {"preset", "output_dir", "resume", "use_amp", "survive_oom"}
    options = {field.name for field in fields(TrainOptions)}
    # The size of a network comes with the preset; the TFSWA-UNet's can be changed one by one.
    assert options - own == {field.name for field in fields(Preset)} - {"size"}
    assert own < options


SMALLEST = {
    "tfswa_unet": ["--dims", "8,8,8,8", "--depths", "1,1,1,1", "--num-heads", 1],
    "resunet": [],
    "locoformer": [],
    "mask_resunet": [],
}
HEADS = {
    "tfswa_unet": "magnitude",
    "resunet": "magnitude mapping",
    "locoformer": "mapping",
    "mask_resunet": "complex",
}


@pytest.mark.parametrize("model", NETWORKS)
def test_every_network_trains_separates_and_is_scored_from_the_command_line(songs, tmp_path, model):
    quick = ["--segment-seconds", 0.1, "--samples-per-track", 2, "--sample-rate", RATE]
    quick += ["--n-fft", 64, "--hop-length", 16, "--mrstft-weight", 0, "--max-steps", 2]
    arguments = ["--model", model, *quick, *SMALLEST[model], "--data-root", songs]
    result = run(*arguments, "--output-dir", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "2 of 2 steps" in words(result)
    separator = load_separator(tmp_path / "run" / "best")
    assert type(separator.model) is NETWORKS[model][0]
    assert sum(weights.numel() for weights in separator.parameters()) < 1e6, "it is a tiny one"
    assert separator.mask == HEADS[model]
    result = run("--resume", tmp_path / "run", "--max-steps", 3)
    assert "3 of 3 steps" in words(result), result.output

    song = songs / "train" / "Band - Song 0" / "mixture.wav"
    command = ["separate", song, "--model", tmp_path / "run" / "best", "--out", tmp_path / "stems"]
    result = CliRunner().invoke(app, [*map(str, command)])
    assert result.exit_code == 0, result.output
    stems = [audio.read(tmp_path / "stems" / f"{stem}.wav")[0] for stem in separator.stems]
    torch.testing.assert_close(sum(stems), audio.read(song)[0], atol=3 / 32_768, rtol=0)

    command = ["evaluate", "--model", tmp_path / "run" / "best", "--data-root", songs]
    command += ["--split", "valid", "--no-bounds", "--window", 0.25, "--hop", 0.25]
    command += ["--device", "cpu", "--output-dir", tmp_path / "scores"]
    result = CliRunner().invoke(app, [*map(str, command)])
    assert result.exit_code == 0, result.output
    (scores,) = (tmp_path / "scores").rglob("Band*.json")
    targets = {target["name"] for target in json.loads(scores.read_text())["targets"]}
    assert targets >= set(separator.stems)


def test_full_augmentation_is_a_word_away(songs, tmp_path):
    result = run("--data-root", songs, "--output-dir", tmp_path, *QUICK, "--augment", "full")
    assert result.exit_code == 0, result.output
    settings = load_checkpoint(find_checkpoint(tmp_path))["settings"]
    assert settings["augment"].startswith("Chain(augmentations=[Remix(")
    assert "PitchShift(semitones=(-2.0, 2.0), prob=0.2, n_fft=512)" in settings["augment"]
    assert settings["masking"].startswith("SpectrogramMasking(max_bins=80, max_frames=40,")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has …"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory"),
        MemoryError(),
    ],
    ids=["cuda", "cublas", "cpu", "python"],
)
def test_where_memory_runs_out_while_building_one_line_says_what_to_lower(tmp_path, error):
    with mock.patch("tfswa_lab.training.run.build_trainer", side_effect=error):
        result = run("--output-dir", tmp_path)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), "no traceback"
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: out of memory")
    for word in ("batch-size", "segment-seconds", "precision", "activation-checkpointing"):
        assert f"--{word}" in line
    assert ("tried to allocate 9.00 GiB" in line) == isinstance(error, torch.OutOfMemoryError)
    assert "--resume" not in line, "there is nothing to resume"


def test_other_errors_keep_their_traceback(tmp_path):
    with mock.patch("tfswa_lab.training.run.build_trainer", side_effect=RuntimeError("a bug")):
        assert isinstance(run("--output-dir", tmp_path).exception, RuntimeError)


def test_where_memory_runs_out_in_a_step_the_run_goes_on_from_its_checkpoint_bit_for_bit(
    songs, tmp_path, monkeypatch
):
    usual = ["--data-root", songs, *QUICK, "--max-steps", 4, "--checkpoint-every-n-steps", 2]
    assert run(*usual, "--output-dir", tmp_path / "whole").exit_code == 0

    forward, calls = SourceSeparationLoss.forward, []

    def forward_once_too_often(self, estimates, targets):
        if self.training and torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        return forward(self, estimates, targets)

    monkeypatch.setattr(SourceSeparationLoss, "forward", forward_once_too_often)
    folder = tmp_path / "short"
    result = run(*usual, "--output-dir", folder)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    line = result.stderr.splitlines()[-1]
    assert line.startswith("Error: out of memory (tried to allocate 9.0")
    assert f"--resume {folder} --activation-checkpointing goes on" in line
    assert [path.stem for path in list_checkpoints(folder)] == ["step_00000002"]
    assert "4 of 4 steps" in words(run("--resume", folder))
    first, second = (
        load_checkpoint(find_checkpoint(tmp_path / name)) for name in ("whole", "short")
    )
    for part in ("separator", "ema"):
        for name, tensor in first[part].items():
            assert torch.equal(tensor, second[part][name]), name
    assert first["history"]["train/loss"] == second["history"]["train/loss"]


def test_a_run_that_is_to_survive_goes_on_with_parts_and_says_so(songs, tmp_path, monkeypatch):
    forward = SourceSeparationLoss.forward

    def forward_one(self, estimates, targets):
        if torch.is_grad_enabled() and len(estimates) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        return forward(self, estimates, targets)

    monkeypatch.setattr(SourceSeparationLoss, "forward", forward_one)
    usual = ["--data-root", songs, *QUICK, "--max-steps", 2, "--survive-oom"]
    result = run(*usual, "--output-dir", tmp_path)
    assert result.exit_code == 0, result.output
    assert "2 of 2 steps" in words(result)
    assert "memory ran out: from then on, 1 of 2 segments at once" in words(result)


def test_a_batch_size_that_is_found_gives_the_run_of_that_number(songs, tmp_path, monkeypatch):
    forward, sizes = SourceSeparationLoss.forward, set()

    def forward_three(self, estimates, targets):
        sizes.add(len(estimates))
        if len(estimates) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        return forward(self, estimates, targets)

    monkeypatch.setattr(SourceSeparationLoss, "forward", forward_three)
    usual = ["--data-root", songs, *QUICK]
    result = run(*usual, "--batch-size", "auto", "--output-dir", tmp_path / "found")
    assert result.exit_code == 0, result.output
    assert "batch size 3: 3 is the largest that fits." in words(result)
    found = load_checkpoint(find_checkpoint(tmp_path / "found"))
    chosen = found["settings"]["training"]["batch_size"]
    assert f"taken: {chosen}, the smallest" in words(result)
    assert chosen in sizes
    assert chosen <= 3
    result = run(*usual, "--batch-size", chosen, "--output-dir", tmp_path / "typed")
    typed = load_checkpoint(find_checkpoint(tmp_path / "typed"))
    assert typed["settings"] == found["settings"]
    for name, tensor in typed["separator"].items():
        assert torch.equal(tensor, found["separator"][name]), name


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--resume"], "keeps its batch size"),
        (["--devices", "2"], "for one process"),
        (["--batch-size", "many"], "neither a whole number nor auto"),
        (["--accumulate", "1000"], "a step takes 1000 segments"),
        (["--output-dir"], "holds a run already"),
    ],
)
def test_a_batch_size_is_not_looked_for_where_it_would_be_wrong(
    finished, songs, tmp_path, more, said
):
    usual = ["--data-root", songs, *QUICK, "--output-dir", tmp_path, "--batch-size", "auto"]
    if more == ["--resume"]:
        usual, more = ["--batch-size", "auto"], ["--resume", finished]
    if more == ["--output-dir"]:
        more = ["--output-dir", finished]
    result = run(*usual, *more)
    assert result.exit_code == 1, result.output
    assert said in words(result)
    assert "looking for a batch size" not in words(result)


PYTHON = [sys.executable, "-m"]


@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        ([*PYTHON, "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"], []),
        ([*PYTHON, "lightning_fabric.cli", "--accelerator=cpu", "--devices=2"], []),
        (PYTHON, ["--devices", 2]),
    ],
    ids=["torchrun", "fabric", "alone"],
)
def test_two_processes_train_from_the_same_command(songs, tmp_path, launcher, options):
    arguments = ["--data-root", songs, "--output-dir", tmp_path, *QUICK, "--max-steps", "2"]
    command = "tfswa_lab.cli" if launcher[-1] == "-m" else cli.__file__  # fabric takes a file
    result = subprocess.run(
        [*launcher, command, "train", *map(str, [*arguments, *options])],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("2 of 2 steps") == 1, "the first process speaks for all"
    state = load_checkpoint(find_checkpoint(tmp_path))
    assert len(state["random"]) == 2
    assert state["settings"]["augment"].startswith("Chain(augmentations=[Remix(), ")
    load_separator(tmp_path / "best")
    result = run("--resume", tmp_path, "--devices", 1, "--max-steps", 3)
    assert "3 of 3 steps" in words(result), result.output
