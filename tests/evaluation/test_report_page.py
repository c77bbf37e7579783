import base64
import hashlib
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from overpaint.evaluation import (
    DrawConfig,
    DrawnImages,
    Measure,
    Panel,
    PlannedImage,
    Report,
    compare,
    draw,
    score,
)
from overpaint.evaluation.report.page import Section, evenly_spaced
from overpaint.evaluation.report.table import results_table
from overpaint.policy.types import Images

Planned = tuple[PlannedImage, ...]
VOID = {"meta", "img", "line", "path", "circle", "polygon", "rect", "br", "input"}


class Reader(HTMLParser):
    """Notes tags and text, and that every element that is opened is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"style", "script"}:
            self.text += data

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def brightness(images: Images, prompts: Sequence[str]) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def is_bright(images: Images, prompts: Sequence[str]) -> Tensor:
    return brightness(images, prompts) > 0.45


MEASURES = (
    Measure("bright<ness>", brightness, note="the mean of all channels & pixels"),
    Measure("is bright", is_bright, ("explicit",), better="lower"),
)


@pytest.fixture
def pictures(planned: Planned, noise_policy: Any) -> tuple[DrawnImages, DrawnImages]:
    before, after = (
        draw(noise_policy(shift), planned, DrawConfig(steps=7), model=model, progress=False)
        for shift, model in ((0.0, "before"), (0.2, "recovered"))
    )
    return before, after


@pytest.fixture
def report(pictures: tuple[DrawnImages, DrawnImages], tmp_path: Path) -> Report:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(
            json.dumps({"iteration": k, "reward/mean": k / 10, "erasure/violation": -k / 10}) + "\n" for k in range(40)
        ),
        encoding="utf-8",
    )
    return Report(
        title="Erase <stripes>",
        lead="What came out & how.",
        comparison=compare([score(source, MEASURES, progress=False) for source in pictures]),
        models={"before": "as shipped", "recovered": "after 40 iterations of <ReFL>"},
        pictures=pictures,
        pictures_per_kind=3,
        metrics=path,
        panels=[
            Panel(title="Reward", tags={"learned": "reward/mean", "true": "reward/true"}),
            Panel(title="Cost", tags={"cost": "erasure/violation"}, caption="At or below zero the concept is gone."),
            Panel(title="Nothing", tags={"nothing": "no/such"}),
        ],
        commands=["accelerate launch examples/refl_erase_nudity.py --title <i>it</i>"],
        settings={"seed": 0, "refl": {"learning_rate": 1e-4, "lora": {"rank": 4}}},
        notes=["Means are of the policy after training, <not> of the batch."],
    )


def test_the_table_shows_means_errors_and_paired_differences(report: Report) -> None:
    text = Reader(report.html()).text.replace("\n", " ")
    assert report.comparison is not None
    for row in report.comparison.rows:
        for estimate in row.estimates:
            assert f"{estimate.mean:.3f} ± {estimate.error:.3f}" in text.replace("\u2212", "-")
    assert "+0.200 ± 0.000 (better)" in text  # brightness rises by the shift, for every image alike
    assert "(worse)" in text  # and being bright counts as worse
    assert "bright<ness>" in text
    assert "in 7 denoising steps with guidance scale 5" in text


def test_every_number_is_listed_with_its_interval(report: Report) -> None:
    text = Reader(report.html()).text
    assert report.comparison is not None
    for row in report.comparison.rows:
        for one in row.estimates:
            assert f"{one.mean:.4f} [{one.low:.4f}, {one.high:.4f}]" in text.replace("\u2212", "-")
        for one in row.differences:
            assert f"{one.mean:+.4f} [{one.low:+.4f}, {one.high:+.4f}]" in text.replace("\u2212", "-")


def test_pictures_are_in_the_page_with_words_for_those_who_do_not_see_them(
    report: Report, pictures: tuple[DrawnImages, DrawnImages]
) -> None:
    images = Reader(report.html()).attributes("img")
    places = [*evenly_spaced(range(4), 3), *evenly_spaced(range(4, 10), 3)]
    expected = [
        (source.planned[place], source.model, source.pixels([place])[0]) for place in places for source in pictures
    ]
    assert len(images) == len(expected) == 12
    for attributes, (planned, model, pixels) in zip(images, expected, strict=True):
        assert attributes["alt"] == f"{model}: {planned.prompt}"
        content = str(attributes["src"]).removeprefix("data:image/png;base64,")
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            shown = torch.tensor(list(image.tobytes()), dtype=torch.uint8).reshape(8, 8, 3)
        assert torch.equal(shown.permute(2, 0, 1), pixels)


def test_nothing_is_loaded_from_elsewhere_and_no_other_scripts_run(report: Report) -> None:
    page = report.html()
    reader = Reader(page)
    for tag, attributes in reader.tags:
        assert tag not in {"link", "iframe", "object", "embed"}
        assert str(attributes.get("src", "data:")).startswith("data:")
        assert str(attributes.get("href", "#")).startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert not re.search(r"@import|url\(", "".join(re.findall(r"<style>(.*?)</style>", page, re.DOTALL)))
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(scripts) == 2
    (policy,) = (meta["content"] for meta in reader.attributes("meta") if "http-equiv" in meta)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    pictures = sum(map(len, re.findall(r"data:image/png;base64,[A-Za-z0-9+/=]+", page)))
    assert len(page.encode()) - pictures < 2_000_000


def test_a_page_without_charts_carries_no_scripts_for_them(report: Report) -> None:
    page = replace(report, metrics=None).html()
    assert len(re.findall(r"<script>", page)) == 1
    assert len(page) < 200_000


def luminance(colour: str) -> float:
    """Relative luminance of "#rrggbb", as WCAG 2 defines it."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, bright = sorted((luminance(one), luminance(other)))
    return (bright + 0.05) / (dark + 0.05)


