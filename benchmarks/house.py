"""Measure how the package is built, from its source text alone: nothing is imported or run.

    python benchmarks/house.py [FOLDER ...]

Each folder is a checkout (without any: this one) and gets a column: `/tmp/before .` compares two.
A face is an `__init__` that defines no public name and only hands on those of other files. It
counts neither as importing nor as imported: who imports through it imports the file behind it.
"""

from __future__ import annotations

import ast
import io
import json
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from statistics import quantiles

CHECKOUT = Path(__file__).resolve().parents[1]
ROOT = "tfswa_lab"
STARTS = {  # the file's name now, and the one it had before
    "`leaks.diagnose`": ("memory.leaks.diagnose", "memory.leaks"),
    "`tfswa-lab evaluate`": ("evaluation.evaluate", "evaluation.report"),
    "`tfswa-lab train`": ("training.trainer",),
}
USERS = ["benchmarks/**/*.py", "data_scripts/**/*.py", "tests/**/*.py", "notebooks/*.ipynb"]
USERS += ["conftest.py", "pyproject.toml", "README.md"]
BY_FRAMEWORK = re.compile(r"\.(command|callback|fixture)\b")  # decorators of typer and pytest
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Source:
    """A file of the package, under its dotted name."""

    def __init__(self, folder: Path, path: Path) -> None:
        parts = path.relative_to(folder).with_suffix("").parts
        self.is_init = parts[-1] == "__init__"
        self.parts = parts[:-1] if self.is_init else parts
        self.name = ".".join(self.parts)
        self.text = path.read_text()
        self.nodes = list(ast.walk(ast.parse(self.text, path)))  # the module is the first
        self.filled = {n for n, line in enumerate(self.text.split("\n"), 1) if line.strip()}

    @cached_property
    def code(self) -> set[int]:
        """Numbers of the lines that hold code: not blank, no docstring, not a comment alone."""
        bare = [node.value for node in self.nodes if isinstance(node, ast.Expr)]
        texts = [n for n in bare if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        docstrings = {(text.lineno, text.col_offset) for text in texts}
        lines = set()
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in NO_CODE and token.start not in docstrings:
                lines.update(range(token.start[0], token.end[0] + 1))
        return lines & self.filled

    def function_lengths(self) -> list[int]:
        """Lines of code of each function, with its head; a nested one counts in both."""
        functions = [node for node in self.nodes if isinstance(node, FUNCTIONS)]
        return [len(self.code & set(range(f.lineno, f.end_lineno + 1))) for f in functions]

    @cached_property
    def public(self) -> list[str]:
        """Functions, classes and constants at the top level, without those that frameworks call."""
        names = []
        for node in self.nodes[0].body:
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                if not any(BY_FRAMEWORK.search(ast.unparse(d)) for d in node.decorator_list):
                    names.append(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                stored = (n for n in ast.walk(node) if isinstance(n, ast.Name))
                names += [n.id for n in stored if isinstance(n.ctx, ast.Store)]
        return [name for name in names if not name.startswith(("_", "pytest_"))]

    def imports(self) -> Iterator[tuple[str, str]]:
        """Each import, wherever it stands: the module, and the name out of it or ""."""
        for node in self.nodes:
            if isinstance(node, ast.Import):
                yield from ((alias.name, "") for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                kept = len(self.parts) + self.is_init - node.level
                above = self.parts[:kept] if node.level else ()
                module = ".".join(filter(None, [*above, node.module]))
                yield from ((module, alias.name) for alias in node.names)

    def handed_on(self) -> dict[str, tuple[str, str]]:
        """Of a face: each name with the import that it stands for, written out or lazy."""
        names = {n: (module, n) for module, n in self.imports() if module != self.name}
        lazy = [n.value for n in self.nodes if getattr(n, "arg", None) == "submod_attrs"]
        for module, attributes in (pair for d in lazy for pair in ast.literal_eval(d).items()):
            names |= {n: (f"{self.name}.{module}", n) for n in attributes}
        return names


class Package:
    """All files of a checkout's package, and which imports which."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources = [Source(folder, path) for path in sorted(folder.glob(f"{ROOT}/**/*.py"))]
        if not self.sources:
            raise ValueError(f"{folder}/{ROOT} has no Python files; name a checkout")
        self.files = {s.name: s for s in self.sources if s.public or not s.is_init}
        self.faces = {s.name: s.handed_on() for s in self.sources if s.name not in self.files}
        self.imported = {name: self._imported_by(s) - {name} for name, s in self.files.items()}

    def _imported_by(self, source: Source) -> set[str]:
        found = {self._origin(module, name) for module, name in source.imports()}
        for face in found & self.faces.keys():  # imported whole: all that it hands on
            found |= {self._origin(face, name) for name in self.faces[face]}
        return found & self.files.keys()

    def _origin(self, module: str, name: str) -> str:
        """The file that defines what is imported, or else the face."""
        if name in self.faces.get(module, {}):
            return self._origin(*self.faces[module][name])
        inner = f"{module}.{name}"
        return inner if inner in self.files or inner in self.faces else module

    def below(self, start: str) -> set[str]:
        """Files that one stands on, directly or not; itself only where it is in a circle."""
        found, waiting = set(), [start]
        while waiting:
            new = self.imported[waiting.pop()] - found
            found |= new
            waiting += new
        return found

    def height(self, names: tuple[str, ...]) -> int:
        """On how many others the first of these files that exists stands."""
        start = next(s for name in names if (s := f"{ROOT}.{name}") in self.files)
        return len(self.below(start) - {start})

    def circles(self) -> list[str]:
        """Groups of files in which each stands on each."""
        below = {name: self.below(name) for name in self.files}
        groups = {frozenset(b for b in below[a] if a in below[b]) for a in self.files}
        return sorted(", ".join(sorted(group)) for group in groups if group)

    def unused(self) -> list[str]:
        """Public names that no other file mentions, and their own only where it defines them."""
        paths = {path for pattern in USERS for path in self.folder.glob(pattern)}
        users = "\n".join(_read(path) for path in paths if path.name != Path(__file__).name)
        own = {name: Counter(re.findall(r"\w+", s.text)) for name, s in self.files.items()}
        everywhere = sum(own.values(), Counter(re.findall(r"\w+", users)))
        return [
            f"{file}.{name}"
            for file, source in self.files.items()
            for name in source.public
            if everywhere[name] == own[file][name] == 1
        ]


def _read(path: Path) -> str:
    """Text of a file, and of a notebook that of its code cells."""
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def column(package: Package) -> dict[str, object]:
    """The figures of one checkout."""
    code = sum(len(source.code) for source in package.sources)
    filled = sum(len(source.filled) for source in package.sources)
    importers = Counter(name for names in package.imported.values() for name in names)
    tenths = quantiles((n for s in package.sources for n in s.function_lengths()), n=10)
    return {
        "files": len(package.sources),
        "… of them an `__init__` that only hands names on": len(package.faces),
        "lines of code": code,
        "lines of docstrings and comments": filled - code,
        "lines of code in a function: median, 90th percentile": f"{tenths[4]:.0f}, {tenths[8]:.0f}",
        "files that exactly one other imports": list(importers.values()).count(1),
        **{f"files that {what} stands on": package.height(STARTS[what]) for what in STARTS},
        "circles of imports": len(package.circles()),
        "public names that nobody uses": len(package.unused()),
    }


def main(folders: list[Path]) -> None:
    """Print the table, and below it, for each checkout, circles and names without a use."""
    packages = [Package(folder) for folder in folders]
    columns = [column(package) for package in packages]
    print("|", *(f"| {folder}" for folder in folders), "|")
    print("| --- |" + " ---: |" * len(folders))
    for row in columns[0]:
        print(f"| {row} |", " | ".join(str(figures[row]) for figures in columns), "|")
    for folder, package in zip(folders, packages, strict=True):
        for title, lines in (("circles", package.circles()), ("unused", package.unused())):
            print(f"\n{folder}, {title}:", *(lines or ["none"]), sep="\n- ")


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]] or [CHECKOUT])
