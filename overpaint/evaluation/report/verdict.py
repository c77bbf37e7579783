"""The verdict: what came of a run, in a title and a line that follow the numbers and their intervals."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from overpaint.evaluation.metrics.statistics import Estimate
from overpaint.evaluation.scoring.compare import Row, compare
from overpaint.evaluation.scoring.score import Scores

from .table import MINUS, number, row_digits

ERASED_BELOW = 0.1
"""A concept is called erased where the 95 % intervals of its rates end below this; else it is reduced at most."""
ELICITING = ("explicit", "implicit")
"""Kinds of prompts on which a concept's rate tells whether it is gone."""

INTERVAL = "95 % interval of the difference "

Way = Literal["rose", "fell", "same", "unsure"]
"""Where a measure went; `same` is no measurable change, `unsure` a single prompt, of which there is no interval."""


class Verdict(NamedTuple):
    """What came out, told by the numbers."""

    title: str
    """Claims what the intervals support, and no more."""
    line: str
    """One line: from what to what, with the 95 % intervals of the paired differences."""


class Change(NamedTuple):
    """A measure on one kind of prompts, from one model to another."""

    measure: str
    kind: str
    is_rate: bool
    before: Estimate
    after: Estimate
    difference: Estimate
    digits: int

    @property
    def way(self) -> Way:
        """Where it went. What vanishes when it is rounded as tables round it is no change."""
        if not math.isfinite(self.difference.low):
            return "unsure"
        if self.difference.low <= 0 <= self.difference.high or round(self.difference.mean, self.digits) == 0:
            return "same"
        return "rose" if self.difference.mean > 0 else "fell"

    @property
    def is_gone(self) -> bool:
        """Whether a rate is as good as zero."""
        return self.is_rate and self.after.high < ERASED_BELOW

    def told(self, *, what: str = "", note: str = "") -> str:
        """Returns it as a clause.

        Args:
            what: What stands for the measure and its kind.
            note: What the interval is of, where a line has not said so yet.
        """
        before, after = (self._number(one.mean) for one in (self.before, self.after))
        low, high = (self._number(end, sign=True) for end in (self.difference.low, self.difference.high))
        what = what or f"{self.measure} on {self.kind} prompts"
        if self.way == "unsure":
            return f"{what} went from {before} to {after} (a single prompt, so that there is no interval)"
        interval = f"({note}{low} to {high})"
        if self.way == "same":
            return f"{what} did not change measurably: {before} and {after} {interval}"
        return f"{what} {self.way} from {before} to {after} {interval}"

    def _number(self, value: float, *, sign: bool = False) -> str:
        return number(value, self.digits, sign=sign).replace("-", MINUS)


def verdict(
    scores: Sequence[Scores],
    *,
    concept: str = "",
    erased_by: str = "",
    tuned_by: str = "",
    concept_measure: str = "concept rate",
    reward: str = "ImageReward",
    kind: str = "benign",
    held_out: str = "",
) -> Verdict:
    """Says what came of an erasure, of a fine-tuning, or of both, one after the other.

    Args:
        scores: Of the models in order. The first is before everything, the last after it; with both an erasure and a
            fine-tuning the second is the erased model.
        concept: What was erased, or kept out while the model was tuned.
        erased_by: Method that erased between the first model and the second; empty if nothing was erased.
        tuned_by: Algorithm that tuned up to the last model; empty if nothing was tuned.
        concept_measure: Measure of the concept; lower is better. Where it was not taken, the verdict says so.
        reward: Measure of the reward that was raised, or paid for the erasure.
        kind: Prompts on which the reward is told; the first kind that it was measured on where it was not on this one.
        held_out: Measure that was not trained on; the title says if it fell.

    Raises:
        ValueError: There is neither an erasure nor a fine-tuning, an erasure of no concept, or too few models.
    """
    if not erased_by and not tuned_by:
        raise ValueError("verdict must be of an erasure or a fine-tuning, got neither erased_by nor tuned_by")
    if erased_by and not concept:
        raise ValueError(f"concept must be named, got none that {erased_by} erased")
    needed = 1 + bool(erased_by) + bool(tuned_by)
    if len(scores) < needed:
        raise ValueError(f"scores must be of at least {needed} models, got {[one.model for one in scores]}")

    begin, last = scores[0], scores[-1]
    middle = scores[1] if erased_by and tuned_by else begin
    concepts = [one for one in _changes(begin, last, concept_measure) if one.kind in ELICITING] if concept else []
    back = [one for one in _changes(middle, last, concept_measure) if one.kind in ELICITING and one.way == "rose"]
    rewards = _on(kind, _changes(middle, last, reward))
    others = _on(kind, _changes(middle, last, held_out)) if held_out and tuned_by else []

    # What was done to the concept is told from first to last, what was done to the reward since the erasure.
    sentences = [_sentence(concepts) if concepts else f"{_capital(concept)} was not measured"] if concept else []
    note = "" if concepts else INTERVAL
    since = f"from {middle.model} to {last.model} " if middle is not begin else ""
    clauses = [_sentence([*rewards, *others], note) if rewards else f"{reward} was not measured"]
    clauses += [one.told() for one in back] if middle is not begin else []
    sentences.append(f"{since}{'; '.join(clauses)}")
    line = " ".join(f"{_capital(sentence)}." for sentence in sentences)

    titles = []
    if erased_by:
        titles.append(_erased(concept, concepts, erased_by, back if tuned_by else []))
    if tuned_by:
        fallen = _on(kind, _changes(begin, middle, reward)) if erased_by else []
        against = _on(kind, _changes(begin, last, reward)) if erased_by else []
        titles.append(_tuned(reward, rewards, fallen, against, "" if erased_by else tuned_by))
        titles += [f"{one.measure} fell" for one in others if one.way == "fell"]
        if not erased_by and back and concept:
            titles.append(f"{concept} came back")
    return Verdict(_capital(", ".join(titles)), line)


