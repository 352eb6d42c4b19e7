"""The HTML page of a report: no scripts, no external resources, light and dark color schemes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from numbers import Integral, Real
from typing import TYPE_CHECKING

from genai_jax.scaling.report_types import Cell, Record, Section, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfb; --ink: #1c1e21; --soft: #667079;
  --line: #dcdfe2; --shade: #f2f3f1; --accent: #1f5fa8; --warn: #9a4a00; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --ink: #e4e6e8; --soft: #98a1aa;
  --line: #33383d; --shade: #1e2125; --accent: #7db4f0; --warn: #f0b070; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 84rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans",
  sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .75rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 2.75rem 0 .75rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
p { margin: .6rem 0; max-width: 44rem; }
a { color: var(--accent); }
.question { font-size: 1.1rem; color: var(--soft); }
.warning { border-left: 3px solid var(--warn); padding: .1rem 0 .1rem .8rem; color: var(--warn); }
nav { font-size: .95rem; margin: 1.25rem 0; }
nav a { display: inline-block; margin-right: 1.1rem; text-decoration: none; }
.wide { overflow-x: auto; margin: 1rem 0; background: linear-gradient(90deg, var(--paper) 1.5rem,
  transparent) left, linear-gradient(270deg, var(--paper) 1.5rem, transparent) right,
  linear-gradient(90deg, var(--line), transparent) left,
  linear-gradient(270deg, var(--line), transparent) right; background-repeat: no-repeat;
  background-size: 3rem 100%, 3rem 100%, .75rem 100%, .75rem 100%;
  background-attachment: local, local, scroll, scroll; }
table { border-collapse: collapse; width: max-content; font-size: .88rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: .85rem; padding-bottom: .3rem; }
th { text-align: left; vertical-align: bottom; font-weight: 600;
  border-bottom: 2px solid var(--line); }
th, td { padding: .3rem .9rem .3rem 0; }
thead th { max-width: 14rem; }
td { border-bottom: 1px solid var(--line); vertical-align: top; max-width: 30rem;
  overflow-wrap: anywhere; }
tbody th { border-bottom: 1px solid var(--line); font-weight: 400; color: var(--soft);
  vertical-align: top; }
td.number, th.number { text-align: right; }
td.number { white-space: nowrap; }
figure { margin: 1.5rem 0; }
figure svg { display: block; width: var(--width); height: auto;
  max-width: max(100%, .8 * var(--width)); }
figcaption { color: var(--soft); font-size: .85rem; }
pre { background: var(--shade); padding: .8rem 1rem; overflow-x: auto; border-radius: 4px;
  font: .82rem/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
details { margin: .3rem 0; }
summary { cursor: pointer; }
@media (max-width: 36rem) { body { padding: 1.25rem .9rem 3rem; } h1 { font-size: 1.5rem; }
  td { max-width: 13rem; } }
@media print { :root { --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --shade: #f4f4f4;
  --accent: #000; --warn: #000; } body { max-width: none; padding: 0; font-size: 10pt; }
  h2 { break-after: avoid; } figure, tr { break-inside: avoid; }
  figure svg { max-width: min(100%, .7 * var(--width)); } nav { display: none; }
  .wide { overflow: visible; } table { width: auto; font-size: 7.5pt; }
  th, td { padding-right: .5rem; }
  pre { white-space: pre-wrap; } }
"""


def page(title: str, sections: Sequence[Section], record: Record) -> str:
    """The whole page."""
    last = {
        "Environment": _environment(record.get("environment", {})),
        "Reproducing this report": _commands(record.get("commands", ())),
        "Flags of the runs": _flags(record.get("flags", {})),
    }
    parts = {s.title: _section(s) for s in sections} | {name: t for name, t in last.items() if t}
    anchors = {name: f"part{i}" for i, name in enumerate(parts, 1)}
    links = "".join(f'<a href="#{anchors[name]}">{escape(name)}</a> ' for name in parts)
    question = record.get("question")
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="question">{escape(question)}</p>' if question else "",
        *(f'<p class="warning">{escape(text)}</p>' for text in record.get("warnings", ())),
        f"<nav>{links}</nav>",
        *(
            f'<section id="{anchors[name]}">\n<h2>{escape(name)}</h2>\n{text}</section>'
            for name, text in parts.items()
        ),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def _wide(name: str) -> str:
    """Begins what scrolls on its own if it is wider than the page, by keys as well."""
    return f'<div class="wide" tabindex="0" role="region" aria-label="{escape(name)}">'


