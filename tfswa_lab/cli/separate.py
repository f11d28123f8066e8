"""`tfswa-lab separate`: songs, folders and patterns of names to stems, with one loading of a model.

Most options are fields of `Segmentation`, `Reading` or `Writing`.

Notebook: 03_tfswa_unet
"""

from __future__ import annotations

import glob
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from tfswa_lab.cli.errors import ended_by_signals, explain, one_line_errors, printable, say
from tfswa_lab.cli.options import given, list_of, panel, takes
from tfswa_lab.decode import is_sound_file
from tfswa_lab.durable import refuse_existing

if TYPE_CHECKING:
    from tfswa_lab.inference.files import SeparatedFile, Writing

FILES, STEMS, MODEL, MESSAGES = map(panel, ("Files", "Stems", "Model", "Messages"))
LESS_MEMORY = "lower --segment-seconds, or close other programs that use memory"
OF_BAND = "the model band has only heard synthetic songs; for real music, train one on real music"
MIXTURE = "mixture"  # of MUSDB18-shaped trees, where the folder has the song's name
FIELDS = ("track", "trackext", "parent", "stem", "ext")


def _show_models(wanted: bool) -> None:
    if not wanted:
        return
    from tfswa_lab.models.storage import DESCRIPTION, list_models

    for name, folder in list_models().items():
        about = json.loads((folder / DESCRIPTION).read_text("utf-8"))
        typer.echo(f"{name}: {', '.join(about['stems'])} at {about['sample_rate']} Hz; {folder}")
    raise typer.Exit


@dataclass(frozen=True)
class SeparateOptions:
    """What can be typed; None stands for "not given"."""

    songs: Annotated[
        list[str],
        typer.Argument(help="Sound or video files, folders, patterns in quotes.", metavar="SONG"),
    ]
    out: Annotated[
        str,
        FILES("--out", "-o", help="Folder; or a template as out/{track}/{stem}.{ext}."),
    ] = "separated"
    format: Annotated[str | None, FILES(help="wav, flac, mp3 or ogg; default wav.")] = None
    bits: Annotated[str | None, FILES(help="16, 24, or 32f for floats; default 16.")] = None
    clip: Annotated[
        str | None, FILES(help="rescale, clamp or none; default rescale, none with 32f.")
    ] = None
    overwrite: Annotated[bool, FILES("--overwrite", help="Replace existing stems.")] = False
    skip_existing: Annotated[
        bool, FILES("--skip-existing", help="Skip songs whose stems exist.")
    ] = False
    allow_truncated: Annotated[
        bool, FILES("--allow-truncated", help="Separate what there is of songs that are cut off.")
    ] = False
    start: Annotated[float | None, FILES(help="Start so many seconds into each song.")] = None
    duration: Annotated[float | None, FILES(help="Separate only so many seconds.")] = None
    stem: Annotated[tuple | None, STEMS(help="Only these: vocals,drums.", **list_of(str))] = None
    two_stems: Annotated[
        str | None, STEMS(help="This stem, and the rest of the song as no_STEM.")
    ] = None
    model: Annotated[
        str,
        MODEL("--model", "-m", help="A name, a folder, or an exported file; default band."),
    ] = "band"
    list_models: Annotated[
        bool,
        MODEL(
            "--list-models", help="List the models and exit.", callback=_show_models, is_eager=True
        ),
    ] = False
    segment_seconds: Annotated[float | None, MODEL(help="Length of segments; default 6.")] = None
    overlap: Annotated[float | None, MODEL(help="Share of a segment; default 0.25.")] = None
    shifts: Annotated[int | None, MODEL(help="Number of estimates to average; default 1.")] = None
    batch_size: Annotated[int | None, MODEL(help="Segments at once; default 1.")] = None
    device: Annotated[str, MODEL("--device", "-d", help="cpu, cuda, mps, or auto.")] = "auto"
    jsonl: Annotated[Path | None, MESSAGES(help="Append a line of JSON per song to a file.")] = None
    quiet: Annotated[bool, MESSAGES("--quiet", "-q", help="Print errors only.")] = False

    def writing(self) -> Writing:
        """How all songs are written, but for the pattern of names.

        Raises:
            ValueError: a choice does not exist, or two of them contradict each other.
        """
        from tfswa_lab.inference.files import Writing

        if self.two_stems and self.stem:
            raise ValueError("--two-stems and --stem both choose the stems: give one of them")
        if self.overwrite and self.skip_existing:
            raise ValueError("--overwrite and --skip-existing contradict each other: give one")
        stems = (self.two_stems,) if self.two_stems else self.stem
        ending = Path(self.out).suffix[1:].lower() if is_template(self.out) else ""
        form = self.format or (ending if ending.isalnum() else "wav")
        if ending.isalnum() and ending != form:
            raise ValueError(f"--out ends in .{ending}, but --format is {form}: give one of them")
        residual = self.two_stems is not None
        return Writing(form, self.bits, self.clip, stems, residual, overwrite=self.overwrite)


