"""An evaluation that is killed goes on; one that was made otherwise is not mixed with another."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import soundfile
import torch
from distributed import Client, LocalCluster
from filelock import FileLock
from joblib import parallel_config

from tfswa_lab.evaluation.estimates import FolderEstimates, ModelEstimates
from tfswa_lab.evaluation.evaluate import evaluate
from tfswa_lab.evaluation.report import load_report
from tfswa_lab.evaluation.scoring import Evaluation
from tfswa_lab.inference.separate import Segmentation
from tfswa_lab.models.separator import build_separator
from tfswa_lab.models.storage import save_separator

MINI = {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": 1, "window_size": 4}
SOURCES = ("vocals", "drums", "bass", "other")
STEMS = ("vocals", "other")  # two of them are scored much faster
SECOND = 44_100
QUICK = Evaluation(window=0.5, hop=0.5, bounds=())
RUN = """
import sys
from tfswa_lab.evaluation.estimates import FolderEstimates
from tfswa_lab.evaluation.evaluate import evaluate
from tfswa_lab.evaluation.scoring import Evaluation
data, guesses, out = sys.argv[1:]
estimates = FolderEstimates(guesses, ("vocals", "other"))
evaluate(estimates, data, out, Evaluation(window=0.5, hop=0.5, bounds=["mixture"], jobs=2))
"""


def write_noise(folder, seed, seconds=1):
    folder.mkdir(parents=True)
    stems = 0.1 * np.random.default_rng(seed).standard_normal((4, seconds * SECOND, 2))
    for name, samples in zip((*SOURCES, "mixture"), (*stems, stems.sum(0)), strict=True):
        soundfile.write(folder / f"{name}.wav", samples, SECOND)


@pytest.fixture
def data(tmp_path):
    for number in range(3):
        write_noise(tmp_path / "data" / "test" / f"Song {number}", number)
    return tmp_path / "data"


@pytest.fixture
def guesses(tmp_path, data):
    """For every stem, a bit of it and a bit of everything."""
    for song in (data / "test").iterdir():
        folder = tmp_path / "guesses" / "test" / song.name
        folder.mkdir(parents=True)
        mixture, _ = soundfile.read(song / "mixture.wav")
        for stem in SOURCES:
            truth, _ = soundfile.read(song / f"{stem}.wav")
            soundfile.write(folder / f"{stem}.wav", 0.7 * truth + 0.1 * mixture, SECOND)
    return tmp_path / "guesses"


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.json")}


def end_group(leader):
    """joblib's workers outlive their parent for some minutes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


class Killed(FolderEstimates):
    """Estimates whose second song kills the process, once the scores of the first are there."""

    def __init__(self, folder, first):
        super().__init__(folder, STEMS)
        self.first = first

    def estimate(self, track, mixture):
        if track.name == "Song 1":
            while not self.first.is_file():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().estimate(track, mixture)


def test_a_worker_that_is_killed_is_told_and_finished_songs_are_kept(data, guesses, tmp_path):
    out = tmp_path / "out"
    estimates = Killed(guesses, out / "test" / "Song 0.json")
    with pytest.raises(ChildProcessError, match=r"one of 2 .*songs are kept.* fewer jobs"):
        evaluate(estimates, data, out, replace(QUICK, jobs=2))
    part = load_report(out)
    assert "Song 0" in part.tracks
    assert "Song 1" not in part.tracks
    assert part.gaps == (f"{len(part.tracks)} of 3 songs are scored: evaluate again for the rest",)
    assert part.notes()[0] == part.gaps[0]
    before = stamps(out)
    whole = evaluate(FolderEstimates(guesses, STEMS), data, out, QUICK)
    assert stamps(out).items() >= before.items()
    assert load_report(out) == whole
    assert whole.gaps == ()