def test_colours_of_text_and_curves_stand_out_in_light_and_in_dark(report: Report) -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21, abs=1e-9)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # known as just too pale
    found = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", report.html())
    colours = {name: pair for name, *pair in found}
    assert len(colours) == len(found) == 15
    for scheme in (0, 1):
        for name in ("ink", "soft", "faint", "accent", "better", "worse"):
            for behind in ("paper", "wash"):
                assert contrast(colours[name][scheme], colours[behind][scheme]) >= 4.5, (name, behind, scheme)
        for k in range(6):
            assert contrast(colours[f"curve-{k}"][scheme], colours["paper"][scheme]) >= 3, (k, scheme)


def test_links_within_the_page_have_targets(report: Report) -> None:
    reader = Reader(report.html())
    targets = {attributes["id"] for _, attributes in reader.tags if "id" in attributes}
    links = [str(attributes["href"]).removeprefix("#") for attributes in reader.attributes("a")]
    assert links == ["results", "curves", "pictures", "numbers", "measuring", "ran"]
    assert set(links) <= targets


def test_the_scores_of_an_image_stand_under_it(report: Report, pictures: tuple[DrawnImages, DrawnImages]) -> None:
    scores = [score(source, MEASURES, progress=False) for source in pictures]
    page = replace(report, scores=scores, pictures_per_kind=4).html()
    captions = re.findall(r"<figcaption>(before|recovered)<dl>(.*?)</dl></figcaption>", page)
    assert len(captions) == 16
    value = scores[0].column("bright<ness>", "explicit").values[0]
    is_bright = "yes" if scores[0].column("is bright", "explicit").values[0] else "no"
    assert captions[0] == (
        "before",
        f"<div><dt>bright&lt;ness&gt;</dt><dd>{value:.2f}</dd></div><div><dt>is bright</dt><dd>{is_bright}</dd></div>",
    )
    assert "is bright" not in captions[-1][1]  # a measure that was not taken on benign prompts
    with pytest.raises(ValueError, match=r"scores must be of models with pictures, got those of \['recovered'\]"):
        replace(report, scores=scores, pictures=pictures[:1])


def test_of_images_whose_seeds_are_unknown_no_seeds_are_claimed(report: Report) -> None:
    assert report.comparison is not None
    page = replace(report, comparison=replace(report.comparison, config=None, by="prompt"), pictures=()).html()
    assert "Every model was given the same prompts." in page
    assert "on the same prompts; coloured" in page
    assert "seeds" not in page.replace(report.lead, "")


def test_a_page_says_what_ran_and_when(report: Report) -> None:
    began = datetime(2026, 3, 1, 9, 5, tzinfo=UTC)
    told = replace(
        report,
        started=began,
        written=began + timedelta(hours=2),
        versions={"torch": "9.9"},
        hashes={"recovered": "0123abcd"},
    )
    text = Reader(told.html()).text
    assert "started1 March 2026, 09:05 UTCpage written1 March 2026, 11:05 UTC" in text
    assert "versionstorch9.9weights, as hashesrecovered0123abcd" in text
    assert report.versions["torch"] == version("torch")
    with pytest.raises(ValueError, match="started must have a time zone, got 2026-03-01 09:05:00"):
        replace(report, started=began.replace(tzinfo=None))


def test_the_verdict_stands_above_everything_and_the_record_folds_away(report: Report) -> None:
    record = {"model": {"path": "<sd>", "hash": "0123"}, "device": "cpu", "duration": 431.2}
    page = replace(report, verdict="Concept rate fell & stayed.", record=record).html()
    assert '</h1>\n<p class="verdict">Concept rate fell &amp; stayed.</p>\n<p class="lead">' in page
    (folded,) = re.findall(r'<details class="record">.*?</details>', page, re.DOTALL)
    text = Reader(folded).text
    assert text.split("\n")[1:2] == ["model.path<sd>model.hash0123devicecpuduration431.2"]
    assert 'class="verdict"' not in report.html()
    assert 'class="record"' not in report.html()


