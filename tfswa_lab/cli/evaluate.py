"""What `tfswa-lab evaluate` does: options in, tables out, on the screen and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from joblib import cpu_count
from rich.console import Console
from rich.table import Table as RichTable
from tqdm import tqdm

from tfswa_lab.audio import STEMS
from tfswa_lab.data.band import ensure_band
from tfswa_lab.device import pick_device
from tfswa_lab.durable import write_whole
from tfswa_lab.evaluation.estimates import FolderEstimates, ModelEstimates
from tfswa_lab.evaluation.evaluate import evaluate
from tfswa_lab.evaluation.report import Report, Table
from tfswa_lab.evaluation.scoring import Estimator
from tfswa_lab.inference.separate import Segmentation
from tfswa_lab.memory.gauges import host_available
from tfswa_lab.memory.sizes import GIB
from tfswa_lab.models.storage import load_separator
from tfswa_lab.weights import BAND

OF_MODEL = ("segment_seconds", "overlap", "shifts", "batch_size")  # of `ModelEstimates`
BYTES_PER_JOB = 3 * GIB  # for a song of 3 minutes


@dataclass(frozen=True)
class Source:
    """Whose estimates are to be scored: files, a model's, or those of the one that we ship.

    Args:
        model: its folder.
        estimates: a folder of files.
        stems: of the files; all four if None.
        of_model: arguments of `ModelEstimates`, as far as they were given.

    Raises:
        ValueError: options of files and of a model are mixed.
    """

    model: Path | None = None
    estimates: Path | None = None
    stems: Sequence[str] | None = None
    of_model: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.estimates and self.model:
            raise ValueError("--model and --estimates: a report is of one of them, leave one out")
        if self.estimates and self.of_model:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in self.of_model)
            raise ValueError(f"{names}: says how a model is used; --estimates are scored as is")
        if self.stems and not self.estimates:
            raise ValueError("--stems says which of the --estimates to score; a model has its own")

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return (self.estimates or self.model or BAND).expanduser().resolve()

    def estimator(self, device: torch.device) -> Estimator:
        """What `evaluate` takes, a model on this device.

        Raises:
            OSError: it is not there.
            ValueError: it is broken, or a number is out of range.
        """
        if self.estimates:
            return FolderEstimates(self.folder, self.stems or STEMS)
        return ModelEstimates(load_separator(self.folder).to(device), Segmentation(**self.of_model))


def run_evaluation(
    source: Source,
    data_root: Path | None = None,
    output_dir: Path | None = None,
    split: str = "test",
    jobs: int | None = None,
    device: str = "auto",
    **settings,
) -> tuple[Report, Path]:
    """Evaluate, print the tables, and write them to `OUTPUT_DIR/SPLIT.md`.

    Args:
        source: of the estimates.
        data_root: the embedded band if None.
        output_dir: `default_output` if None.
        split: train, valid or test.
        jobs: `default_jobs` if None.
        device: cpu, cuda or auto.
        settings: other arguments of `evaluate`.

    Returns:
        The report, and the file that it was written to.

    Raises:
        OSError: something is missing, or cannot be written.
        ValueError: something is broken, or does not fit.
    """
    place = pick_device(device)
    jobs = default_jobs(place) if jobs is None else jobs
    data_root = data_root or ensure_band()
    output_dir = output_dir or default_output(source.folder)
    settings |= {"split": split, "jobs": jobs, "device": place, "progress": tqdm}
    report = evaluate(source.estimator(place), data_root, output_dir, **settings)
    whose = "estimates of" if source.estimates else "model"
    origin = {whose: str(source.folder), "songs of": f"{data_root}, {split}"}
    report = replace(report, origin=origin)
    text = output_dir / f"{split}.md"
    write_whole({text: [report.to_markdown().encode()]})
    show(report)
    return report, text


def default_output(folder: Path) -> Path:
    """Named after a model or estimates, and what they lie in: many runs have a model `best`.

    >>> default_output(Path("/somewhere/runs/tiny/best")).as_posix()
    'evaluations/tiny/best'
    """
    return Path("evaluations", folder.parent.name, folder.name)


def default_jobs(device: torch.device) -> int:
    """As many as there are cores and memory for; one for a card."""
    if device.type == "cuda":
        return 1
    return max(1, min(cpu_count(), host_available() // BYTES_PER_JOB))


def show(report: Report) -> None:
    """Print what was scored, tables and notes."""
    console = Console()
    for name, fact in report.facts().items():
        console.print(f"{name}: {fact}", markup=False)
    for table in report.tables():
        console.print(_drawn(table))
    for note in report.notes():
        console.print(note, markup=False)


def _drawn(table: Table) -> RichTable:
    drawn = RichTable(title=table.title, title_justify="left")
    for number, column in enumerate(table.columns):
        drawn.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in table.rows:
        drawn.add_row(*row)
    return drawn
