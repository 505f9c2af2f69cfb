"""The report as one page: no script, no network, readable in light and dark."""

import math
from html import escape

from ldm.parity.blocks import Divergence, Walked
from ldm.parity.calls import Block
from ldm.parity.compare import SKIPPED, Line
from ldm.parity.report import COLUMNS, Report, cells, memory, small

BEFORE, BEHIND = 8, 12  # modules shown around the first that differs
LOWEST = -17  # the bars' scale: from 1e-17 to 1
STYLE = """
:root { color-scheme: light dark; --line: #8884; --bad: #c8502d; --good: #2f8a4e; --pale: #8882; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.verdict { font-size: 1.1rem; border-left: .4rem solid var(--good); padding: .3rem .8rem; background: var(--pale); }
.verdict.bad { border-color: var(--bad); }
table { border-collapse: collapse; font-size: .86rem; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .6rem .2rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; white-space: nowrap; }
.equal { color: var(--good); } .differs, .refused { color: var(--bad); font-weight: 600; }
.skipped td { opacity: .65; } .note { font-size: .8rem; opacity: .75; }
code { font-size: .92em; } dl { display: grid; grid-template-columns: 7rem 1fr; gap: .1rem 1rem; font-size: .9rem; }
dt { opacity: .7; } dd { margin: 0; overflow-wrap: anywhere; }
.causes li { margin: .2rem 0; } details { font-size: .88rem; margin: .6rem 0; }
svg { display: block; width: 100%; height: auto; font: 11px ui-monospace, monospace; }
svg text { fill: currentColor; } .bar { fill: #2f6db3; } .bar.bad { fill: var(--bad); } .grid { stroke: var(--line); }
"""


def page(report: Report) -> str:
    """The whole page."""
    about = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in report.about.items())
    bad = "" if report.equal else " bad"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width"><meta name="generator" content="ldm parity">',
        f"<title>Parity: {escape(report.about['model'])}</title><style>{STYLE}</style></head><body>",
        f"<h1>ldm beside {escape(report.about['against'])}</h1>",
        f'<p class="verdict{bad}">{escape(report.sentence)}</p>',
        *(section(each) for each in report.divergences),
        "<h2>What was compared</h2>",
        table(report.lines),
        *(block_table(each) for each in report.walked),
        f"<h2>How</h2><dl>{about}</dl>",
        "<p class=note>Relative: to the largest value of the reference. In half precision: the root mean square error "
        "against float32, which must not be larger than the reference's own (5&#8239;% more at most for a network, "
        "half as much again for a whole run, whose rounding guidance and steps multiply).</p></body></html>\n",
    ]
    return "\n".join(parts)


def table(lines: list[Line]) -> str:
    numbers = range(2, 7)
    head = "".join(f"<th{' class=n' * (k in numbers)}>{escape(name)}</th>" for k, name in enumerate((*COLUMNS, "")))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(map(one, lines))}</tbody></table>"


def block_table(walked: Walked) -> str:
    """Every block of a network, behind a summary."""
    rows = ""
    for block in walked.named:
        numbers = (small(block.difference), small(block.error), f"{block.ours_ms:.2f}", f"{block.theirs_ms:.2f}")
        found = "".join(f"<td class=n>{each}</td>" for each in numbers)
        rows += f"<tr><td><code>{escape(block.name)}</code></td>{found}</tr>"
    names = ("block", "largest diff", "relative", "ours ms", "theirs ms")
    head = "".join(f"<th{' class=n' * (k > 0)}>{name}</th>" for k, name in enumerate(names))
    summary = f"<summary>{escape(walked.station)}: {len(walked.named)} blocks, at a small size, in order</summary>"
    return f"<details>{summary}<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></details>"


