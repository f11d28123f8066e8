"""The strict runner: each way in which a lesson can break without papermill noticing."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest
from nbclient.exceptions import DeadKernelError
from nbformat.v4 import new_code_cell, new_notebook

from tfswa_lab.memory.gauges import process_peak
from tfswa_lab.teaching import runner
from tfswa_lab.teaching.runner import MissingOutputError, WidgetError, run_notebook

SEED = "quick = True\ndevice = 'auto'\ndata_root = ''\nseed = 0  # of the random generator"


def write_notebook(path: Path, *sources: str) -> Path:
    cells = [new_code_cell(SEED, metadata={"tags": ["parameters"]})]
    cells += [new_code_cell(source) for source in sources]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, path)
    return path


def run(path: Path, timeout_seconds: float = 3600, **parameters):
    return run_notebook(path, path.parent / "out" / path.name, parameters, timeout_seconds)


def test_good_notebook_runs_in_its_folder_with_its_parameters_in_this_interpreter(tmp_path):
    path = write_notebook(
        tmp_path / "good.ipynb",
        "import sys, pathlib, ipywidgets",
        f"assert seed == 7 and sys.executable == {sys.executable!r}",
        f"assert pathlib.Path.cwd() == pathlib.Path({str(tmp_path)!r}).resolve()",
        "ipywidgets.interact(lambda x: print(1 / x), x=(1, 5));",
    )
    before = path.read_bytes()
    result = run(path, seed=7)
    assert result.name == "good"
    assert result.seconds > 0
    assert path.read_bytes() == before
    assert nbformat.read(tmp_path / "out/good.ipynb", 4).cells[-1].outputs


def test_drawings_are_copied_beside_the_executed_copy(tmp_path):
    drawing = tmp_path / "figures/curve.svg"
    drawing.parent.mkdir()
    drawing.write_text("<svg/>")
    path = write_notebook(tmp_path / "n.ipynb", "pass")
    for output in (tmp_path / "out/n.ipynb", tmp_path / "out/n.ipynb", tmp_path / "same.ipynb"):
        run_notebook(path, output, {}, timeout_seconds=3600)
    assert (tmp_path / "out/figures/curve.svg").read_text() == drawing.read_text() == "<svg/>"


def test_peak_memory_is_the_kernels_even_if_the_peak_was_short(tmp_path):
    idle = run(write_notebook(tmp_path / "idle.ipynb", "pass"))
    # 300 MB for an instant, between two looks of the watching thread.
    spike = run(write_notebook(tmp_path / "spike.ipynb", "x = b'x' * 300_000_000; del x"))
    difference = spike.peak_bytes - idle.peak_bytes
    assert 0.9 * 300e6 < difference < 1.3 * 300e6


def test_misspelt_parameter_fails(tmp_path):
    path = write_notebook(tmp_path / "n.ipynb", "pass")
    with pytest.raises(ValueError, match=r"no parameter \['sede'\].*'seed'"):
        run(path, sede=1)


def test_exception_fails_and_leaves_the_executed_copy(tmp_path):
    path = write_notebook(tmp_path / "n.ipynb", "1 / 0")
    with pytest.raises(papermill.PapermillExecutionError, match="ZeroDivisionError"):
        run(path)
    assert "ZeroDivisionError" in (tmp_path / "out/n.ipynb").read_text()


CALLBACKS = {
    "interact": "ipywidgets.interact(lambda x: 1 / x, x=(0, 0));",
    "interactive_output": (
        "s = ipywidgets.IntSlider(value=0)\n"
        "display(ipywidgets.interactive_output(lambda x: 1 / x, {'x': s}))"
    ),
    "moved slider": (
        "w = ipywidgets.interactive(lambda x: 1 / x, x=ipywidgets.IntSlider(value=1))\n"
        "display(w)\nw.children[0].value = 0"
    ),
    "explore": (
        "from tfswa_lab.teaching.widgets import explore\n"
        "explore(lambda x: 1 / x, x=ipywidgets.IntSlider(0))"
    ),
}


@pytest.mark.parametrize("source", CALLBACKS.values(), ids=CALLBACKS)
def test_exception_inside_a_widget_callback_fails(tmp_path, source):
    path = write_notebook(tmp_path / "n.ipynb", "import ipywidgets", source)
    with pytest.raises(WidgetError, match="ZeroDivisionError: division by zero"):
        run(path)


def test_cells_with_widgets_do_not_wait_for_ever(tmp_path):
    """Each such cell once had one chance in fifty to hang: its reply was never seen."""
    cell = (
        "s = ipywidgets.IntSlider()\n"
        "f = lambda x: [print(i, flush=True) for i in range(9)]\n"
        "ipywidgets.interactive_output(f, {'x': s})"
    )
    run(write_notebook(tmp_path / "n.ipynb", "import ipywidgets", *[cell] * 60))


def test_exception_inside_an_observer_fails(tmp_path):
    source = "s = ipywidgets.IntSlider()\ns.observe(lambda change: 1 / 0, 'value')\ns.value = 3"
    path = write_notebook(tmp_path / "n.ipynb", "import ipywidgets", source)
    with pytest.raises(papermill.PapermillExecutionError, match="ZeroDivisionError"):
        run(path)


def test_timeout_counts_for_the_whole_notebook(tmp_path):
    path = write_notebook(tmp_path / "n.ipynb", *["import time; time.sleep(2)"] * 15)
    with pytest.raises(TimeoutError, match=r"n\.ipynb: not finished after 3 s"):
        run(path, timeout_seconds=3)


def test_timeout_counts_while_the_kernel_starts(tmp_path):
    path = write_notebook(tmp_path / "n.ipynb", "pass")
    with pytest.raises(TimeoutError, match=r"n\.ipynb: not finished after 0 s"):
        run(path, timeout_seconds=0)


ENDS = {
    "exit": "os._exit(1)",
    "killed, as when memory runs out": "os.kill(os.getpid(), signal.SIGKILL)",
    "segmentation fault": "ctypes.string_at(0)",
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_dead_kernel_tells_its_peak_memory_and_is_not_called_a_timeout(tmp_path, monkeypatch, end):
    seen = tmp_path / "seen"

    def look(process):
        peak = process_peak(process)
        if peak > 300e6:
            seen.touch()
        return peak

    monkeypatch.setattr(runner, "process_peak", look)
    spike = "x = b'x' * 300_000_000; del x"
    wait = f"while not pathlib.Path({str(seen)!r}).exists(): pass"
    imports = "import ctypes, os, pathlib, signal"
    path = write_notebook(tmp_path / "n.ipynb", imports, spike, wait, end)
    with pytest.raises(DeadKernelError, match=r"n\.ipynb: .*died; its kernel had taken") as died:
        run(path)
    mebibytes = float(re.search(r"at least ([\d.]+) MiB", str(died.value))[1])
    assert 0.9 * 300e6 < mebibytes * 2**20 < 3 * 300e6


FIGURE = "import matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"


def test_figures_appear_whatever_backend_the_user_has_chosen(tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    run(write_notebook(tmp_path / "n.ipynb", FIGURE))
    (output,) = nbformat.read(tmp_path / "out/n.ipynb", 4).cells[-1].outputs
    assert "image/png" in output.data


LOST = {
    f"import matplotlib\nmatplotlib.use('agg')\n{FIGURE}": runner.PICTURE,
    "widgets.explore(f, x=IntSlider(1));": runner.WIDGET,
    "widgets.explore(f, x=IntSlider(1))\ny = 1": runner.WIDGET,
    "play('<audio>');": runner.PLAYER,
}


def test_cells_that_lose_what_they_show_are_named(tmp_path):
    first = "from IPython.display import HTML as play\nfrom ipywidgets import IntSlider\n"
    first += "from tfswa_lab.teaching import widgets\nf = lambda x: None"
    shown = "widgets.explore(f, x=IntSlider(1))", "x = play('<audio>')\ndisplay(x)"
    path = write_notebook(tmp_path / "n.ipynb", first, *shown, *LOST)
    cells = nbformat.read(path, 4).cells[-len(LOST) :]
    with pytest.raises(MissingOutputError) as lost:
        run(path)
    each = zip(cells, LOST.values(), strict=True)
    assert str(lost.value) == "n.ipynb: " + "; ".join(
        f"cell {cell.id} shows no {kind}" for cell, kind in each
    )


def test_only_what_a_cell_shows_in_any_case_is_asked_for():
    source = "def f():\n    plt.show()\nif full:\n    player.play({})\nshow = [explore]"
    assert runner.expected_outputs(source) == set()
    assert runner.expected_outputs("with x:\n    plot_peak(y);") == {runner.PICTURE}
    assert runner.expected_outputs("%time 1\ndisplay(play(x))") == {runner.PLAYER}
    assert runner.expected_outputs("w = widgets.explore(f)") == {runner.WIDGET}


def test_missing_notebook_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.ipynb"):
        run(tmp_path / "absent.ipynb")


def test_command_runs_all_of_them_and_exits_1_if_one_fails(tmp_path):
    write_notebook(tmp_path / "a.ipynb", "1 / 0")
    write_notebook(tmp_path / "b.ipynb", "assert not quick and device == 'cpu'")
    command = [sys.executable, "-m", "tfswa_lab.teaching.runner", "--full", "--device", "cpu"]
    command += ["--notebooks", str(tmp_path), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    runs = json.loads((tmp_path / "out/times.json").read_text())
    assert [run["name"] for run in runs] == ["a", "b"]
    assert "ZeroDivisionError" in runs[0]["error"]
    assert not runs[1]["error"]
    assert runs[1]["peak_bytes"] > 0
