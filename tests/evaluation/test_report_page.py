import base64
import io
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from evaluation import DrawConfig, DrawnImages, Measure, Panel, PlannedImage, Report, compare, draw, score
from evaluation.figures import evenly_spaced
from policy.types import Images

Planned = tuple[PlannedImage, ...]
VOID = {"meta", "img", "line", "path", "circle", "br"}


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

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
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
        "".join(json.dumps({"iteration": k, "reward/mean": k / 10, "erasure/cost": -k / 10}) + "\n" for k in range(40)),
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
            Panel(title="Reward", tags={"learned": "reward/mean", "true": "reward/true"}, references={"before": 1.5}),
            Panel(title="Cost", tags={"cost": "erasure/cost"}, caption="At or below zero the concept is gone."),
            Panel(title="Nothing", tags={"nothing": "no/such"}),
        ],
        commands=["accelerate launch examples/refl_erase_nudity.py --title <i>it</i>"],
        settings={"seed": 0, "refl": {"learning_rate": 1e-4, "lora": {"rank": 4}}},
        notes=["Means are of the policy after training, <not> of the batch."],
    )


def test_the_table_shows_means_errors_and_paired_differences(report: Report) -> None:
    text = Reader(report.html()).text.replace("\n", " ")
    for row in report.comparison.rows:
        for estimate in row.estimates:
            assert f"{estimate.mean:.3f} ± {estimate.error:.3f}" in text
    assert "+0.200 ± 0.000 (better)" in text  # brightness rises by the shift, for every image alike
    assert "(worse)" in text  # and being bright counts as worse
    assert "bright<ness>" in text
    assert "in 7 denoising steps with guidance scale 5" in text


def test_every_number_is_listed_with_its_interval(report: Report) -> None:
    text = Reader(report.html()).text
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
        (source.planned[place], source.model, source.pixels([place])[0])
        for part in (places[:3], places[3:])
        for source in pictures
        for place in part
    ]
    assert len(images) == len(expected) == 12
    for attributes, (planned, model, pixels) in zip(images, expected, strict=True):
        assert attributes["alt"] == f"{model}: {planned.prompt}"
        content = str(attributes["src"]).removeprefix("data:image/png;base64,")
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            shown = torch.tensor(list(image.tobytes()), dtype=torch.uint8).reshape(8, 8, 3)
        assert torch.equal(shown.permute(2, 0, 1), pixels)


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(report: Report) -> None:
    page = report.html()
    reader = Reader(page)
    without_pictures = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", without_pictures)
    for tag, attributes in reader.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed"}
        assert str(attributes.get("src", "data:")).startswith("data:")
        assert str(attributes.get("href", "#")).startswith("#")
        assert not any(name.startswith("on") for name in attributes)


def test_links_within_the_page_have_targets(report: Report) -> None:
    reader = Reader(report.html())
    targets = {attributes["id"] for _, attributes in reader.tags if "id" in attributes}
    links = [str(attributes["href"]).removeprefix("#") for attributes in reader.attributes("a")]
    assert links == ["results", "curves", "pictures", "numbers", "measuring", "settings"]
    assert set(links) <= targets


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
    charts = reader.attributes("svg")
    assert [chart["aria-label"] for chart in charts] == [
        "Reward. learned: 0 at iteration 0, 3.9 at iteration 39",
        "Cost. cost: 0 at iteration 0, -3.9 at iteration 39",
    ]
    assert "At or below zero the concept is gone." in reader.text
    assert reader.text.count("Not logged in this run.") == 1


def test_settings_within_settings_get_a_table_and_dotted_names(report: Report) -> None:
    text = re.sub(r"\s+", "", Reader(report.html()).text)
    assert "runseed0refllearning_rate0.0001lora.rank4" in text


def test_a_report_of_one_model_without_extras_is_whole(pictures: tuple[DrawnImages, DrawnImages]) -> None:
    comparison = compare([score(pictures[0], MEASURES, progress=False)])
    reader = Reader(Report(title="One", lead="Alone.", comparison=comparison).html())
    assert [str(attributes["href"]) for attributes in reader.attributes("a")] == ["#results", "#numbers", "#measuring"]
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
