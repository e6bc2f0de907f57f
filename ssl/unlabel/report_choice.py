"""Which to use, where --init gave weights: pretrain here, take those as they are, or plain supervised training.

The three are compared by their paired differences at the primary comparison's protocol and label count; under a
protocol that trains no network the third is the random backbone, or what else the comparison is with. The winner
has an interval above zero against each of the other two: where both hold at 95 %, so does "best of the three". Else
it cannot be told between those that are named. Without weights of --init, all is as in `report_text`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from unlabel import report_text
from unlabel.report_text import ACCURACY_OF, CONTROLS, Row, basis, comparisons, find, labels_phrase, number, section

__all__ = ["Choice", "answer", "choice", "given_arm", "title"]


@dataclass(frozen=True)
class Choice:
    """``arms``: what there was to choose from, by name of the arm. ``left``: one is the winner, several are open."""

    row: Row  # the primary comparison
    first: str  # the pretext arm that was named in advance
    given: str
    arms: list[str]
    left: list[str]


def given_arm(results: dict[str, Any]) -> str | None:
    """The arm that is the weights of --init as they were given."""
    name = section(results, "provenance", "given").get("arm")
    return name if isinstance(name, str) and name else None


def choice(results: dict[str, Any]) -> Choice | None:
    """None where no weights were given, or nothing compares them at the primary protocol and label count."""
    given, row = given_arm(results), report_text.primary_row(results)
    if given is None or row is None:
        return None
    first = str(row.get("arm"))
    versus = str(row.get("versus"))
    arms = [first, given, versus if versus in CONTROLS else "scratch"]
    known = {(a, b): d for a in arms for b in arms if (d := _difference(results, row, a, b)) is not None}
    arms = [a for a in arms if all((a, b) in known for b in (first, given) if b != a)]
    if first == given or len(arms) < 2:
        return None

    def above(a: str, b: str) -> bool:
        return known[a, b][1] > 0

    winner = [a for a in arms if all(above(a, b) for b in arms if b != a)]
    unbeaten = [a for a in arms if not any(above(b, a) for b in arms if b != a)]
    left = winner or unbeaten
    if not winner and len(unbeaten) < 2:  # open is what the one that nothing beats does not beat; in a circle: all
        left = [b for b in arms if b in unbeaten or not any(above(a, b) for a in unbeaten)]
    return Choice(row, first, given, arms, left)


def _difference(results: dict[str, Any], row: Row, a: str, b: str) -> tuple[float, float, float] | None:
    """a - b with its interval, in points, at the place of ``row``; in whichever order it was stored."""
    place = {key: row.get(key) for key in ("protocol", "labels_per_class")}
    for one, other, s in ((a, b, 1), (b, a, -1)):
        found = find(comparisons(results), arm=one, versus=other, **place)
        if found is not None:
            ends = [number(found.get(key)) for key in ("difference", "ci_low", "ci_high")]
            points = [100 * s * value for value in ends if value is not None]
            return (points[0], min(points[1:]), max(points[1:])) if len(points) == 3 else None
    return None


def _to_do(found: Choice, arm: str) -> str:
    """What a person would do who chose this arm."""
    if arm == found.first:
        return f"pretrain here ({arm})"
    if arm == found.given:
        return f"take {arm} as it is"
    return "train from scratch" if arm == "scratch" else f"use neither ({CONTROLS[arm]} will do)"


def _name(found: Choice, arm: str) -> str:
    return f"{arm} as given" if arm == found.given else CONTROLS.get(arm, arm)


def _either(texts: list[str]) -> str:
    return f"{', '.join(texts[:-1])} or {texts[-1]}" if len(texts) > 1 else texts[0]


def title(results: dict[str, Any]) -> str:
    """The answer as a headline of one short line."""
    found = choice(results)
    if found is None:
        return report_text.title(results)
    where = f"with {labels_phrase(found.row.get('labels_per_class'))}"
    if len(found.left) > 1:
        return f"These labels cannot tell whether to {_either([_to_do(found, a) for a in found.left])}"
    what = _to_do(found, found.left[0])
    return f"{what[0].upper()}{what[1:]}, {where}"


def answer(results: dict[str, Any]) -> str:
    """Which to use, in one sentence, with the differences and 95 % intervals that say so."""
    found = choice(results)
    if found is None:
        return report_text.answer(results)
    what = ACCURACY_OF.get(str(found.row.get("protocol")), "accuracy")
    start = f"With {labels_phrase(found.row.get('labels_per_class'))}"
    end = f"{what}, in points with 95 % intervals {basis(results, found.row)}"
    if "scratch" not in found.arms:
        end += "; plain supervised training was not measured here"
    best, others = found.left[0], [a for a in found.arms if a not in found.left]
    if len(found.left) == 1:
        by = " and ".join(_against(results, found, best, b, "over") for b in others)
        return f"{start}, {_to_do(found, best)}: {by}; {end}."
    pairs = [(a, b) for k, a in enumerate(found.left) for b in found.left[k + 1 :]]
    open_ = "; ".join(f"{_name(found, a)}, {_against(results, found, a, b, 'from')}" for a, b in pairs)
    behind = f"; {_name(found, others[0])} is behind" if others else ""
    either = _either([_to_do(found, a) for a in found.left])
    return f"{start}, it cannot be told whether to {either}: {open_}{behind}; {end}."


def _against(results: dict[str, Any], found: Choice, a: str, b: str, word: str) -> str:
    difference = _difference(results, found.row, a, b)
    assert difference is not None  # else b would not be among the arms
    middle, low, high = difference
    return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}] {word} {_name(found, b)}"
