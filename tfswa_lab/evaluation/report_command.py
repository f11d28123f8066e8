"""What `tfswa-lab evaluate` does: options in, tables out.

Notebook: 08_evaluation
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import psutil
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
from tfswa_lab.evaluation.report import evaluate
from tfswa_lab.evaluation.scoring import Estimator
from tfswa_lab.evaluation.summary import Report, Table
from tfswa_lab.models.storage import load_separator
from tfswa_lab.weights import BAND

BYTES_PER_JOB = 3 * 2**30  # for a song of 3 minutes


def run_evaluation(
    model: Path | None,
    estimates: Path | None,
    stems: Sequence[str] | None,
    data_root: Path | None,
    output_dir: Path | None,
    jobs: int | None,
    device: str,
    split: str,
    of_model: dict,
    settings: dict,
) -> None:
    """Evaluate, print the tables, and write them to `OUTPUT_DIR/SPLIT.md`.

    Args:
        model: its folder; the separator that ships with the package if there are no estimates.
        estimates: their folder, None for a model.
        stems: of the estimates; all four if None.
        data_root: the embedded band if None.
        output_dir: `evaluations/NAME` if None, after the model or the estimates.
        jobs: `default_jobs` if None.
        device: cpu, cuda or auto.
        split: train, valid or test.
        of_model: other arguments of `ModelEstimates`.
        settings: other arguments of `evaluate`.

    Raises:
        OSError: something is missing, or cannot be written.
        ValueError: something is broken, or does not fit.

    Notebook: 08_evaluation
    """
    place = pick_device(device)
    estimator = estimator_of(model, estimates, stems, place, of_model)
    output_dir = output_dir or Path("evaluations", (estimates or model or BAND).resolve().name)
    report = evaluate(
        estimator,
        data_root or ensure_band(),
        output_dir,
        split,
        jobs=jobs or default_jobs(place),
        device=place,
        progress=tqdm,
        **settings,
    )
    write_whole({output_dir / f"{split}.md": [report.to_markdown().encode()]})
    show(report)


def estimator_of(
    model: Path | None,
    estimates: Path | None,
    stems: Sequence[str] | None,
    device: torch.device,
    of_model: dict,
) -> Estimator:
    """Files or a model, whichever was asked for.

    Raises:
        OSError: they are not there.
        ValueError: both were asked for, or other stems of a model than it has.

    Notebook: 08_evaluation
    """
    if estimates and model:
        raise ValueError("--model and --estimates: a report is of one of them, leave one out")
    if estimates:
        return FolderEstimates(estimates, stems or STEMS)
    if stems:
        raise ValueError("--stems says which of the --estimates to score; a model has its own")
    return ModelEstimates(load_separator(model or BAND).to(device), **of_model)


def default_jobs(device: torch.device) -> int:
    """As many as there are cores and memory for; one for a card."""
    if device.type == "cuda":
        return 1
    return max(1, min(cpu_count(), psutil.virtual_memory().available // BYTES_PER_JOB))


def show(report: Report) -> None:
    """Print tables and notes.

    Notebook: 08_evaluation
    """
    console = Console()
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
