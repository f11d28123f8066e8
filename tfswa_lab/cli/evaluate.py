"""`tfswa-lab evaluate`: tables of the scores of a model, on the screen and as Markdown.

Most options are fields of `Evaluation` or `Segmentation`; one that is not given keeps its default.

Notebook: 03_tfswa_unet
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tfswa_lab.cli.errors import one_line_errors, printable
from tfswa_lab.cli.options import given, list_of, panel, takes

if TYPE_CHECKING:
    import torch
    from rich.table import Table as RichTable

    from tfswa_lab.evaluation.estimates import Estimator
    from tfswa_lab.evaluation.report import Report, Table
    from tfswa_lab.evaluation.scoring import Evaluation

SONGS, SCORES, MODEL, MACHINE = map(panel, ("Songs and estimates", "Scores", "Model", "Machine"))
LESS_MEMORY = (
    "lower --segment-seconds, --batch-size or --jobs, or close other programs that use memory"
)


@dataclass(frozen=True)
class EvaluateOptions:
    """What can be typed; None stands for "not given"."""

    model: Annotated[
        str | None, SONGS(help="A name, or the folder of a model or a run; default band.")
    ] = None
    estimates: Annotated[
        Path | None, SONGS(help="Or a folder with SONG/STEM.wav or SPLIT/SONG/STEM.flac.")
    ] = None
    stems: Annotated[tuple | None, SONGS(help="Stems in --estimates.", **list_of(str))] = None
    data_root: Annotated[Path | None, SONGS(help="MUSDB18-shaped; default: the band.")] = None
    split: Annotated[str, SONGS(help="train, valid or test.")] = "test"
    allow_mismatch: Annotated[
        bool,
        SONGS(
            "--allow-mismatch",
            help="Also score songs whose mixture is far from the sum of its stems.",
        ),
    ] = False
    output_dir: Annotated[
        Path | None, SCORES(help="Default: evaluations/PARENT/NAME, for a source at PARENT/NAME.")
    ] = None
    overwrite: Annotated[bool, SCORES("--overwrite", help="Score again what is there.")] = False
    window: Annotated[float | None, SCORES(help="Seconds per frame; default 1.")] = None
    hop: Annotated[float | None, SCORES(help="Seconds between frame starts; default 1.")] = None
    seconds: Annotated[float | None, SCORES(help="Score only these first seconds of songs.")] = None
    bounds: Annotated[bool, SCORES(help="Score floor and ceilings as well.")] = True
    bounds_dir: Annotated[Path | None, SCORES(help="Folder of bounds; models can share it.")] = None
    segment_seconds: Annotated[float | None, MODEL(help="Length of segments; default 6.")] = None
    overlap: Annotated[float | None, MODEL(help="Share of a segment; default 0.25.")] = None
    shifts: Annotated[int | None, MODEL(help="Number of estimates to average; default 1.")] = None
    batch_size: Annotated[int | None, MODEL(help="Segments at once; default 1.")] = None
    jobs: Annotated[int | None, MACHINE(help="Songs scored in parallel; 3 GiB each.")] = None
    device: Annotated[str, MACHINE(help="cpu, cuda, mps, or auto.")] = "auto"

    @property
    def source(self) -> Path:
        """The folder of the model or of the estimates.

        Raises:
            FileNotFoundError: there is no such model.
        """
        from tfswa_lab.models.storage import find_model

        if self.estimates:
            return self.estimates.expanduser().resolve()
        return find_model(self.model or "band").resolve()

    def estimator(self, device: torch.device) -> Estimator:
        """Who makes or finds the estimates; a model on this device.

        Raises:
            OSError: the model or the estimates are not there.
            ValueError: options of files and of a model are mixed, or a number is out of range.
        """
        from tfswa_lab.audio import STEMS
        from tfswa_lab.evaluation.estimates import FolderEstimates, ModelEstimates
        from tfswa_lab.inference.separate import Segmentation
        from tfswa_lab.models.storage import load_separator

        of_model = given(self, Segmentation)
        if self.estimates and self.model:
            raise ValueError("give --model or --estimates, not both: a report is about one of them")
        if self.estimates and of_model:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in of_model)
            raise ValueError(f"{names}: says how a model is used; --estimates are scored as is")
        if self.stems and not self.estimates:
            raise ValueError("--stems says which of the --estimates to score; a model has its own")
        if self.estimates:
            return FolderEstimates(self.source, self.stems or STEMS)
        segmentation = Segmentation(**of_model)
        return ModelEstimates(load_separator(self.source).to(device), segmentation)

    def evaluation(self, device: torch.device) -> Evaluation:
        """How they are evaluated.

        Raises:
            ValueError: a value is out of range.
        """
        from tfswa_lab.evaluation.oracles import BOUNDS
        from tfswa_lab.evaluation.scoring import Evaluation

        bounds = tuple(BOUNDS) if self.bounds else ()
        scored_on = "cpu" if device.type == "mps" else device  # which has no float64
        how = Evaluation(**given(self, Evaluation) | {"device": scored_on, "bounds": bounds})
        return how if how.jobs else replace(how, jobs=default_jobs(device))


@takes(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> None:
    """Score a model, or estimates in files; with no option at all, what ships with the package.

    After a kill, run it again without --overwrite: it continues where it stopped.

    museval's EvalStore reads the scores.
    """
    # Imported here: `tfswa-lab --help` should not wait for torch.
    from tqdm import tqdm

    from tfswa_lab import evaluation
    from tfswa_lab.data.band import ensure_band
    from tfswa_lab.device import pick_device
    from tfswa_lab.durable import write_whole
    from tfswa_lab.teaching.score_plot import write_picture

    with one_line_errors(lambda: LESS_MEMORY):
        output = options.output_dir or default_output(options.source)
        tables, picture = (output / f"{options.split}{ending}" for ending in (".md", ".png"))
        device = pick_device(options.device)
        estimator, how = options.estimator(device), options.evaluation(device)
        data_root = options.data_root or ensure_band()
        report = evaluation.evaluate(estimator, data_root, output, how, tqdm)
        of = "estimates of" if options.estimates else "model"
        origin = {of: str(options.source), "songs of": f"{data_root}, {options.split}"}
        report = replace(report, origin=origin)
        write_whole({tables: [printable(report.to_markdown()).encode()]})
        show(report)
        write_picture(report, picture)
    typer.echo(f"the tables: {tables}\na picture:  {picture}")


def default_output(source: Path) -> Path:
    """Named after a model or estimates and their parent folder: many runs have a model `best`.

    >>> default_output(Path("/somewhere/runs/tiny/best")).as_posix()
    'evaluations/tiny/best'
    """
    return Path("evaluations", source.parent.name, source.name)


def default_jobs(device: torch.device) -> int:
    """As many as there are cores and memory for; one for a GPU."""
    from joblib import cpu_count

    from tfswa_lab.memory.gauges import host_available
    from tfswa_lab.memory.sizes import GIB

    if device.type != "cpu":
        return 1
    return max(1, min(cpu_count(), host_available() // (3 * GIB)))  # for a song of 3 minutes


def show(report: Report) -> None:
    """Print facts, tables and notes."""
    from rich.console import Console

    console = Console(markup=False, emoji=False)  # names of songs are plain text
    for name, fact in report.facts().items():
        console.print(printable(f"{name}: {fact}"))
    for table in report.tables():
        console.print(_drawn(table))
    for note in report.notes():
        console.print(printable(note))


def _drawn(table: Table) -> RichTable:
    from rich.table import Table as RichTable

    drawn = RichTable(title=table.title, title_justify="left")
    for number, column in enumerate(table.columns):
        drawn.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*map(printable, row))
    return drawn
