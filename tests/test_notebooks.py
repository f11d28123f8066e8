"""Every lesson: its shape is what a reader expects, and it runs from top to bottom."""

import ast
import dis
import os
import re
import shutil
import sys
from pathlib import Path
from types import CodeType

import pytest

nbformat = pytest.importorskip("nbformat")  # a borrowed GPU machine may have none of these
for package in ("papermill", "ipykernel"):
    pytest.importorskip(package)

from nbformat import NotebookNode  # noqa: E402
from nbformat.v4 import new_code_cell, new_markdown_cell  # noqa: E402

from tfswa_lab.teaching.runner import (  # noqa: E402
    PICTURE,
    WIDGET,
    expected_outputs,
    run_notebook,
)

CHECKOUT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((CHECKOUT / "notebooks").glob("*.ipynb"))
lessons = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# A lesson is one page that also fits a small lesson like 00_start_here.
CELLS, WORDS, CODE_LINES = range(25, 81), range(800, 6001), 25
FORBIDDEN = {
    r"^\s*[!%]+\s*pip\b": "installs packages",
    r"%%capture": "hides output",
    r"\b(filter|simplefilter)warnings\b|warnings\.(filter|simplefilter)": "hides warnings",
    r"https?://|urlopen|requests\.get|urlretrieve": "needs the network",
    r"['\"](/(home|Users|tmp|work|root|mnt|content)\b|[A-Z]:\\\\)": "has an absolute path",
}


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def is_solution(cell: NotebookNode) -> bool:
    return "solution" in cell.metadata.get("tags", ())


def markdown(notebook: NotebookNode) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def python(cell: NotebookNode) -> ast.Module:
    """The cell's Python, without IPython's magics."""
    return ast.parse(re.sub(r"^[%!].*$", "pass", cell.source, flags=re.MULTILINE))


def names(cell: NotebookNode) -> tuple[set[str], set[str]]:
    """Names that a cell reads before it binds them, those in its functions too; names it binds."""
    needed, bound = set(), set()

    def follow(code: CodeType, inside: bool) -> None:
        for step in dis.get_instructions(code):
            if isinstance(step.argval, CodeType):
                follow(step.argval, inside=True)
            elif step.opname == "STORE_NAME" and not inside:
                bound.add(step.argval)
            elif step.opname in {"LOAD_NAME", "LOAD_GLOBAL"} and step.argval not in bound:
                needed.add(step.argval)

    follow(compile(python(cell), "cell", "exec"), inside=False)
    return needed, bound