class Song(NamedTuple):
    """A file, and what its stems may be named after."""

    path: Path
    track: str
    parent: str

    @classmethod
    def at(cls, path: Path) -> Song:
        """The file's own name, or that of its folder where the file is called mixture.

        Raises:
            ValueError: the name, without its ending, names a folder and not a song.
        """
        name = path.name.removesuffix(path.suffix).removesuffix(".stem")
        folder = path.resolve().parent
        if name == MIXTURE:
            name, folder = folder.name, folder.parent
        if name in ("", ".", ".."):
            raise ValueError(f"{path}: no stems can be named after {name!r}; rename the song")
        return cls(path, name, folder.name)


@takes(SeparateOptions)
def separate(options: SeparateOptions) -> None:
    """Separate songs of any length, sample rate and kind of file into one file per stem.

    One song: OUT/STEM.wav. Several, or a folder: OUT/TRACK/STEM.wav.

    A file called mixture takes the name of its folder. Existing stems are kept.
    """
    # Imported here: `tfswa-lab --help` should not wait for torch.
    from tfswa_lab.device import pick_device
    from tfswa_lab.inference.files import Reading
    from tfswa_lab.inference.separate import Segmentation
    from tfswa_lab.models.storage import load_separator

    failed = 0
    with one_line_errors(lambda: LESS_MEMORY), ended_by_signals(), ExitStack() as stack:
        segmentation = Segmentation(**given(options, Segmentation))
        reading = Reading(**given(options, Reading))
        separator = load_separator(options.model).to(pick_device(options.device))
        root, jobs = plan(options, separator.stems)
        log = options.jsonl and stack.enter_context(
            options.jsonl.expanduser().open("a", encoding="utf-8")
        )
        for song, writing in jobs.items():
            how = (separator, song.path, root, segmentation, reading, writing)
            facts = _separate_one(how, options.quiet)
            failed += "error" in facts
            if log:
                line = {"song": str(song.path), "model": options.model} | facts
                print(json.dumps(line), file=log, flush=True)
    _finish(options, len(jobs), failed)


def _finish(options: SeparateOptions, count: int, failed: int) -> None:
    if options.model == "band" and failed < count and not options.quiet:
        say(f"Note: {OF_BAND}")
    if failed and count > 1:
        say(f"Error: {failed} of {count} songs failed")
    if failed:
        raise typer.Exit(1)


def _separate_one(how: tuple, quiet: bool) -> dict[str, Any]:
    """Separate a song, print what a user should know, and return it for the log."""
    from tqdm import tqdm

    from tfswa_lab.inference.files import separate_file

    began, song = time.perf_counter(), how[1]
    bar = partial(tqdm, desc=printable(song.name), disable=quiet or sys.stderr is None)
    try:
        done = separate_file(*how, bar)
    except Exception as error:
        message = explain(error, lambda: LESS_MEMORY)
        if message is None:
            raise
        message = message if str(song) in message else f"{message} ({song})"
        say(f"Error: {message}")
        return {"error": message}
    if not quiet:
        _print_result(done)
    return {
        "files": {stem: str(path) for stem, path in done.files.items()},
        "seconds": round(done.seconds, 3),
        "gain": done.gain,
        "notes": done.notes,
        "took_seconds": round(time.perf_counter() - began, 3),
    }


def _print_result(done: SeparatedFile) -> None:
    for note in done.notes:
        say(f"Note: {note}")
    if done.gain < 1:
        say(f"Note: a stem would clip: all stems are scaled by {done.gain:.3f}")
    for path in done.files.values():
        say(path, err=False)


# Which songs, and where their stems go -------------------------------------------------------


def find_songs(wanted: Iterable[Path], out: Path) -> list[Song]:
    """The songs that files, folders and patterns name, each once.

    A folder stands for the files called mixture below it, or where there are none, for all sound
    files below it, without those in the output folder.

    Raises:
        FileNotFoundError: a folder or a pattern holds none.
    """
    found = {}
    for path in wanted:
        for song in _in_folder(path, out.resolve()) if path.is_dir() else _matching(path):
            found.setdefault(song.resolve(), Song.at(song))
    return list(found.values())


def _in_folder(folder: Path, out: Path) -> list[Path]:
    below = ((path, path.relative_to(folder).parts) for path in folder.rglob("*"))
    hidden = (".", "__MACOSX")
    songs = sorted(
        path
        for path, parts in below
        if is_sound_file(path) and not any(part.startswith(hidden) for part in parts)
    )
    if folder.resolve() in out.parents:
        songs = [path for path in songs if out not in path.resolve().parents]
    if not songs:
        raise FileNotFoundError(f"{folder} holds no sound file")
    return [path for path in songs if path.stem == MIXTURE] or songs


