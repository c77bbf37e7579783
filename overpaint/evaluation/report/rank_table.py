"""Models ranked by several metrics beside the order in which people put them, and how well the orders agree."""

from collections.abc import Mapping
from html import escape

from overpaint.evaluation.metrics.statistics import ranks, spearman

from .page import Section
from .result_tables import MINUS

Means = Mapping[str, Mapping[str, float]]
"""The mean of each model, by metric."""


def agreement(means: Means, people: Mapping[str, float]) -> dict[str, float]:
    """Returns Spearman's correlation of each metric's ranking with that of people, in [-1, 1].

    Args:
        means: By metric, of any of the models; more is better.
        people: The rank of each model; 1 is best.

    Raises:
        ValueError: A metric has fewer than two of the models, or gives all the same.
    """
    found = {}
    for metric, values in means.items():
        models = [model for model in values if model in people]
        found[metric] = spearman(ranks([values[model] for model in models]), [people[model] for model in models])
    return found


def rank_text(means: Means, people: Mapping[str, float], *, judge: str) -> str:
    """Lays the ranking out as Markdown, best first, with the correlations below.

    Args:
        means: As for `agreement`.
        people: As for `agreement`.
        judge: Who gave the ranks, such as "people".
    """
    rows = [["model", *means, judge], ["---"] + ["---:"] * (len(means) + 1), *_rows(means, people)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    correlations = [
        f"Spearman with {judge}, {metric}: {value:.2f}" for metric, value in agreement(means, people).items()
    ]
    return "\n".join([*lines, "", *correlations])


def rank_section(means: Means, people: Mapping[str, float], *, judge: str, caption: str) -> Section:
    """Lays the ranking out for a report.

    Args:
        means: As for `agreement`.
        people: As for `agreement`.
        judge: Who gave the ranks, such as "people".
        caption: What to know of the ranks.
    """
    heads = "".join(f'<th scope="col" class="number">{escape(name)}</th>' for name in (*means, judge))
    body = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f'<td class="number">{cell}</td>' for cell in cells)
        + "</tr>"
        for name, *cells in _rows(means, people)
    )
    found = agreement(means, people)
    last = "".join(f'<td class="number">{value:.2f}</td>' for value in found.values()).replace(">-", f">{MINUS}")
    return Section(
        "ranking",
        "Models in order",
        '<div class="scroll" tabindex="0" role="region" aria-label="Models in order"><table class="plain">\n'
        f"<caption>Mean of each model, and its rank in brackets, best first by {escape(judge)}. "
        f"{escape(caption)}</caption>\n"
        f'<thead><tr><th scope="col">model</th>{heads}</tr></thead>\n<tbody>\n{body}\n'
        f'<tr><th scope="row">Spearman with {escape(judge)}</th>{last}<td></td></tr>\n</tbody></table></div>',
    )


def _rows(means: Means, people: Mapping[str, float]) -> list[list[str]]:
    """Returns the cells of each model that people ranked, best first."""
    models = sorted({model for values in means.values() for model in values if model in people}, key=people.__getitem__)
    places = {
        metric: dict(zip(values, ranks(list(values.values())), strict=True))
        for metric, all_values in means.items()
        if (values := {model: value for model, value in all_values.items() if model in people})
    }

    def cell(metric: str, model: str) -> str:
        if model not in means[metric]:
            return "not run"
        return f"{means[metric][model]:.4f} ({places[metric][model]:g})".replace("-", MINUS)

    return [[model, *(cell(metric, model) for metric in means), f"{people[model]:g}"] for model in models]
