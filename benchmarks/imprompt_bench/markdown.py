"""Markdown tables, and estimates as text."""

from __future__ import annotations

from collections.abc import Sequence

from imprompt_bench.stats import Estimate


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; all columns but the first are right-aligned for numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interval(estimate: Estimate, digits: int = 3) -> str:
    """Format an estimate with its confidence interval."""
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"