def test_bounds_that_some_songs_lack_are_left_out_and_told(data, guesses, tmp_path):
    out = tmp_path / "out"
    settings = replace(QUICK, bounds=("mixture",))
    report = evaluate(FolderEstimates(guesses, STEMS), data, out, settings)
    (out / "bounds" / "mixture" / "test" / "Song 1.json").unlink()
    part = load_report(out)
    assert part.scores == {"estimates": report.scores["estimates"]}
    assert part.gaps == ("mixture (floor): left out, scored for 2 of 3 songs",)


def test_sigkill_of_two_processes_loses_no_finished_song(data, guesses, tmp_path, request):
    for number in range(3, 6):
        write_noise(data / "test" / f"Song {number}", number)
        (guesses / "test" / f"Song {number}").symlink_to(data / "test" / f"Song {number}")
    out = tmp_path / "out"
    command = [sys.executable, "-c", RUN, data, guesses, out]
    child = subprocess.Popen(command, start_new_session=True)
    while len(list((out / "test").glob("*.json"))) < 2:
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    request.addfinalizer(partial(end_group, child.pid))
    finished = stamps(out)
    assert 2 <= len(list((out / "test").glob("*.json"))) < 6
    scored = []
    settings = replace(QUICK, bounds=["mixture"])
    report = evaluate(
        FolderEstimates(guesses, STEMS),
        data,
        out,
        settings,
        progress=lambda names: scored.extend(names) or iter(names),
    )
    assert len(report.tracks) == 6
    assert len(scored) == 6 - sum(path.parent.parent == out for path in finished)
    assert stamps(out).items() >= finished.items()
    evaluate(FolderEstimates(guesses, STEMS), data, tmp_path / "whole", settings)
    assert contents(out) == contents(tmp_path / "whole")  # made by one process
    assert load_report(out) == report


def test_finished_songs_and_bounds_are_not_scored_again(data, guesses, tmp_path):
    out = tmp_path / "out"
    evaluate(FolderEstimates(guesses, STEMS), data, out, QUICK)
    first = stamps(out)
    settings = replace(QUICK, bounds=("mixture", "irm"))
    report = evaluate(FolderEstimates(guesses, STEMS), data, out, settings)  # adds the bounds
    assert report.methods == ["mixture", "estimates", "irm"]
    everything = stamps(out)
    assert len(everything) == 9
    assert everything.items() >= first.items()
    evaluate(FolderEstimates(guesses, STEMS), data, out, settings)
    assert stamps(out) == everything
    other = tmp_path / "other"
    evaluate(
        FolderEstimates(data, STEMS), data, other, replace(settings, bounds_dir=out / "bounds")
    )
    assert stamps(out) == everything
    assert len(stamps(other)) == 3


def test_other_settings_models_and_files_are_refused_and_named(data, guesses, tmp_path):
    out = tmp_path / "out"
    evaluate(FolderEstimates(guesses, STEMS), data, out, QUICK)
    before = contents(out)
    torch.manual_seed(0)
    model = build_separator(STEMS, n_fft=512, hop_length=128, **MINI).eval()
    estimates = FolderEstimates(guesses, STEMS)
    for estimator, settings, words in (
        (estimates, {"window": 1.0}, "window was 0.5 and is 1.0 now"),
        (estimates, {"seconds": 0.7}, "seconds was None and is 0.7 now"),
        (ModelEstimates(model), {}, "the estimator's estimates was files and is absent now"),
        (FolderEstimates(guesses, ("vocals", "drums")), {}, "stems was"),
    ):
        with pytest.raises(ValueError, match="choose another output folder, or overwrite") as error:
            evaluate(estimator, data, out, replace(QUICK, **settings))
        assert words in str(error.value)
        assert "Song 0.json" in str(error.value)
    samples, rate = soundfile.read(guesses / "test" / "Song 1" / "other.wav")
    soundfile.write(guesses / "test" / "Song 1" / "other.wav", samples / 2, rate)
    with pytest.raises(ValueError, match=r"Song 1\.json .*estimates/other\.wav was \w{8}… and is"):
        evaluate(estimates, data, out, QUICK)
    assert contents(out) == before
    evaluate(estimates, data, out, replace(QUICK, overwrite=True))
    changed = {path.name for path, text in contents(out).items() if before[path] != text}
    assert changed == {"Song 1.json"}


