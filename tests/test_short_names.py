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
    "sequences": """
        import torch
        from tfswa_lab.sequence import (
            EM, CategoricalHMM, GaussianHMM, MixtureGaussianHMM, NeuralHMM, collate_padded, filter,
            from_hmmlearn, hsmm, load, log_likelihood, pad_sequences, posteriors, sample_paths,
            save, to_hmmlearn, viterbi,
        )
        x = torch.zeros(4, 1)
        model = GaussianHMM(num_states=2, feature_dim=1)
        assert model.viterbi(x).states.shape == (4,)
        assert model.fit([x, x], settings=EM(iterations=1, initialise=False)).log_likelihoods
        assert log_likelihood(torch.zeros(1, 2), [1.0, 0.0], torch.eye(2)) == 0
    """,
    "a training": """
        import tempfile, torch
        from tfswa_lab.models import MaskResUNet, Separator, load_separator
        from tfswa_lab.stft import STFTProcessor
        from tfswa_lab.training import (
            L1WaveformLoss, Learner, NonFiniteError, SourceSeparationLoss, Trainer, TrainingConfig,
        )
        stems = ("vocals", "other")
        network = MaskResUNet(2, 4, channels=(4,), bottleneck=4, num_tfswa=0, sub_bands=1)
        separator = Separator(network, STFTProcessor(64, 16), stems)
        loss = SourceSeparationLoss(stems, l1_weight=0, mrstft_weight=0, waveform_weight=1)
        waves = torch.randn(2, 2, 400)
        song = {"mixture": waves.sum(0), "stems": waves, "track": "song", "start_seconds": 0.0}
        config = TrainingConfig(max_epochs=2, batch_size=1)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(separator, loss, [song] * 2, config=config, output_dir=folder)
            trainer.fit()
            load_separator(f"{folder}/best")
        assert isinstance(trainer.learner, Learner)
        assert trainer.step == trainer.learner.steps == 4
        assert issubclass(NonFiniteError, FloatingPointError)
        assert L1WaveformLoss()(waves[None], waves[None]).eq(0).all()
    """,
    "presets": """
        from dataclasses import replace
        import tfswa_lab.training.run
        from tfswa_lab.training import PRESETS, Preset, build_trainer
        assert isinstance(PRESETS["tiny"], Preset)
        trainer = build_trainer(replace(PRESETS["tiny"], segment_seconds=1.0, max_steps=1), None)
        assert trainer.total_steps == 1
    """,
    "memory": """
        import importlib, sys, torch
        def call():
            from tfswa_lab.memory import diagnose, predict, trace
            with trace() as seen:
                kept = torch.zeros(256)
            assert seen.peak().allocated == 1024
            assert predict(lambda: lambda: torch.zeros(256)).peak == 1024
            try:
                diagnose(lambda: None, steps=1)  # the next snippet lets it finish
            except ValueError as error:
                assert "steps=1" in str(error)
        for inner in ("", ".trace", ".trace.trace", ".predict.predict", ".leaks.diagnose"):
            for module in [name for name in sys.modules if name.startswith("tfswa_lab")]:
                del sys.modules[module]  # ours are imported anew; torch takes two seconds
            for _ in range(2):
                importlib.import_module("tfswa_lab.memory" + inner)
                call()
    """,
    "scores": """
        import torch
        from tfswa_lab.evaluation import bss_eval, sdr, si_sdr, usdr
        stems = torch.randn(2, 1, 16_000)
        assert bss_eval(stems, 0.9 * stems, rate=8000).isr.round().tolist() == [[20.0] * 2] * 2
        assert sdr(stems, 0.9 * stems, rate=8000).round().tolist() == [[20.0] * 2] * 2
        assert usdr(stems, 0.9 * stems).round().tolist() == [20.0] * 2
        assert si_sdr(stems, 0.9 * stems).min() > 100
    """,
    "an evaluation": """
        import importlib, tempfile
        from pathlib import Path
        import soundfile, torch
        folder = Path(tempfile.mkdtemp())
        (folder / "test" / "Song").mkdir(parents=True)
        stems = torch.rand(4, 9000, 2).numpy() / 5
        for name, samples in zip(("vocals", "drums", "bass", "other"), stems):
            soundfile.write(folder / "test" / "Song" / f"{name}.wav", samples, 44_100)
        soundfile.write(folder / "test" / "Song" / "mixture.wav", stems.sum(0), 44_100)
        from tfswa_lab.evaluation import Evaluation, FolderEstimates, load_report
        for _ in range(2):
            from tfswa_lab.evaluation import evaluate
            how = Evaluation(bounds=(), window=0.1, hop=0.1)
            report = evaluate(FolderEstimates(folder), folder, folder / "scores", how)
            assert report == load_report(folder / "scores")
            importlib.import_module("tfswa_lab.evaluation.evaluate")
    """,
    "separating": """
        import importlib, torch
        class Twice(torch.nn.Module):
            sample_rate, audio_channels, stems = 8000, 2, ("one", "other")
            def forward(self, mixture):
                return torch.stack([mixture, mixture], 1)
        from tfswa_lab.inference import Segmentation, separate_file, separate_track
        x = torch.rand(2, 9000)
        for _ in range(2):
            from tfswa_lab.inference import separate
            stems = separate(x, model=Twice(), segmentation=Segmentation(0.5))
            assert torch.allclose(stems["other"], x)
            importlib.import_module("tfswa_lab.inference.separate")
        assert separate_track(Twice(), x).shape == (2, 2, 9000)
        assert callable(separate_file)
    """,
    "separating, first": """
        import torch
        from tfswa_lab.inference import separate
        class Same(torch.nn.Module):
            sample_rate, audio_channels, stems = 8000, 2, ("mixture",)
            def forward(self, mixture):
                return mixture[:, None]
        x = torch.rand(2, 9000)
        assert torch.allclose(separate(x, model=Same())["mixture"], x)
    """,
    "a monitor": """
        from tfswa_lab.performance import Monitor
        assert len(Monitor(keep=2).readings) == 1
    """,
    "the verbs of memory": """
        import torch
        import tfswa_lab.memory.leaks.diagnose, tfswa_lab.memory.predict.predict
        from tfswa_lab.memory import max_batch_size, snapshot, status
        from tfswa_lab.memory.leaks import diagnose
        from tfswa_lab.memory.predict import compare, predict
        from tfswa_lab.memory.trace import trace
        make_step = lambda **choices: lambda: None
        assert predict(make_step).peak == 0
        assert len(list(compare(make_step, {"batch": (1, 2)}))) == 2
        assert diagnose(make_step(), 8).verdict == "healthy"
        assert max_batch_size(lambda batch: lambda: torch.zeros(batch, 256), 2**20, 0) == 1024
        with trace() as seen:
            kept = torch.zeros(256)
        written = snapshot.read(snapshot.as_snapshot(seen.timeline()))
        assert written.fragmentation().allocated == 1024
        assert status().host_rss > 0
    """,
    "signatures": """
        from importlib import import_module
        from inspect import signature
        for room, name in (
            ("memory", "predict"), ("memory", "trace"), ("memory.leaks", "diagnose"),
            ("inference", "separate"), ("evaluation", "evaluate"),
        ):
            called = getattr(import_module(f"tfswa_lab.{room}"), name)
            module = import_module(f"tfswa_lab.{room}.{name}")
            assert signature(called) == signature(module) == signature(getattr(module, name))
    """,
}


@pytest.mark.parametrize("name", SNIPPETS)
def test_short_names_can_be_called(name):
    code = dedent(SNIPPETS[name])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
