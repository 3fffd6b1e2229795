"""The report as one HTML page that stands alone: no script, no link, pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path


@dataclass(frozen=True)
class Table:
    """Headings and rows of plain text; the first ``words`` columns hold words, the others numbers."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


@dataclass(frozen=True)
class Section:
    """A heading, what to know before looking, then a picture, a table, or both."""

    title: str
    text: str
    picture: Path | None = None
    table: Table | None = None


def page(title: str, lead: str, sections: Sequence[Section], settings: Sequence[tuple[str, str]]) -> str:
    """The HTML.

    Args:
        lead: the sentence under the title.
        settings: (run's label, its settings as TOML), folded away at the end.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>",
        f'<h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p>',
    ]
    for section in sections:
        parts.append(f"<section><h2>{escape(section.title)}</h2><p>{escape(section.text)}</p>")
        if section.picture is not None:
            parts.append(f"<figure>{image(section.picture, section.title)}</figure>")
        if section.table is not None:
            parts.append(table(section.table))
        parts.append("</section>")
    if settings:
        parts.append("<section><h2>Settings</h2>")
        for label, text in settings:
            parts.append(f"<details><summary>{escape(label)}</summary><pre>{escape(text)}</pre></details>")
        parts.append("</section>")
    parts.append("</main></body></html>\n")
    return "\n".join(parts)


def image(path: Path, alternative: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{escape(alternative)}" src="data:image/png;base64,{data}">'


def table(content: Table) -> str:
    """A rule separates the groups that the first column makes; a repeated first cell is shown once."""
    parts = ['<div class="wide"><table><thead><tr>']
    for i, heading in enumerate(content.headings):
        parts.append(f"<th{'' if i < content.words else ' class=n'}>{escape(heading)}</th>")
    parts.append("</tr></thead><tbody>")
    group = None
    for row in content.rows:
        begins = row[0] != group
        parts.append("<tr class=first>" if begins else "<tr>")
        for i, cell in enumerate(row):
            shown = "" if i == 0 and not begins else cell
            parts.append(f"<td{'' if i < content.words else ' class=n'}>{escape(shown)}</td>")
        parts.append("</tr>")
        group = row[0]
    parts.append("</tbody></table></div>")
    return "".join(parts)


STYLE = """
body { margin: 0; background: #fff; color: #222; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .25rem; }
p { max-width: 46rem; margin: .25rem 0 .75rem; }
.lead { color: #555; }
figure { margin: .5rem 0 1rem; }
img { max-width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; border-bottom: 1.5px solid #888; }
th, td { padding: .2rem .9rem .2rem 0; vertical-align: top; white-space: nowrap; }
tr.first td { border-top: 1px solid #ddd; }
.n { text-align: right; }
details { margin: .35rem 0; }
summary { cursor: pointer; }
pre { background: #f6f6f6; padding: .75rem; overflow-x: auto; font-size: .8rem; }
"""