def test_a_model_is_known_by_its_weights_not_by_its_folder(data, tmp_path):
    out = tmp_path / "out"
    settings = replace(QUICK, seconds=0.5, window=0.1)
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        separator = build_separator(STEMS, n_fft=512, hop_length=128, **MINI)
        models.append(save_separator(separator, tmp_path / f"model{len(models)}"))
    evaluate(ModelEstimates(models[0]), data, out, settings)
    evaluate(ModelEstimates(models[1]), data, out, settings)
    with pytest.raises(ValueError, match=r"model was \w{8}… and is \w{8}… now"):
        evaluate(ModelEstimates(models[2]), data, out, settings)
    with pytest.raises(ValueError, match=r"overlap was 0\.25 and is 0\.5 now"):
        evaluate(ModelEstimates(models[0], Segmentation(overlap=0.5)), data, out, settings)


def test_bounds_that_differ_are_refused_and_with_overwrite_made_anew(data, guesses, tmp_path):
    settings = replace(QUICK, bounds=("mixture",))
    evaluate(FolderEstimates(guesses, STEMS), data, tmp_path / "out", settings)
    bounds = tmp_path / "out" / "bounds"
    settings = replace(settings, bounds_dir=bounds, seconds=0.5)
    with pytest.raises(ValueError, match="choose another bounds folder, or overwrite"):
        evaluate(FolderEstimates(guesses, STEMS), data, tmp_path / "two", settings)
    report = evaluate(
        FolderEstimates(guesses, STEMS), data, tmp_path / "two", replace(settings, overwrite=True)
    )
    assert report.scores["mixture"][0].seconds == 0.5
    with pytest.raises(ValueError, match=r"Song 0.json is of other frames, stems or audio"):
        load_report(tmp_path / "out")  # whose bounds were written over


class Stopped(Exception):
    pass


def after_one(names):
    """As if killed after the first song."""
    yield names[0]
    raise Stopped


def test_an_overwrite_that_is_killed_goes_on_without_overwrite(data, guesses, tmp_path):
    out, estimates = tmp_path / "out", FolderEstimates(guesses, STEMS)
    evaluate(estimates, data, out, replace(QUICK, bounds=("mixture",)))
    settings = replace(QUICK, bounds=("mixture",), seconds=0.6)
    with pytest.raises(Stopped):
        evaluate(estimates, data, out, replace(settings, overwrite=True), progress=after_one)
    before = stamps(out)
    assert len(before) == 2  # a song's estimates and floor; nothing of other settings is left
    report = evaluate(estimates, data, out, settings)
    assert stamps(out).items() >= before.items()
    assert {song.seconds for song in (*report.scores["estimates"], *report.scores["mixture"])} == {
        0.6
    }


def test_broken_and_foreign_files_are_refused_and_with_overwrite_made_anew(data, guesses, tmp_path):
    out, estimates = tmp_path / "out", FolderEstimates(guesses, STEMS)
    settings = replace(QUICK, bounds=("mixture",))
    report = evaluate(estimates, data, out, settings)
    own, bound = (folder / "test" / "Song 1.json" for folder in (out, out / "bounds" / "mixture"))
    for path, content in ((own, "{"), (bound, "[]")):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"Song 1\.json is not .*, or overwrite it"):
            evaluate(estimates, data, out, settings)
        kept = stamps(out / "bounds").keys() - {bound}
        before = {path: stamp for path, stamp in stamps(out).items() if path in kept}
        assert evaluate(estimates, data, out, replace(settings, overwrite=True)) == report
        assert stamps(out).items() >= before.items()  # bounds that agree stay