def _section(section: Section) -> str:
    return "".join(
        [
            *(f"<p>{escape(text)}</p>\n" for text in section.paragraphs),
            *(_figure(name, figure) for name, figure in section.figures.items()),
            *(_table(table) for table in section.tables),
        ]
    )


def _figure(name: str, figure: Figure) -> str:
    caption = f"<figcaption>{escape(name)}.png</figcaption>"
    return f"<figure>\n{_wide(name)}{_svg(name, figure)}</div>\n{caption}\n</figure>\n"


def _svg(name: str, figure: Figure) -> str:
    """The figure as inline SVG, with black and white replaced by the colors of the page."""
    import matplotlib  # here, so that commands start without it

    stream = io.StringIO()
    # Identifiers are derived from the salt: clip paths of two figures must not share one.
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # unused, and the same in every figure
    text = text.replace("#000000", "currentColor").replace("#ffffff", "var(--paper)")
    width = round(96 * figure.get_figwidth())  # pixels: text has the size that its font asks for
    start = f'<svg role="img" aria-label="{escape(name)}" style="--width: {width}px" '
    start += 'fill="currentColor" '
    style = 'stroke-linejoin="round" stroke-linecap="butt" '
    return re.sub(r'(width|height)="[\d.]+pt" ', "", start + style + text.split("<svg ", 1)[1])


def _table(table: Table) -> str:
    caption = f"<caption>{escape(table.name)}.csv</caption>\n"
    return f"{_wide(table.name)}{table_html(table, caption)}</div>\n"


def table_html(table: Table, caption: str = "") -> str:
    """The table as an HTML element; `caption` is one as well."""
    numeric = [
        all(isinstance(row[i], Real | None) for row in table.rows)
        for i in range(len(table.columns))
    ]
    classes = [' class="number"' if n else "" for n in numeric]
    head = "".join(
        f"<th{c}>{escape(name)}</th>" for c, name in zip(classes, table.columns, strict=True)
    )
    rows = "".join(_row(row, classes) for row in table.rows)
    return f"<table>\n{caption}<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table>"


def _row(row: Iterable[Cell], classes: Sequence[str]) -> str:
    cells = zip(row, classes, strict=True)
    return "<tr>" + "".join(f"<td{c}>{escape(shown(cell))}</td>" for cell, c in cells) + "</tr>\n"


def shown(cell: Cell) -> str:
    """A cell as displayed: five significant digits, whole numbers in full."""
    if cell is None:
        return ""
    if isinstance(cell, str | bool):
        return str(cell)
    if not math.isfinite(cell):
        return str(cell)
    if isinstance(cell, Integral) or (cell == int(cell) and abs(cell) < 1e6):
        return f"{int(cell):,}" if abs(cell) < 1e12 else f"{cell:.4g}"
    return f"{cell:.5g}" if not 1e4 <= abs(cell) < 1e6 else f"{cell:,.0f}"


def _environment(environment: Mapping) -> str:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>\n"
        for name, value in _flat(environment)
    )
    table = f"{_wide('environment')}<table><tbody>\n{rows}</tbody></table></div>\n"
    return table if rows else ""


def _flat(values: Mapping, prefix: str = "") -> Iterable[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name} ")
        else:
            yield prefix + str(name), value


def _commands(commands: Sequence[str]) -> str:
    return f"<pre>{escape(chr(10).join(commands))}</pre>\n" if commands else ""


def _flags(flags: Mapping[str, str]) -> str:
    return "".join(
        f"<details><summary>{escape(name)}</summary><pre>{escape(text.strip())}</pre></details>\n"
        for name, text in flags.items()
    )
