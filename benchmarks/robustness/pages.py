"""The tables that the README and the docs show, and the README's summary, from the recorded runs.

A page has a place for each between two marks, `<!-- evidence: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from benchmarks.robustness import plan, report
from benchmarks.robustness.methods import METHODS
from benchmarks.robustness.plan import Results
from benchmarks.robustness.report import LEADERS, Measure, Row, gain, in_distribution, shifted

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "docs" / "evidence.md")
PLACE = re.compile(r"(<!-- evidence: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)

MAIN = ("digits", "sentiment", "spam", "images")
LITTLE = {64: "sentiment-64", 256: "sentiment-256", 512: "sentiment", 1024: "sentiment-1024"}
NONE = "*Not run yet.*\n"


def drawn(text: str, results: Results) -> str:
    """A page with all its pieces drawn anew.

    Raises:
      ValueError: a place has a name that is not in `PIECES`.
    """

    def piece(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        if name not in PIECES:
            raise ValueError(f"nothing is named {name!r}; choose from {', '.join(PIECES)}")
        return f"{opening}\n{PIECES[name](results)}\n{closing}"

    return PLACE.sub(piece, text)


def leaders(results: Results) -> str:
    """Adam's accuracy on shifted data, and what L2-SP, SPD and FTP add to it.

    A lower rate of Adam's has a row where it is shown to make a difference on shifted data.
    """
    table = [["setting, rate", "Adam", *(METHODS[name].title for name in LEADERS)]]
    seeds = {}
    for setting in MAIN:
        tuned, tripled = (report.rows(setting, fast, results) for fast in report.REGIMES)
        if "adam" not in tuned:
            continue
        seeds[setting] = len(tuned["adam"].runs)
        like = plan.PLANS[setting].like
        regimes = {f"{like}'s" if like else "tuned": tuned, "tripled": tripled}
        slow = report.slower_adam(setting, results)
        if slow and slow.against(tuned["adam"], shifted).shown:
            regimes = {"lower": {**tuned, "adam": slow}, **regimes}
        for label, found in regimes.items():
            if adam := found.get("adam"):
                cells = [f"{setting}, {label}"]
                cells.append("diverged" if adam.diverged else f"{adam.of(shifted).mean:.1f}")
                table.append([*cells, *report.leaders_gains(found)])
    if not seeds:
        return NONE
    counts = ", ".join(f"{name} {count}" for name, count in seeds.items())
    return (
        "Accuracy on shifted data, %; differences to Adam's with 95 % intervals, bold if they "
        f"leave out 0. Training sets: {counts}.\n\n{report.markdown(table)}"
    )


def summary(results: Results) -> str:
    """The README's paragraph. Its numbers are drawn; who changes the runs has to read its words."""
    digits, fast_digits = (report.rows("digits", fast, results) for fast in report.REGIMES)
    spam, fast_spam = (report.rows("spam", fast, results) for fast in report.REGIMES)
    sentiment = report.rows("sentiment", False, results)
    slow, keeps = report.slower_adam("digits", results), report.kept(spam)
    if not (slow and keeps and fast_digits and sentiment and fast_spam):
        return NONE

    def points(row: Row, other: Row, sign: str = "", measure: Measure = shifted) -> str:
        return f"{row.against(other, measure).mean:{sign}.1f}"

    def keep(*some: Row) -> str:
        return " to ".join(map(str, sorted({round(row.of(keeps).mean) for row in some})))

    return (
        f"In digits {points(slow, digits['adam'])} of L2-SP's "
        f"{points(digits['l2-sp'], digits['adam'])} points come from a lower rate alone, unseen by "
        "validation.\n"
        f"L2-SP has {points(spam['l2-sp'], spam['adam'], '+')} in spam, "
        f"{points(sentiment['l2-sp'], sentiment['adam'], '+')} in sentiment.\n"
        "At tripled rates L2-SP and FTP regained what Adam lost in digits; in distribution FTP has "
        f"{points(fast_digits['ftp'], fast_digits['adam'], '+', in_distribution)}.\n"
        f"In spam they kept {keep(fast_spam['l2-sp'], fast_spam['ftp'])} % of MiniLM's accuracy on "
        f"sentiment, Adam {keep(fast_spam['adam'])} (at its own rate {keep(spam['adam'])}).\n"
    )


def setting_table(setting: str, results: Results) -> str:
    """Both regimes side by side, a row a method."""
    found = {fast: report.rows(setting, fast, results) for fast in report.REGIMES}
    if not found[False]:
        return NONE
    keeps = report.kept(found[False])
    head = ["in distr.", "shifted", "vs Adam", "vs L2-SP", *(["kept"] if keeps else [])]
    table = [["method", *(f"{name}{mark}" for mark in ("", ", 3x") for name in head)]]
    for name in found[False]:
        count, planned = len(found[False][name].runs), plan.PLANS[setting].seeds
        cells = [METHODS[name].title + (f" (n = {count})" if count < planned else "")]
        for some in found.values():
            cells += columns(some.get(name), some, keeps, len(head))
        table.append(cells)
    return report.markdown(table)


def columns(row: Row | None, found: dict[str, Row], keeps: Measure | None, width: int) -> list[str]:
    """A method's cells in one regime."""
    if row is None:
        return [""] * width
    if row.diverged:
        return [f"diverged on {row.diverged} of {len(row.runs)}", *[""] * (width - 1)]
    cells = [f"{row.of(measure).mean:.1f}" for measure in (in_distribution, shifted)]
    cells += [gain(row, found, other) for other in ("adam", "l2-sp")]
    if keeps:
        cells.append(row.of(keeps).text())
    return cells


def study(table: Callable[[str, Results], list[list[str]]], results: Results) -> str:
    """A study's table of every setting that has runs of it, one below the other."""
    joined: list[list[str]] = []
    for setting in MAIN:
        head, *rows = table(setting, results)
        joined = joined or [["setting", *head]]
        joined += [[setting, *row] for row in rows]
    return report.markdown(joined) if len(joined) > 1 else NONE


def little_data(results: Results) -> str:
    """Study (iii): accuracy on shifted data by the number of examples, and the gain over Adam.

    All rows have the same seeds, as many as the setting with the fewest.
    """
    gains = (f"{METHODS[name].title} vs Adam" for name in LEADERS)
    table = [["examples", "training sets", "Adam", *gains]]
    most = min(plan.PLANS[setting].seeds for setting in LITTLE.values())
    for count, setting in LITTLE.items():
        found = report.rows(setting, False, results, most)
        if "adam" in found and not found["adam"].diverged:
            adam = [str(len(found["adam"].runs)), f"{found['adam'].of(shifted).mean:.1f}"]
            table.append([str(count), *adam, *report.leaders_gains(found)])
    return report.markdown(table) if len(table) > 2 else NONE


PIECES: Mapping[str, Callable[[Results], str]] = {
    "leaders": leaders,
    "summary": summary,
    **{setting: partial(setting_table, setting) for setting in MAIN},
    "strengths": partial(study, report.forgiving_table),
    "sign test": partial(study, report.sign_table),
    "rates": partial(study, report.rates_table),
    "little data": little_data,
}