def test_an_overwrite_that_cannot_begin_removes_nothing(data, guesses, tmp_path):
    out = tmp_path / "out"
    evaluate(FolderEstimates(guesses, STEMS), data, out, QUICK)
    before = contents(out)
    (guesses / "test" / "Song 2" / "vocals.wav").unlink()
    with pytest.raises(FileNotFoundError, match=r"vocals\.wav is missing"):
        evaluate(FolderEstimates(guesses, STEMS), data, out, replace(QUICK, overwrite=True))
    assert contents(out) == before


def test_scores_of_different_settings_are_no_report(data, guesses, tmp_path):
    for seconds, out in ((0.6, tmp_path / "a"), (0.7, tmp_path / "b")):
        evaluate(FolderEstimates(guesses, STEMS), data, out, replace(QUICK, seconds=seconds))
    other = tmp_path / "b" / "test" / "Song 1.json"
    (tmp_path / "a" / "test" / "Song 1.json").write_bytes(other.read_bytes())
    with pytest.raises(ValueError, match=r"Song 1\.json .* seconds was 0\.6 and is 0\.7 now"):
        load_report(tmp_path / "a")


def test_a_report_of_a_split_or_of_bounds_that_are_not_there_is_refused(data, guesses, tmp_path):
    out = tmp_path / "out"
    evaluate(FolderEstimates(guesses, STEMS), data, out, replace(QUICK, bounds=("mixture",)))
    with pytest.raises(ValueError, match="unknown split 'tests'; did you mean 'test'"):
        load_report(out, "tests")
    for folder in (tmp_path / "nowhere", data):
        with pytest.raises(FileNotFoundError, match=r"bounds_dir=.* holds no test/ of mixture"):
            load_report(out, bounds_dir=folder)
    assert load_report(out, bounds_dir=out / "bounds").methods == ["mixture", "estimates"]


def test_a_folder_of_other_songs_or_files_is_refused(data, guesses, tmp_path):
    out = tmp_path / "out"
    (out / "test").mkdir(parents=True)
    (out / "test" / "Song 0.json").write_text(json.dumps({"targets": []}))  # museval's own
    with pytest.raises(ValueError, match=r"Song 0\.json is not a file of scores"):
        evaluate(FolderEstimates(guesses, STEMS), data, out, QUICK)
    evaluate(FolderEstimates(guesses, STEMS), data, out, replace(QUICK, overwrite=True))
    (out / "test" / "Elsewhere.json").write_text("{}")
    with pytest.raises(ValueError, match=r"Elsewhere\.json is of none of the 3 songs"):
        evaluate(FolderEstimates(guesses, STEMS), data, out, replace(QUICK, overwrite=True))


def test_one_evaluation_to_a_folder(data, guesses, tmp_path):
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(FileExistsError, match="another process is evaluating"),
    ):
        evaluate(FolderEstimates(guesses, STEMS), data, tmp_path / "out", QUICK)


def test_bounds_are_written_beside_those_who_hold_the_folder(data, guesses, tmp_path):
    estimates, settings = FolderEstimates(guesses, STEMS), replace(QUICK, bounds=("mixture",))
    shared = tmp_path / "shared"
    shared.mkdir()
    with FileLock(shared / ".lock"):  # an evaluation whose output it is
        evaluate(estimates, data, tmp_path / "out", replace(settings, bounds_dir=shared))
    with pytest.raises(ValueError, match="is the output folder itself"):
        evaluate(
            estimates,
            data,
            shared,
            replace(settings, bounds_dir=tmp_path / "out" / ".." / "shared"),
        )


def test_dask_scores_songs_in_its_workers(data, guesses, tmp_path):
    one = evaluate(FolderEstimates(guesses, STEMS), data, tmp_path / "one", QUICK)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster),
        parallel_config(backend="dask"),
    ):
        dask = evaluate(FolderEstimates(guesses, STEMS), data, tmp_path / "dask", QUICK)
    assert dask == one
