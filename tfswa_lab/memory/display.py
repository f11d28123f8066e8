"""How results look in a notebook: a text, or HTML with bars of bytes and lists of sentences.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tfswa_lab.memory.sizes import format_bytes


class Shown:
    """A result with a text, `str`, and a `repr` of one line; IPython shows the text or HTML.

    Attributes:
        brief: what the `repr` says, in a few words.
    """

    brief: str

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.brief})"

    def __str__(self) -> str:
        return repr(self)

    def _repr_pretty_(self, printer: Any, _cycle: bool) -> None:
        printer.text(str(self))


BAR = "background:#f39063;height:0.8em;display:inline-block;vertical-align:middle"
WIDTH = 20  # of the longest bar, in letters
LEFT = "style='text-align:left'"
LINE = re.compile(r"(?P<file>[^\0]+?\.\w+):(?P<line>\d+)")


def page(
    head: str,
    bars: Mapping[str, Mapping[str, int]],
    lists: Mapping[str, Iterable[str]],
    opened: bool = False,
) -> str:
    """A heading, tables of bytes with bars, and lists that can be opened.

    Args:
        head: a sentence.
        bars: by title, bytes by name.
        lists: by title, sentences.
        opened: whether the lists are open.

    >>> "4.00 MiB" in page("a step", {"by category": {"input": 4 * 2**20}}, {})
    True
    """
    parts = [f"<b>{escape(head)}</b>"]
    parts += [table(title, sizes) for title, sizes in bars.items() if sizes]
    for title, sentences in lists.items():
        points = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
        details = f"<details{' open' * opened}><summary>{escape(title)}</summary>"
        parts.append(f"{details}<ul>{points}</ul></details>")
    return "\n".join(parts)


def table(title: str, sizes: Mapping[str, int]) -> str:
    """Bytes by name, the longest bar for the most."""
    return bars(title, (), [(size, name) for name, size in sizes.items()])


def bars(title: str, columns: Sequence[str], rows: Sequence[tuple]) -> str:
    """A table whose rows begin with bytes, shown as a bar; the longest for the most.

    Args:
        title: above it.
        columns: names of what follows the bytes; none for a table without a head.
        rows: bytes, and texts.
    """
    most = max([row[0] for row in rows] + [1])
    head = "".join(f"<th {LEFT}>{escape(name)}</th>" for name in ("bytes", "", *columns))
    body = "".join(
        f"<tr><td>{format_bytes(size)}</td>"
        f"<td {LEFT}><span style='{BAR};width:{WIDTH * size / most:.1f}em'></span></td>"
        + "".join(f"<td {LEFT}>{linked(text)}</td>" for text in texts)
        + "</tr>"
        for size, *texts in rows
    )
    return (
        f"<table><caption {LEFT}>{escape(title)}</caption>"
        f"{f'<thead><tr>{head}</tr></thead>' * bool(columns)}<tbody>{body}</tbody></table>"
    )


def linked(text: str) -> str:
    """A text as HTML; a line such as `train.py:9` becomes a link if the file is on this machine.

    >>> linked("a < b")
    'a &lt; b'
    """
    found = LINE.match(text)
    if not found or not Path(found["file"]).is_file():
        return escape(text)
    path = Path(found["file"])
    shown = f"{path.name}:{found['line']}{text[found.end() :]}"
    address = f"{path.resolve().as_uri()}#L{found['line']}"
    return f"<a href='{escape(address)}' title='{escape(text)}'>{escape(shown)}</a>"


def shown(size: int | None) -> str:
    """Bytes in words; a dash where unknown.

    >>> shown(2048), shown(None)
    ('2.00 KiB', '—')
    """
    return "—" if size is None else format_bytes(size)


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines with the first column to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells]).rstrip()


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """A table in HTML whose first row is the head."""
    head, *body = (
        "".join(f"<{tag}>{escape(text)}</{tag}>" for text in row)
        for tag, row in zip(("th", *["td"] * (len(rows) - 1)), rows, strict=True)
    )
    lines = "".join(f"<tr>{row}</tr>" for row in body)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