def test_further_sections_stand_after_the_results_and_need_no_comparison(report: Report) -> None:
    own = Section("costs", "What it <costs>", "<p>little</p>")
    page = replace(report, sections=[own]).html()
    assert page.index('id="results"') < page.index('id="costs"') < page.index('id="curves"')
    assert "<h2>What it &lt;costs&gt;</h2>\n<p>little</p>" in page
    reader = Reader(Report(title="t", lead="l", sections=[own], models={"a": "what it is"}, notes=["a note"]).html())
    assert [str(link["href"]) for link in reader.attributes("a")] == ["#models", "#costs", "#measuring", "#ran"]
    with pytest.raises(ValueError, match=r"sections must have unique anchors .*, got \['costs', 'costs', 'ran'\]"):
        Report(title="t", lead="l", sections=[own, own]).html()
    with pytest.raises(ValueError, match=r"sections must have unique anchors .*, got \['a b', 'ran'\]"):
        Report(title="t", lead="l", sections=[own._replace(anchor="a b")]).html()


def test_many_models_stand_in_rows(noise_policy: Any, planned: Planned) -> None:
    scores = [
        score(
            draw(noise_policy(k / 50), planned, DrawConfig(), model=f"m{k}", progress=False), MEASURES, progress=False
        )
        for k in range(7)
    ]
    few, many = (str(results_table(compare(scores[:count])).html()) for count in (5, 7))
    assert re.findall(r'<tr data-model="(\w+)"', many) == [f"m{k}" for k in range(7)]
    assert 'th scope="row" class="kind">benign<' in few
    for text in re.findall(r'<span class="mean">[^<]*</span>', few):
        assert text in many


def test_what_others_wrote_is_shown_and_not_obeyed(report: Report) -> None:
    page = report.html()
    reader = Reader(page)
    assert "<b>striped" not in page
    assert "a <b>striped</b> cross & more" in reader.text
    for text in (
        "Erase <stripes>",
        "What came out & how.",
        "after 40 iterations of <ReFL>",
        "Means are of the policy after training, <not> of the batch.",
        "--title <i>it</i>",
        "bright<ness>: the mean of all channels & pixels",
    ):
        assert text in reader.text


def test_curves_are_drawn_and_told_in_words_and_missing_ones_are_named_missing(report: Report) -> None:
    reader = Reader(report.html())
    plots = [plot for plot in reader.attributes("div") if plot.get("class") == "plot"]
    assert [plot["aria-label"] for plot in plots] == [
        "Reward. learned: 0 at iteration 0, 3.9 at iteration 39",
        "Cost. cost: 0 at iteration 0, -3.9 at iteration 39",
    ]
    assert len(reader.attributes("svg")) == 2
    assert "At or below zero the concept is gone." in reader.text
    assert reader.text.count("Not logged in this run.") == 1
    assert reader.text.count("The numbers of the chart") == 2


def test_settings_within_settings_get_a_table_and_dotted_names(report: Report) -> None:
    text = re.sub(r"\s+", "", Reader(report.html()).text)
    assert "runseed0refllearning_rate0.0001lora.rank4" in text


def test_a_report_of_one_model_without_extras_is_whole(pictures: tuple[DrawnImages, DrawnImages]) -> None:
    comparison = compare([score(pictures[0], MEASURES, progress=False)])
    reader = Reader(Report(title="One", lead="Alone.", comparison=comparison).html())
    assert [str(attributes["href"]) for attributes in reader.attributes("a")] == [
        "#results",
        "#numbers",
        "#measuring",
        "#ran",
    ]
    assert "paired difference" not in reader.text


def test_a_report_is_saved_as_one_file(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path / "out" / "report.html")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]
    assert (tmp_path / "out" / "report.html").read_text(encoding="utf-8") == report.html()


def test_the_same_report_is_the_same_page(report: Report) -> None:
    assert report.html() == report.html()


def test_shown_prompts_are_spread_over_all() -> None:
    assert evenly_spaced(range(200), 6) == [0, 40, 80, 119, 159, 199]
    assert evenly_spaced([3, 5], 6) == [3, 5]
    assert evenly_spaced([3, 5], 1) == [3]


def test_pictures_of_other_seeds_are_refused(report: Report, pictures: tuple[DrawnImages, DrawnImages]) -> None:
    before, after = pictures
    other = DrawnImages(
        model="recovered",
        planned=tuple(image._replace(seed=image.seed + 1) for image in after.planned),
        config=after.config,
        stack=after.stack,
    )
    with pytest.raises(ValueError, match=r"pictures must be of the same prompts, .* got others for recovered than for"):
        Report(title="t", lead="l", comparison=report.comparison, pictures=[before, other])


def test_options_out_of_bounds_are_refused(report: Report) -> None:
    with pytest.raises(ValueError, match="pictures_per_kind must be at least 1, got 0"):
        Report(title="t", lead="l", comparison=report.comparison, pictures_per_kind=0)
    with pytest.raises(ValueError, match=r"models must be among \['before', 'recovered'\], got \['afterwards'\]"):
        Report(title="t", lead="l", comparison=report.comparison, models={"afterwards": "?"})
