"""The page around the sections: readable on a phone, dark and light, printable; no script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

__all__ = ["page", "paragraph", "section", "table"]

_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#5b6570;--rule:#d5dae0;
--s0:#00695c;--s1:#b03a2e;--s2:#1f5fa8;--s3:#8a5a00;--s4:#6a3d9a;--s5:#4d6b1e}
@media(prefers-color-scheme:dark){:root{--paper:#14181c;--ink:#e6eaee;--soft:#a3adb8;--rule:#39424c;
--s0:#5fd0bd;--s1:#ff9c8f;--s2:#8cbcff;--s3:#f0c060;--s4:#cfa8ff;--s5:#b6d87a}}
@media print{:root{--paper:#fff;--ink:#000;--soft:#333;--rule:#999}section{break-inside:avoid}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:62rem;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;overflow-wrap:anywhere}h2{font-size:1.15rem;margin:2rem 0 .5rem}
p{margin:.4rem 0}.soft,figcaption{color:var(--soft)}
table{width:100%;border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .35rem;border-bottom:1px solid var(--rule);text-align:right}
td{overflow-wrap:break-word}
.wide{overflow-x:auto}td:first-child,th:first-child{text-align:left}
figure{margin:1rem 0}svg{width:100%;height:auto}svg text{fill:var(--soft);font-size:12px}
@media(max-width:40rem){svg text{font-size:18px}}
.grid{stroke:var(--rule);fill:none}.line{fill:none;stroke:currentColor;stroke-width:2}
.mark{fill:var(--ink)}.dot{fill:currentColor}.key{margin-left:.8rem}.key::before{content:"\\2501 "}
.s0{color:var(--s0)}.s1{color:var(--s1)}.s2{color:var(--s2)}.s3{color:var(--s3)}
.s4{color:var(--s4)}.s5{color:var(--s5)}
"""


def page(title: str, sections: Sequence[str], *, refresh_s: int | None = None) -> str:
    """The whole document; with `refresh_s` the browser loads it again after so many seconds."""
    again = "" if refresh_s is None else f'<meta http-equiv="refresh" content="{refresh_s}">\n'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"{again}"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def section(title: str, text: str, *content: str) -> str:
    """A headed part; `text` is plain, the content is HTML."""
    return f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{''.join(content)}</section>"


def paragraph(text: str) -> str:
    """Plain text between two parts of a section's content."""
    return f"<p>{escape(text)}</p>"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain texts."""
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in cells)}</tr>" for cells in rows
    )
    drawn = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wide">{drawn}</div>'  # which a phone scrolls, and not the page
