"""A document of a few kinds of blocks: as Markdown, and as a page that needs no other file."""

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_STYLE = """
body { font: 15px/1.55 system-ui, sans-serif; color: #2b3138; max-width: 860px;
  margin: 2.5rem auto 4rem; padding: 0 1rem; }
h1 { font-size: 1.55rem; line-height: 1.25; }
h2 { font-size: 1.15rem; margin-top: 2.4rem; border-bottom: 1px solid #e6e9ec;
  padding-bottom: .3rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
img { max-width: 100%; display: block; margin: .8rem 0; }
div { overflow-x: auto; }
table { border-collapse: collapse; font-size: .87rem; margin: .6rem 0 1.2rem; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #e6e9ec; text-align: right;
  font-variant-numeric: tabular-nums; vertical-align: top; white-space: nowrap; }
th { font-weight: 600; }
td:first-child, th:first-child, .words td { text-align: left; }
.words td { white-space: normal; overflow-wrap: anywhere; }
.words td:first-child { white-space: nowrap; }
pre { background: #f5f7f8; padding: .8rem; font-size: .82rem; white-space: pre-wrap;
  overflow-wrap: anywhere; }
details { margin: .6rem 0; }
summary { cursor: pointer; color: #69727b; font-size: .9rem; }
"""


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Picture:
    """An SVG; `name` is that of its file, without the ending."""

    name: str
    alt: str
    svg: bytes


@dataclass(frozen=True)
class Table:
    """Cells are text; the first column stands left, the others right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    is_words: bool = False
    """All columns stand left."""


@dataclass(frozen=True)
class Details:
    """Blocks that a page shows when asked."""

    summary: str
    blocks: Sequence["Heading | Text | Code | Picture | Table"]


Block = Heading | Text | Code | Picture | Table | Details


def write_document(folder: Path, name: str, blocks: Sequence[Block]) -> None:
    """Writes `<name>.html`, `<name>.md` and the pictures of the latter in `plots/`, of which
    earlier ones are removed.
    """
    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    for earlier in plots.glob("*.svg"):
        earlier.unlink()
    for block in blocks:
        if isinstance(block, Picture):
            (plots / f"{block.name}.svg").write_bytes(block.svg)
    (folder / f"{name}.md").write_text(to_markdown(blocks))
    (folder / f"{name}.html").write_text(to_html(blocks))


def to_markdown(blocks: Sequence[Block]) -> str:
    """Pictures are links into `plots/`."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def to_html(blocks: Sequence[Block]) -> str:
    """One page with its style and its pictures inside; the first heading is its title."""
    title = next(block.text for block in blocks if isinstance(block, Heading))
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
    )
    return "\n".join([head, *map(_html, blocks), "</body></html>"]) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_escaped(text)}"
        case Text(text):
            return _escaped(text)
        case Code(text):
            return f"```\n{text}\n```"
        case Picture(name, alt, _):
            return f"![{_escaped(alt)}](plots/{name}.svg)"
        case Details(summary, blocks):
            return "\n\n".join([f"{_escaped(summary)}:", *map(_markdown, blocks)])
        case Table(header, rows, is_words):
            rule = "|---" * len(header) if is_words else "|---" + "|---:" * (len(header) - 1)
            return "\n".join([_line(header), f"{rule}|", *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escaped, cells)) + " |"


def _escaped(text: str) -> str:
    """Without what Markdown would read as its own; on one line."""
    return re.sub(r"([\\`*<|])", r"\\\1", " ".join(text.splitlines()))


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Picture(_, alt, svg):
            data = base64.b64encode(svg).decode()
            return f'<img alt="{html.escape(alt)}" src="data:image/svg+xml;base64,{data}">'
        case Details(summary, blocks):
            inside = "\n".join(map(_html, blocks))
            return f"<details><summary>{html.escape(summary)}</summary>\n{inside}</details>"
        case Table(header, rows, is_words):
            kind = ' class="words"' if is_words else ""
            head = [_cells("th", header)] if any(header) else []
            lines = [*head, *(_cells("td", row) for row in rows)]
            return f"<div><table{kind}>\n" + "\n".join(lines) + "\n</table></div>"


def _cells(tag: str, texts: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts) + "</tr>"
