"""Every lesson: its shape is what a reader expects, and it runs from top to bottom."""

import ast
import builtins
import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")  # a borrowed GPU machine may have none of these
for package in ("papermill", "ipykernel"):
    pytest.importorskip(package)

from nbformat import NotebookNode  # noqa: E402

from tfswa_lab.teaching.runner import run_notebook  # noqa: E402

CHECKOUT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((CHECKOUT / "notebooks").glob("*.ipynb"))
lessons = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# A lesson is one page that also fits a small lesson like 00_start_here.
CELLS, WORDS, CODE_LINES = range(25, 51), range(800, 2501), 25
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


def markdown(notebook: NotebookNode) -> str:
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def python(cell: NotebookNode) -> ast.Module:
    """The cell's Python, without IPython's magics."""
    return ast.parse(re.sub(r"^[%!].*$", "pass", cell.source, flags=re.MULTILINE))


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
    solutions = [cell for cell in notebook.cells if "solution" in cell.metadata.get("tags", ())]
    assert len(exercises) == len({heading.lstrip("# ") for heading in exercises})
    assert len([cell for cell in solutions if cell.cell_type == "code"]) >= len(exercises)
    if path.stem != "00_start_here":
        assert len(exercises) == 3


def bound(cell: NotebookNode) -> set[str]:
    """Names that a cell defines at its top level, in loops and `with` blocks too."""
    found, nodes = set(), list(python(cell).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        else:
            stores = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            found |= {node.id} if stores else set()
            nodes += ast.iter_child_nodes(node)
    return found


def used(cell: NotebookNode) -> set[str]:
    nodes = ast.walk(python(cell))
    return {node.id for node in nodes if isinstance(node, ast.Name)}


@lessons
def test_no_cell_needs_a_solution(path):
    """So the lesson also runs for a class, which gets it without them."""
    defined, of_solutions = set(dir(builtins)), set()
    for cell in code_cells(read(path)):
        if "solution" in cell.metadata.get("tags", ()):
            of_solutions |= bound(cell) - defined
        else:
            assert not used(cell) & (of_solutions - bound(cell)), cell.source
            defined |= bound(cell)
            of_solutions -= defined


QUICK = {"quick": True, "seed": 0, "device": "cpu", "data_root": ""}


@pytest.mark.notebook
@lessons
def test_runs_in_quick_mode(path, band_root, tmp_path):
    run = run_notebook(path, tmp_path / path.name, QUICK, timeout_seconds=600)
    assert run.peak_bytes <= 4 * 2**30


@pytest.mark.gpu
@pytest.mark.notebook
@lessons
def test_runs_on_a_gpu(path, band_root, tmp_path):
    """The executed lessons stay where TFSWA_LAB_EXECUTED says: docs/ci-gpu.yml hands them on."""
    folder = Path(os.environ.get("TFSWA_LAB_EXECUTED") or tmp_path)
    run_notebook(path, folder / path.name, QUICK | {"device": "cuda"}, timeout_seconds=600)


@pytest.fixture(scope="session")
def students_folder(tmp_path_factory) -> Path:
    """The lessons without their solutions, as a class gets them."""
    folder = tmp_path_factory.mktemp("students")
    for path in NOTEBOOKS:
        notebook = read(path)
        keep = [cell for cell in notebook.cells if "solution" not in cell.metadata.get("tags", ())]
        notebook.cells = keep
        nbformat.write(notebook, folder / path.name)
    return folder


TO_HEAR = [path for path in NOTEBOOKS if "lesson_root(data_root)" in path.read_text()]


@pytest.mark.notebook
@pytest.mark.audio
@pytest.mark.parametrize("path", TO_HEAR, ids=lambda path: path.stem)
def test_runs_as_a_class_gets_it(path, students_folder, music_delta, band_root, tmp_path):
    """Without solutions and on real songs: two questions in one run."""
    parameters = QUICK | {"data_root": str(music_delta)}
    run_notebook(students_folder / path.name, tmp_path / path.name, parameters, 600)
