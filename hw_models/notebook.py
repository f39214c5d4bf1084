"""Tables for notebooks: what `_repr_html_` returns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape


def html_table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Write a table as HTML; whatever the cells hold is shown as text.

    Args:
        caption: What stands above the table.
        headings: One per column.
        rows: A cell per column each; numbers and their units as they are to be read.

    Returns:
        A `<table>` element.
    """
    head = _row("th", headings)
    body = "".join(_row("td", row) for row in rows)
    return f"<table><caption>{escape(caption)}</caption><thead>{head}</thead><tbody>{body}</tbody></table>"


def _row(tag: str, cells: Iterable[object]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"
