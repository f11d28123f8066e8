"""Results as HTML, for a notebook: bars of bytes and lists of sentences.

Notebook: 05_where_memory_goes
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape

from tfswa_lab.memory.sizes import format_bytes

BAR = "background:#f39063;height:0.8em;display:inline-block;vertical-align:middle"
WIDTH = 20  # of the longest bar, in letters


def page(
    head: str, bars: Mapping[str, Mapping[str, int]], lists: Mapping[str, Iterable[str]]
) -> str:
    """A heading, tables of bytes with bars, and lists that can be opened.

    Args:
        head: a sentence.
        bars: by title, bytes by name.
        lists: by title, sentences.

    >>> "4.00 MiB" in page("a step", {"by category": {"input": 4 * 2**20}}, {})
    True
    """
    parts = [f"<b>{escape(head)}</b>"]
    parts += [table(title, sizes) for title, sizes in bars.items() if sizes]
    for title, sentences in lists.items():
        points = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
        parts.append(f"<details><summary>{escape(title)}</summary><ul>{points}</ul></details>")
    return "\n".join(parts)


def table(title: str, sizes: Mapping[str, int]) -> str:
    """Bytes by name, the longest bar for the most."""
    most = max(max(sizes.values()), 1)
    rows = "".join(
        f"<tr><td style='text-align:left'>{escape(name)}</td><td>{format_bytes(size)}</td>"
        f"<td style='text-align:left'><span style='{BAR};width:{WIDTH * size / most:.1f}em'>"
        "</span></td></tr>"
        for name, size in sizes.items()
    )
    return (
        f"<table><caption style='text-align:left'>{escape(title)}</caption><tbody>{rows}</tbody>"
        "</table>"
    )