def _matching(path: Path) -> list[Path]:
    """The file itself; or those that a pattern names which no shell has replaced."""
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    base = Path(path.anchor)  # a pattern must be relative to a folder
    found = base.glob(str(path.relative_to(base)))
    files = sorted(file for file in found if file.is_file() and not file.name.startswith("."))
    if not files:
        raise FileNotFoundError(f"{path}: no file has such a name")
    return files


def plan(options: SeparateOptions, stems: Sequence[str]) -> tuple[Path, dict[Song, Writing]]:
    """The output folder, and how each song is written there, of those that are left to do.

    Raises:
        FileExistsError: a stem is there, and is neither to be replaced nor to be left out.
        FileNotFoundError: a folder or a pattern holds no song.
        ValueError: two songs would have the same files, a stem would replace a song, or a choice
            makes no sense.
    """
    if "" in options.songs:
        raise ValueError("the name of a song is empty")  # as of a variable that a script forgot
    typed = [Path(text).expanduser() for text in options.songs]
    root, pattern = split_template(options.out)
    songs = find_songs(typed, root)
    several = len(songs) > 1 or any(path.is_dir() for path in typed)
    pattern = pattern or ("{track}/{stem}.{ext}" if several else "{stem}.{ext}")
    writing = options.writing()
    jobs = {song: replace(writing, pattern=filled(pattern, song)) for song in songs}
    paths = {song: [*how.paths(root, stems).values()] for song, how in jobs.items()}
    paths = _without_stems(paths, {path.resolve() for path in typed})
    _refuse_clashes(paths)
    if options.skip_existing:
        left = {x: own for x, own in paths.items() if not all(path.exists() for path in own)}
        if len(left) < len(paths) and not options.quiet:
            say(f"Note: the stems of {len(paths) - len(left)} songs exist and are skipped")
        paths = left
    elif not options.overwrite:
        refuse_existing(path for own in paths.values() for path in own)
    return root, {song: jobs[song] for song in paths}


def _without_stems(paths: dict[Song, list[Path]], typed: set[Path]) -> dict[Song, list[Path]]:
    """Leave out what is in a folder of songs only because it is a stem of another one of them."""
    made = {path.resolve(): song for song, own in paths.items() for path in own}
    return {
        song: own
        for song, own in paths.items()
        if song.path.resolve() in typed or made.get(song.path.resolve(), song) is song
    }


def _refuse_clashes(paths: Mapping[Song, list[Path]]) -> None:
    """Refuse a file that two songs would become, and one that is a song."""
    taken: dict[Path, Song] = {}
    sources = {song.path.resolve() for song in paths}
    for song, own in paths.items():
        for path in own:
            if path.resolve() in sources:
                raise ValueError(f"{path} is one of the songs; choose another --out")
            if taken.setdefault(path, song) is not song:
                raise ValueError(
                    f"{taken[path].path} and {song.path} would both become {path}; tell them "
                    'apart, as with --out "separated/{parent}/{track}.{trackext}/{stem}.{ext}"'
                )


def is_template(out: str) -> bool:
    """Whether an output names its files, with braces, rather than a folder."""
    return "{" in out and not Path(out).is_dir()


def split_template(out: str) -> tuple[Path, str]:
    """The folder above everything that differs, and the pattern of the files below it, if any.

    Raises:
        ValueError: a template has other fields, or does not tell stems apart.

    >>> root, pattern = split_template("out/{track}_{stem}")
    >>> root.as_posix(), pattern
    ('out', '{track}_{stem}.{ext}')
    """
    if not is_template(out):
        return Path(out).expanduser(), ""
    try:
        fields = {name for _, name, _, _ in Formatter().parse(out) if name is not None}
    except ValueError as error:
        raise ValueError(f"--out {out}: {error}; write a field as {{stem}}") from error
    if not {"stem"} <= fields <= set(FIELDS):
        known = ", ".join(f"{{{name}}}" for name in FIELDS)
        raise ValueError(f"--out {out}: a template has {{stem}} and other fields of {known}")
    parts = Path(out).expanduser().parts
    first = next(number for number, part in enumerate(parts) if "{" in part)
    pattern = "/".join(parts[first:])
    has_ending = "ext" in fields or Path(parts[-1]).suffix[1:].isalnum()
    return Path(*parts[:first]), pattern if has_ending else f"{pattern}.{{ext}}"


def filled(pattern: str, song: Song) -> str:
    """A pattern with the song's names, and with the stem's still to be filled in.

    >>> filled("{track}/{stem}.{ext}", Song(Path("a/live {2}.mp3"), "live {2}", "a"))
    'live {{2}}/{stem}.{ext}'
    """
    names = {"track": song.track, "parent": song.parent, "trackext": song.path.suffix[1:]}
    quoted = {x: name.replace("{", "{{").replace("}", "}}") for x, name in names.items()}
    return pattern.format(**quoted, stem="{stem}", ext="{ext}")