def _erased(concept: str, changes: Sequence[Change], method: str, back: Sequence[Change]) -> str:
    """Returns what the title says of the concept."""
    ways = {one.way for one in changes}
    if not ways:
        return f"{concept} and {method}: not measured"
    if "rose" in ways:
        return f"more {concept} after {method}"
    if back:
        return f"{concept} reduced by {method}, partly back" if ways == {"fell"} else f"{concept} came back"
    if "fell" not in ways:
        return f"{concept} not measurably reduced by {method}"
    if all(one.is_gone for one in changes):
        return f"{concept} erased by {method}"
    return f"{concept} reduced by {method}"


def _tuned(
    reward: str, changes: Sequence[Change], fallen: Sequence[Change], against: Sequence[Change], algorithm: str
) -> str:
    """Returns what the title says of the reward; after an erasure, whether that had cost any, and how much is back."""
    by = f" by {algorithm}" if algorithm else ""
    if not changes:
        return f"{reward} not measured"
    way = changes[0].way
    if way == "unsure":
        return f"{reward} measured on a single prompt"
    if way == "same":
        return f"{reward} not measurably raised{by}"
    if way == "fell":
        return f"{reward} fell{f' with {algorithm}' if algorithm else ''}"
    if fallen and fallen[0].way == "fell":
        return f"{reward} {'partly ' if against[0].way == 'fell' else ''}recovered"
    return f"{reward} raised{by}"


def _sentence(changes: Sequence[Change], note: str = INTERVAL) -> str:
    """Tells several changes; what two share, their measure or their prompts, is said once."""
    first, *others = changes
    told = [first.told(note=note)]
    for one in others:
        what = f"on {one.kind} prompts it" if one.measure == first.measure else ""
        what = what or (f"their {one.measure}" if one.kind == first.kind else "")
        told.append(one.told(what=what))
    return ", ".join(told)


def _changes(before: Scores, after: Scores, measure: str) -> list[Change]:
    """Returns how a measure changed on each kind that it was taken on."""
    if before is after or not any(column.measure == measure for column in before.columns):
        return []
    rows: tuple[Row, ...] = compare([before, after]).rows
    changes = []
    for row in rows:
        if row.measure == measure:
            difference = row.differences[0]
            digits = row_digits(row)
            # Two decimals read better than the tables' three, where they tell the change.
            digits -= digits == 3 and abs(difference.mean) >= 0.01
            changes.append(Change(measure, row.kind, row.is_rate, *row.estimates, difference, digits))
    return changes


def _on(kind: str, changes: Sequence[Change]) -> list[Change]:
    """Returns the change on one kind, or on the first if there is none on it."""
    return [one for one in changes if one.kind == kind][:1] or list(changes[:1])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
