"""`tfswa-lab memory`: snapshots of other machines, and steps of yours, in a terminal.

Notebook: 06_leak_diagnosis
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tfswa_lab.cli.errors import one_line_errors
from tfswa_lab.cli.options import takes

if TYPE_CHECKING:
    from tfswa_lab.memory.snapshot import Snapshot
    from tfswa_lab.memory.snapshot.viewer import Grouping

LESS_MEMORY = "read fewer of the newest entries with --last, or close other programs"
memory = typer.Typer(no_args_is_help=True, help="Memory: snapshots, predictions, leaks.")

File = Annotated[Path, typer.Argument(help="Of torch.cuda.memory._dump_snapshot; also .gz, .zip.")]
GROUPS = "line, file, stack, category, annotation, compile_context, metadata or rule."
Top = Annotated[int, typer.Option(min=1, help="Rows of a table.")]
Json = Annotated[bool, typer.Option("--json", help="Everything, as JSON.")]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How snapshots are read and shown."""

    by: Annotated[str, typer.Option(help=GROUPS)] = "line"
    at: Annotated[
        str, typer.Option(help="peak, end, oom, an entry, or an address such as 0x7f00.")
    ] = "peak"
    rule: Annotated[
        list[str] | None,
        typer.Option(help="NAME=REGEX for files and functions; several, the first that fits."),
    ] = None
    device: Annotated[int | None, typer.Option(help="Number of the GPU; default: all.")] = None
    top: Top = 15
    as_json: Json = False
    html: Annotated[Path | None, typer.Option(help="Also write a page for a browser, offline.")] = (
        None
    )
    last: Annotated[int | None, typer.Option(help="Keep this many of the newest entries.")] = None

    def grouping(self) -> Grouping:
        """What memory is grouped by.

        Raises:
            ValueError: a rule is not `NAME=REGEX`.
        """
        from tfswa_lab.memory.snapshot.viewer import Grouping

        rules = {}
        for text in self.rule or ():
            name, equals, rule = text.partition("=")
            if not (name and equals and rule):
                raise ValueError(f"--rule {text}: expected NAME=REGEX, such as loss=criterion")
            rules[name] = rule
        return Grouping("rule" if rules else self.by, rules)

    def show(self, parts: list[Any], snapshots: Mapping[str, Snapshot]) -> None:
        """Print results, and write the page of their snapshots if one is asked for."""
        from tfswa_lab.memory.snapshot.viewer import write_html

        if self.html is not None and self.html.is_dir():
            raise IsADirectoryError(f"--html {self.html} is a folder; name a file in it")
        _print(parts, self.as_json, self.top)
        if self.html is not None:
            page = write_html(self.html, snapshots, self.device, self.grouping())
            typer.echo(f"a page: {page}", err=True)  # stdout may be JSON


@dataclass(frozen=True, kw_only=True)
class ReportOptions(Reading):
    """What can be typed."""

    snapshot: File


@memory.command()
@takes(ReportOptions)
def report(options: ReportOptions) -> None:
    """Peak, reserved memory, fragmentation, who held it, and why it ran out."""
    with one_line_errors(lambda: LESS_MEMORY):
        from tfswa_lab.memory.snapshot import read

        by, rules = options.grouping()
        seen = read(options.snapshot, options.last)
        devices = seen.devices if options.device is None else [options.device]
        parts = [seen.summary(by, options.at, one, rules) for one in devices]
        options.show(parts, {options.snapshot.name: seen})


@dataclass(frozen=True, kw_only=True)
class DiffOptions(Reading):
    """What can be typed."""

    first: File
    second: File


@memory.command()
@takes(DiffOptions)
def diff(options: DiffOptions) -> None:
    """What grew and what shrank between two snapshots."""
    with one_line_errors(lambda: LESS_MEMORY):
        from tfswa_lab.memory.snapshot import difference, read

        by, rules = options.grouping()
        paths = options.first, options.second
        pair = [read(path, options.last) for path in paths]
        both = sorted(set(pair[0].devices) & set(pair[1].devices))
        several = options.device is None and max(len(one.devices) for one in pair) > 1
        devices = both if several else [options.device]
        parts = [difference(*pair, by, options.at, one, rules) for one in devices]
        options.show(parts, dict(zip(_names(*paths), pair, strict=True)))


@memory.command()
def ranks(
    folder: Annotated[Path, typer.Argument(help="With a snapshot of each process.")],
    top: Top = 16,
    as_json: Json = False,
) -> None:
    """Are the processes of a training in balance? If not, what does the highest hold more?"""
    with one_line_errors(lambda: LESS_MEMORY):
        from tfswa_lab.memory.snapshot.ranks import compare

        _print([compare(folder)], as_json, top)


Step = Annotated[str, typer.Argument(help="MODULE:FUNCTION or FILE.py:FUNCTION.")]


@memory.command()
def predict(
    make_step: Step,
    attention: Annotated[str, typer.Option(help="auto, flash, efficient, cudnn, math.")] = "auto",
    steps: Annotated[int, typer.Option(min=1, help="How many steps to run.")] = 2,
    gpu: Annotated[str | None, typer.Option(help="hopper or ampere; default: this one.")] = None,
) -> None:
    """The memory of a step on a GPU, without one. The function makes everything and returns it."""
    with one_line_errors(lambda: LESS_MEMORY):
        from tfswa_lab.memory.predict import predict as prediction

        typer.echo(prediction(named(make_step), attention, steps, gpu))


@memory.command()
def leaks(
    step: Step,
    steps: Annotated[int, typer.Option(help="How many to run under a trace.")] = 12,
    longest: Annotated[int, typer.Option(help="How many if something may be growing.")] = 40,
) -> None:
    """Run a step repeatedly: does it lose memory, where, and who holds it? Status 1 if it does."""
    with one_line_errors(lambda: LESS_MEMORY):
        from tfswa_lab.memory.leaks import diagnose

        found = diagnose(named(step), steps, longest=longest)
    typer.echo(found)
    raise typer.Exit(int(found.leaks or found.failed))


def named(target: str) -> Callable[..., Any]:
    """A function of a module or of a file.

    Args:
        target: such as `train:make_step` or `scripts/train.py:make_step`.

    Raises:
        ValueError: there is no such module, file or function.

    >>> named("math:sqrt")(4)
    2.0
    """
    place, _, name = target.rpartition(":")
    if not place or not name:
        raise ValueError(f"{target!r}: expected MODULE:FUNCTION, such as train:make_step")
    module = _from_file(Path(place)) if place.endswith(".py") else _from_name(place)
    function = getattr(module, name, None)
    if not callable(function):
        others = [each for each in vars(module) if callable(getattr(module, each))]
        known = ", ".join(each for each in others if not each.startswith("_"))
        raise ValueError(f"{place} has no function {name}; it has {known or 'none'}")
    return function


def _from_name(name: str) -> Any:
    import sys

    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name and not name.startswith(error.name):
            raise  # the module is there, and misses another one
        raise ValueError(f"no module {name} in {Path.cwd()} or installed") from None


def _from_file(path: Path) -> Any:
    import sys

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    sys.path.insert(0, str(path.resolve().parent))  # as `python FILE` does
    spec = spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _print(parts: list[Any], as_json: bool, top: int) -> None:
    if as_json:
        typer.echo(json.dumps([part.as_dict() for part in parts], indent=1))
    else:
        typer.echo("\n\n".join("\n".join(part.lines(top)) for part in parts) or "no memory in it")


def _names(first: Path, second: Path) -> tuple[str, str]:
    """Names that tell two files apart."""
    return (first.name, second.name) if first.name != second.name else (str(first), str(second))
