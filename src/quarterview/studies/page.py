"""Parts of HTML reports: tables, SVG plots and a style sheet that support dark mode and narrow screens.

A report is one file that loads nothing from a network.
"""

import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from quarterview.studies.verdict import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # the import takes a second

_TEXT_COLOR = "#010203"
"""Placeholder colour of text and axes in plots; `render_svg` replaces it by the text colour of the page."""
COLORS = ("#2f7de1", "#d9822b", "#2e9e5b", "#b04fc4", "#c9485b", "#1f9aa8", "#8a8f3c")
GRAY = "#8b8f96"


def format_accuracy(estimate: Estimate | None) -> str:
    """Return the HTML of a table cell with an accuracy and its interval, in percent."""
    if estimate is None:
        return "–"
    low, high = estimate.clipped_interval
    return f"{100 * estimate.mean:.1f}<br><small>{100 * low:.1f} to {100 * high:.1f}</small>"


def render_table(caption: str, column_names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the HTML of a table that scrolls horizontally on narrow screens.

    Args:
        caption, column_names: text, which is escaped.
        rows: HTML of the cells, which is not escaped; the first cell of each row is its header.
    """
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in column_names)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def render_definition_list(values: Mapping[str, Any]) -> str:
    """Return the HTML of names and values for a ``<dl>`` element; both are escaped."""
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in values.items())


def get_matplotlib_settings(hash_salt: str) -> dict[str, Any]:
    """Return the rcParams of matplotlib for a plot that is embedded in a page.

    Args:
        hash_salt: a text that differs between the plots of a page, so that the ids in their SVG differ.
    """
    text_parts = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": hash_salt,
        "font.size": 11,
        **dict.fromkeys(text_parts, _TEXT_COLOR),
    }


def render_svg(figure: "Figure") -> str:
    """Return a figure as an SVG element whose text and axes have the text colour of the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    svg = file.getvalue()
    return svg[svg.index("<svg") :].replace(_TEXT_COLOR, "currentColor")


CSS = """
:root{color-scheme:light dark;--back:#fff;--ink:#1c1f23;--soft:#5b626b;--line:#d9dde2;
--yes:#177245;--no:#b3261e;--maybe:#8a6100;--yes-back:#e4f4ea;--no-back:#fbe9e7;--maybe-back:#fdf3d7}
@media (prefers-color-scheme:dark){:root{--back:#14171a;--ink:#e6e8ea;--soft:#a0a7b0;--line:#343a41;
--yes:#6fd39b;--no:#ff9d94;--maybe:#f0c75e;--yes-back:#143323;--no-back:#3d1b18;--maybe-back:#352a0c}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:48rem;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;margin:.5rem 0 1rem}h2{font-size:1.2rem;margin:2rem 0 .5rem}
p,dd,li{overflow-wrap:anywhere}
.verdict{border-left:.4rem solid;border-radius:.3rem;padding:.6rem 1rem;margin:.8rem 0}
.verdict p{margin:.2rem 0}.word{font-size:1.3rem;font-weight:700}
.yes{border-color:var(--yes);background:var(--yes-back)}.no{border-color:var(--no);background:var(--no-back)}
.maybe{border-color:var(--maybe);background:var(--maybe-back)}
.yes .word,.cell.yes{color:var(--yes)}.no .word,.cell.no{color:var(--no)}
.maybe .word,.cell.maybe{color:var(--maybe)}
.cell{padding:0 .35rem;border-radius:.25rem;font-weight:600}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;padding:0;margin:1.2rem 0 0}
.swatch{display:inline-block;width:.8rem;height:.8rem;border-radius:50%;margin-right:.4rem}
figure{margin:.5rem 0}svg{width:100%;height:auto;display:block}svg text{font-family:inherit}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;margin:.6rem 0}
caption{text-align:left;color:var(--soft);padding:.2rem 0}
th,td{padding:.35rem .6rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap;
font-variant-numeric:tabular-nums}
th{font-weight:600}th[scope=row],th:first-child{text-align:left;white-space:normal;overflow-wrap:anywhere}
small,dt{color:var(--soft)}dt{font-size:.85rem;margin-top:.5rem}dd{margin:0}
summary{cursor:pointer;margin-top:.8rem}
"""