def one(line: Line) -> str:
    note = f"<td class=note>{escape('; '.join(filter(None, (line.note, memory(line)))))}</td>"
    if line.verdict == SKIPPED:
        return f"<tr class=skipped><td>{escape(line.station)}</td><td colspan=6></td><td>{SKIPPED}</td>{note}</tr>"
    found = cells(line)
    row = "".join(f"<td{' class=n' * (2 <= k < 7)}>{escape(text)}</td>" for k, text in enumerate(found[:-1]))
    return f"<tr>{row}<td class={line.verdict}>{line.verdict}</td>{note}</tr>"


def section(each: Divergence) -> str:
    """Where it begins to differ, why, and the error of every block."""
    if each.note:
        return f"<h2>{escape(each.station)}</h2><p>{escape(each.note)}.</p>{bars(each)}"
    place = f"<code>{escape(each.block)}</code>" if each.block else "the network itself, outside its parts"
    inputs = ", ".join(small(error) for error in each.input_errors) or "not compared"
    inside = f" First seen in <code>{escape(each.first)}</code>." if each.first != each.block else ""
    causes = "".join(f"<li>{escape(cause)}" for cause in each.causes) or "<li>none found"
    tried = "".join(f"<li>{escape(text)}" for text in each.tried)
    return (
        f"<h2>{escape(each.station)} begins to differ in {place}</h2>"
        f"<p>{escape(each.kind)}: its output by {small(each.error)} of the largest value, its inputs by {inputs}."
        f"{inside}</p><p>Likely causes, by experiment on our own module:</p><ul class=causes>{causes}</ul>"
        f"<details><summary>What was tried</summary><ul>{tried}</ul></details>{bars(each)}"
    )


def bars(each: Divergence) -> str:
    """The relative error of every module's output, in order of completion, on a logarithmic scale.

    Where the first one differs is shown; all of them are behind a summary.
    """
    blocks = [block for block in each.blocks if block.error is not None]
    if not blocks:
        return ""
    at = next((k for k, block in enumerate(blocks) if block.name == each.first), 0)
    begin, end = max(0, at - BEFORE), at + BEHIND
    text = f"modules {begin + 1} to {min(end, len(blocks))} of {len(blocks)}, in order of completion"
    shown = f"<p class=note>The relative error of {text}:</p>{chart(blocks[begin:end], each.first)}"
    if begin == 0 and end >= len(blocks):
        return shown
    summary = f"<summary>All {len(blocks)} modules</summary>"
    return f"{shown}<details>{summary}{chart(blocks, each.first)}</details>"


def chart(blocks: list[Block], first: str) -> str:
    left, width, high = 470, 560, 15
    grid = "".join(
        f'<line class=grid x1="{x:.0f}" x2="{x:.0f}" y1="14" y2="{20 + high * len(blocks)}"/>'
        f'<text x="{x:.0f}" y="10" text-anchor="middle">1e{power}</text>'
        for power in range(-16, 1, 4)
        for x in [left + width * (power - LOWEST) / -LOWEST]
    )
    marks = "".join(mark(block, k, left, width, high, bad=block.name == first) for k, block in enumerate(blocks))
    size = f"0 0 {left + width + 90} {24 + high * len(blocks)}"
    return f'<svg viewBox="{size}" role="img" aria-label="errors by module">{grid}{marks}</svg>'


def mark(block: Block, k: int, left: int, width: int, high: int, bad: bool) -> str:
    error = block.error if math.isfinite(block.error) else 1.0
    power = math.log10(error) if error > 0 else LOWEST
    long = width * (min(max(power, LOWEST), 0) - LOWEST) / -LOWEST
    y = 18 + high * k
    name = escape(block.name or "output")
    return (
        f'<text x="{left - 8}" y="{y + 10}" text-anchor="end">{name}</text>'
        f'<rect class="bar{" bad" * bad}" x="{left}" y="{y + 2}" width="{max(long, 1):.1f}" height="{high - 5}"/>'
        f'<text x="{left + max(long, 1) + 5:.0f}" y="{y + 10}">{small(block.error)}</text>'
    )