def changed_in_place(cell: NotebookNode) -> set[str]:
    """Names of objects that a cell may change: `x[0] = 1`, `x.y = 1`, `x.append(1)`."""
    found = set()
    for node in ast.walk(python(cell)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            owner = node.value.func
        else:
            owner = node if isinstance(getattr(node, "ctx", None), ast.Store) else None
        while isinstance(owner, ast.Subscript | ast.Attribute):
            owner = owner.value
            found |= {owner.id} if isinstance(owner, ast.Name) else set()
    return found


def imported(cells: list[NotebookNode]) -> set[str]:
    """Names that cells import: what a lesson calls there changes nothing for its other cells."""
    nodes = [node for cell in cells for node in ast.walk(python(cell))]
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return {alias.asname or alias.name.split(".")[0] for node in imports for alias in node.names}


@lessons
def test_shape(path):
    notebook = read(path)
    text = markdown(notebook)
    assert notebook.cells[0].source.startswith("# "), "the first cell is the title"
    assert notebook.metadata.kernelspec.name == "python3"
    assert len(notebook.cells) in CELLS
    assert len(re.findall(r"\w[\w'’-]*", re.sub(r"\$[^$]*\$", " ", text))) in WORDS
    for heading in ("Summary", "References"):
        assert re.search(rf"^#+ .*{heading}", text, re.MULTILINE), f"no section {heading}"


@lessons
def test_parameters_come_first(path):
    first, *others = code_cells(read(path))
    assert "parameters" in first.metadata.tags
    assert not any("parameters" in cell.metadata.get("tags", ()) for cell in others)
    assigned = [target.id for node in python(first).body for target in node.targets]
    assert assigned[:4] == ["quick", "seed", "device", "data_root"]
    assert len(assigned) <= 6
    assert all("#" in line for line in first.source.splitlines() if "=" in line), "say what it is"


def set_up_cells(path: Path) -> list[CodeType]:
    """The first cells, down to the one that picks the device."""
    cells = code_cells(read(path))
    (last,) = [i for i, cell in enumerate(cells) if "pick_device(device)" in cell.source]
    return [compile(python(cell), path.stem, "exec") for cell in cells[: last + 1]]


@lessons
def test_set_up_cells_can_run_twice(path, one_thread):
    parameters, *set_up = set_up_cells(path)
    namespace = {}
    exec(parameters, namespace)
    for code in [*set_up, *set_up]:
        exec(code, namespace)
    assert str(namespace["device"]) in {"cpu", "cuda"}


@lessons
def test_set_up_refuses_every_parameter_of_the_wrong_type(path, one_thread):
    parameters, *imports, last = set_up_cells(path)
    defaults, namespace = {}, {}
    exec(parameters, {}, defaults)
    for code in imports:
        exec(code, namespace)
    for name, default in defaults.items():
        wrong = 5 if isinstance(default, str) else "false"
        with pytest.raises(ValueError, match=f"^{name}={wrong!r} .* must be .*: -p {name} "):
            exec(last, namespace | defaults | {name: wrong})


@lessons
def test_a_lesson_draws_and_has_a_widget(path):
    """The runner makes sure that both appear."""
    cells = [cell.source for cell in code_cells(read(path)) if not is_solution(cell)]
    assert {PICTURE, WIDGET} <= set().union(*map(expected_outputs, cells))


@lessons
def test_drawings_are_there_and_described(path):
    for described, drawing in re.findall(r"!\[(.*?)\]\((.*?)\)", markdown(read(path))):
        assert len(described.split()) >= 10, f"say what {drawing} shows"
        assert "<title" in (path.parent / drawing).read_text(), "an SVG with a title"


@lessons
def test_committed_without_outputs(path):
    for cell in code_cells(read(path)):
        assert not cell.outputs
        assert cell.execution_count is None


@lessons
def test_code_is_short_and_honest(path):
    for cell in code_cells(read(path)):
        assert len(cell.source.splitlines()) <= CODE_LINES, cell.source
        for pattern, reason in FORBIDDEN.items():
            assert not re.search(pattern, cell.source, re.MULTILINE), f"{reason}: {cell.source}"
        for node in python(cell).body:
            silent = isinstance(node, ast.Try) and any(
                all(isinstance(line, ast.Pass) for line in handler.body)
                for handler in node.handlers
            )
            assert not silent, f"swallows an exception: {cell.source}"


@lessons
def test_every_exercise_has_a_solution(path):
    notebook = read(path)
    exercises = re.findall(r"^#+ .*Exercise \d", markdown(notebook), re.MULTILINE)
    solutions = [cell for cell in notebook.cells if is_solution(cell)]
    assert len(exercises) == len({heading.lstrip("# ") for heading in exercises})
    code = [cell for cell in solutions if cell.cell_type == "code"]
    assert len(code) >= len(exercises)
    hidden = {"source_hidden": True, "outputs_hidden": True}
    assert all(cell.metadata.get("jupyter") == hidden for cell in code), "an answer can be seen"
    if path.stem != "00_start_here":
        assert len(exercises) == 3


@lessons
def test_no_cell_needs_a_solution(path):
    """So the lesson also runs for a class, which gets it without them."""
    of_solutions = set()
    for cell in code_cells(read(path)):
        needed, bound = names(cell)
        if is_solution(cell):
            of_solutions |= bound
        else:
            assert not needed & of_solutions, cell.source
            of_solutions -= bound


QUICK = {"quick": True, "seed": 0, "device": "cpu", "data_root": ""}


@pytest.mark.notebook
@lessons
def test_runs_in_quick_mode_and_as_a_class_gets_it(
    path, lessons_folder, songs_folder, band_root, lab_kernel, tmp_path
):
    """On the band; then, where there are real songs, without solutions on these.

    The kernel has what `[lab]` installs, and nothing else. Cells in which other songs change
    nothing run once: in test_no_cell_needs_a_solution, the rest is seen not to need the solutions
    either.
    """
    notebook = read(path)
    if songs_folder:
        others = [cell for cell in code_cells(notebook)[1:] if not is_solution(cell)]
        again = [new_code_cell(cell.source) for cell in affected(others, {"data_root"})]
        parameters = (QUICK | {"data_root": songs_folder}).items()
        sources = "\n".join(f"{name} = {value!r}" for name, value in parameters)
        title = new_markdown_cell("## Without solutions, on real songs")
        notebook.cells += [title, new_code_cell(sources), *again]
    nbformat.write(notebook, lessons_folder / path.name)
    run = run_notebook(lessons_folder / path.name, tmp_path / path.name, QUICK, 1800)
    assert run.peak_bytes <= 4 * 2**30


@pytest.fixture
def lab_kernel(lab_python, monkeypatch):
    """Kernels have what `[lab]` installs, and nothing else."""
    monkeypatch.setattr(sys, "executable", str(lab_python))


@pytest.fixture
def lessons_folder(tmp_path) -> Path:
    """A folder with all lessons, as a lesson may read the others; results of benchmarks beside."""
    shutil.copytree(CHECKOUT / "benchmarks/results", tmp_path / "benchmarks/results")
    return Path(shutil.copytree(CHECKOUT / "notebooks", tmp_path / "notebooks"))


def affected(cells: list[NotebookNode], changed: set[str]) -> list[NotebookNode]:
    """The cells that read a changed name, directly or not, and those that make what these read."""
    chosen, changed = set(), set(changed)
    for number, cell in enumerate(cells):
        needed, bound = names(cell)
        if needed & changed:
            chosen.add(number)
            changed |= (bound | changed_in_place(cell)) - imported(cells)
    wanted = set()
    for number in reversed(range(len(cells))):
        needed, bound = names(cells[number])
        if number in chosen or bound & wanted:
            chosen.add(number)
            wanted |= needed
    return [cells[number] for number in sorted(chosen)]


def test_cells_that_songs_change_run_again_with_what_they_need():
    sources = {
        "imports": "import math\nfrom pathlib import Path",
        "songs": "songs = Path(data_root)",
        "size": "size = math.pi",
        "apart": "area = size**2\nsong = 1",
        "mean": "def mean(of):\n    return [song for song in songs if of < size]",
        "loop": "for song in range(3):\n    print(song)",
        "call": "average = mean(3)",
        "apart too": "print(area, song)",
    }
    cells = {name: new_code_cell(source) for name, source in sources.items()}

    def again(*changed):
        found = affected(list(cells.values()), set(changed))
        return [name for name, cell in cells.items() if cell in found]

    assert again("data_root") == ["imports", "songs", "size", "mean", "call"]
    assert again("nothing") == []


@pytest.mark.gpu
@pytest.mark.notebook
@lessons
def test_runs_on_a_gpu(path, band_root, tmp_path):
    """The executed lessons stay where TFSWA_LAB_EXECUTED says: docs/ci-gpu.yml hands them on."""
    folder = Path(os.environ.get("TFSWA_LAB_EXECUTED") or tmp_path)
    run_notebook(path, folder / path.name, QUICK | {"device": "cuda"}, timeout_seconds=1800)


@pytest.mark.notebook
def test_the_first_lesson_runs_from_a_students_copy(songs_folder, band_root, lab_kernel, tmp_path):
    """The whole copy in a kernel of its own: what the cells chosen above stand for."""
    for path in NOTEBOOKS:
        notebook = read(path)
        notebook.cells = [cell for cell in notebook.cells if not is_solution(cell)]
        nbformat.write(notebook, tmp_path / path.name)
    first = NOTEBOOKS[0].name
    parameters = QUICK | {"data_root": songs_folder}
    run_notebook(tmp_path / first, tmp_path / "out" / first, parameters, 1800)
