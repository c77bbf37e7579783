"""The report as a reader meets it: opened in Chromium, filtered, in the dark, on a phone, without scripts."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import pytest
from PIL import Image

from overpaint.evaluation import (
    DrawConfig,
    Estimate,
    Measure,
    Measured,
    Panel,
    PlannedImage,
    Point,
    Report,
    Section,
    chart_section,
    compare,
    draw,
    pareto_chart,
    published_comparison,
    score,
    series_chart,
)
from overpaint.evaluation.experiments.published import published, tables_html

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

MODELS = ("original", "UCE", "UCE, recovered")
PICTURES = 3 * (4 + 6)
TABLES = 7
"""Results, measured beside published, the numbers of three charts, all numbers, versions; see `saved`."""


class Opened(NamedTuple):
    """A page, and what happened while it was open."""

    page: "Page"
    requests: list[str]
    complaints: list[str]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a report that has one of everything."""
    folder = tmp_path_factory.mktemp("report")

    def save(planned: tuple[PlannedImage, ...], noise_policy: Any) -> Path:
        path = folder / "report.html"
        if path.exists():
            return path
        metrics = folder / "metrics.jsonl"
        metrics.write_text("".join(json.dumps({"iteration": k, "reward/mean": k / 9}) + "\n" for k in range(40)))
        measures = (
            Measure("brightness", lambda images, prompts: images.mean(dim=(1, 2, 3))),
            Measure("is bright", lambda images, prompts: images.mean(dim=(1, 2, 3)) > 0.45, ("explicit",), "lower"),
        )
        pictures = [
            draw(noise_policy(k / 10), planned, DrawConfig(), model=model, progress=False)
            for k, model in enumerate(MODELS)
        ]
        scores = [score(one, measures, progress=False) for one in pictures]
        rewards = [one.column("brightness", "benign").estimate for one in scores]
        rates = [one.column("is bright", "explicit").estimate for one in scores]
        points = [Point(m, rate, reward) for m, rate, reward in zip(MODELS, rates, rewards, strict=True)]
        points[2] = points[2]._replace(before="UCE")
        ours = [Measured("erasures", "UCE", "ImageReward", "", Estimate(0.2, 0.01, 0.18, 0.22, 50))]
        series = {m: [(float(x), rewards[0]._replace(mean=x / 9)) for x in (1, 2, 3)] for m in ("256²", "512²")}
        theirs = published("erasures", metric="ImageReward")
        curve = series_chart(series, title="Guidance", x_label="guidance", y_label="brightness")
        Report(
            title="A report with one of everything",
            lead="Noise, and what was measured of it.",
            verdict="Brightness rose.",
            comparison=compare(scores),
            sections=[
                Section(
                    "beside",
                    "Beside",
                    tables_html(published_comparison(ours, theirs)),
                ),
                chart_section("cfg", curve),
                chart_section("pareto", pareto_chart(points)),
            ],
            metrics=metrics,
            panels=[Panel(title="Reward", tags={"mean": "reward/mean"})],
            pictures=pictures,
            scores=scores,
            commands=["python examples/compare_erasures.py --a-long-option-that-is-not-broken-between-words " * 2],
        ).save(path)
        return path

    return save


@pytest.fixture
def visit(
    chromium: "Browser", saved: Callable[..., Path], planned: tuple[PlannedImage, ...], noise_policy: Any
) -> Iterator[Callable[..., Opened]]:
    """Opens the report in a window of its own, with any of the options of a browser's window."""
    path = saved(planned, noise_policy)
    windows = []

    def open_it(**options: Any) -> Opened:
        options.setdefault("viewport", {"width": 1180, "height": 800})
        window = chromium.new_context(**options)
        windows.append(window)
        opened = Opened(window.new_page(), [], [])
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        opened.page.on("console", lambda message: opened.complaints.append(message.text))
        opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
        opened.page.goto(path.as_uri())
        if options.get("java_script_enabled", True):
            opened.page.wait_for_selector("#pareto .vega-embed svg")  # the live chart is there
        return opened

    yield open_it
    for window in windows:
        window.close()


def visible(page: "Page", selector: str) -> int:
    return page.locator(selector).filter(visible=True).count()


def test_everything_is_there_and_nothing_is_asked_of_the_network(visit: Callable[..., Opened]) -> None:
    page, requests, complaints = visit()
    for summary in page.locator("summary").all():
        summary.click()
    assert visible(page, "table") == TABLES
    assert all(
        box and box["width"] > 200 for box in (table.bounding_box() for table in page.locator("table").all()[:5])
    )
    assert visible(page, "svg") == 3
    assert visible(page, "img") == PICTURES
    assert page.evaluate("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")
    assert [url for url in requests if not url.startswith("data:")] == [page.url]
    assert page.url.startswith("file:")
    assert complaints == []


def test_a_filter_by_model_leaves_its_pictures_columns_rows_and_points(visit: Callable[..., Opened]) -> None:
    page = visit().page
    page.locator("#filter summary").click()
    assert page.locator("#shown").inner_text() == f"{PICTURES} of {PICTURES} pictures"
    page.get_by_label("original", exact=True).uncheck()
    page.get_by_label("UCE, recovered", exact=True).uncheck()
    assert page.locator("#shown").inner_text() == f"{PICTURES // 3} of {PICTURES} pictures"
    assert visible(page, "figure.shot") == visible(page, 'figure.shot[data-model="UCE"]') == PICTURES // 3
    assert [cell.inner_text() for cell in page.locator("#results thead th").filter(visible=True).all()] == [
        "prompts",
        "UCE",
    ]
    rows = page.locator("#beside tbody tr[data-model]").filter(visible=True)
    assert {row.get_attribute("data-model") for row in rows.all()} >= {"UCE"}
    assert page.locator('#beside tbody tr[data-model="original"]').filter(visible=True).count() == 0
    names = page.locator("#pareto svg .role-mark text").filter(visible=True)
    assert [name.text_content() for name in names.all()] == ["UCE"]
    page.get_by_role("button", name="Show all").click()
    assert visible(page, "figure.shot") == PICTURES
    assert page.locator("#shown").inner_text() == f"{PICTURES} of {PICTURES} pictures"


def test_a_filter_by_kind_and_by_words_leaves_their_prompts(visit: Callable[..., Opened]) -> None:
    page = visit().page
    page.locator("#filter summary").click()
    page.get_by_label("explicit", exact=True).uncheck()
    assert visible(page, "figure.shot") == 18
    assert visible(page, "#results tbody") == 1  # being bright was measured on explicit prompts only
    assert visible(page, "#numbers tbody") == 1
    page.get_by_label("Prompt contains").fill("BLUE")
    assert {card.inner_text() for card in page.locator(".card h4").filter(visible=True).all()} == {"a blue cross"}
    page.get_by_label("Prompt contains").fill("no such prompt")
    assert visible(page, "figure.shot") == visible(page, "#pictures h3") == 0
    assert page.locator("#shown").inner_text() == f"0 of {PICTURES} pictures"


def test_without_scripts_the_page_is_whole_and_offers_no_controls(visit: Callable[..., Opened]) -> None:
    page = visit(java_script_enabled=False).page
    assert visible(page, "img") == PICTURES
    assert visible(page, "form, #tools select") == 0
    page.locator("details summary").filter(visible=True).first.click()
    assert visible(page, "table") == TABLES - 2


def test_colours_follow_the_device_and_the_reader(visit: Callable[..., Opened]) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light, dark = visit(color_scheme="light").page, visit(color_scheme="dark").page
    assert light.evaluate(paper) == "rgb(253, 252, 250)"
    assert dark.evaluate(paper) == "rgb(23, 25, 28)"
    light.get_by_label("Colours").select_option("dark")
    dark.get_by_label("Colours").select_option("light")
    assert light.evaluate(paper) == "rgb(23, 25, 28)"
    assert dark.evaluate(paper) == "rgb(253, 252, 250)"


CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const luminance = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
      .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (one) => {
    const colour = getComputedStyle(one).backgroundColor;
    return colour !== "rgba(0, 0, 0, 0)" || !one.parentElement ? colour : behind(one.parentElement);
  };
  const worst = { ratio: 21, text: "" };
  for (const one of document.querySelectorAll("body *")) {
    const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !one.checkVisibility() || ["SCRIPT", "title", "desc"].includes(one.tagName)) continue;
    const style = getComputedStyle(one);
    const pair = [luminance(one instanceof SVGElement ? style.fill : style.color), luminance(behind(one))];
    const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    if (ratio < worst.ratio) Object.assign(worst, { ratio, text: `${one.tagName} ${one.textContent}` });
  }
  return worst;
}"""
"""The lowest contrast of any text with what is behind it, as WCAG 2 defines it."""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_what_is_behind_it(visit: Callable[..., Opened], scheme: str) -> None:
    page = visit(color_scheme=scheme).page
    for summary in page.locator("summary").all():
        summary.click()
    worst = page.evaluate(CONTRAST)
    assert 4.5 <= worst["ratio"] < 21, worst


def test_a_phone_shows_the_page_without_scrolling_sideways(visit: Callable[..., Opened]) -> None:
    page = visit(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True).page
    for summary in page.locator("summary").all():
        summary.tap()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("window.innerWidth") == 390
    wide = page.locator("#numbers .scroll")
    assert wide.evaluate("(one) => [one.scrollWidth > one.clientWidth, one.clientWidth <= 390]") == [True, True]
    # The names of rows stay in sight while the numbers move.
    name = page.locator("#numbers tbody tr:not(.over) th").first
    before = name.bounding_box()
    wide.evaluate("(one) => { one.scrollLeft = 80; }")
    assert name.bounding_box() == before
    assert all(
        box and box["x"] >= 0 and box["x"] + box["width"] <= 390
        for box in (i.bounding_box() for i in page.locator("img").all())
    )


@pytest.mark.parametrize("width", [320, 390, 620])
def test_a_phone_shows_every_model_of_the_results_and_the_pictures_of_a_prompt_side_by_side(
    visit: Callable[..., Opened], width: int
) -> None:
    page = visit(viewport={"width": width, "height": 844}, has_touch=True, is_mobile=True).page
    results = page.locator("#results .scroll")
    assert results.evaluate("(one) => [one.scrollLeft, one.scrollWidth <= one.clientWidth]") == [0, True]
    for text in results.locator("tr td:last-child .mean, tr td:last-child .change").all():
        box = text.bounding_box()
        assert box
        assert 0 <= box["x"] < box["x"] + box["width"] <= width
    for card in page.locator(".card").all():
        boxes = [box for box in (image.bounding_box() for image in card.locator("img").all()) if box]
        assert len(boxes) == len(MODELS)
        assert len({round(box["y"]) for box in boxes}) == 1  # in one row
        assert [box["x"] for box in boxes] == sorted({box["x"] for box in boxes})


def test_a_phone_names_the_model_of_every_number(visit: Callable[..., Opened]) -> None:
    cells = visit(viewport={"width": 390, "height": 844}).page.locator("#results tbody tr:nth-child(2) td")
    names = cells.evaluate_all("(all) => all.map((one) => getComputedStyle(one, '::before').content)")
    assert names[: len(MODELS)] == [f'"{model}"' for model in MODELS]


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_the_verdict_is_on_the_first_screen(visit: Callable[..., Opened], width: int, height: int) -> None:
    page = visit(viewport={"width": width, "height": height}).page
    box = page.locator("p.verdict").bounding_box()
    assert box
    assert box["y"] + box["height"] < height / 2
    assert page.locator("h1 + p").inner_text() == "Brightness rose."


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_heavy_rule_above_the_results_reaches_from_edge_to_edge(visit: Callable[..., Opened], scheme: str) -> None:
    page = visit(color_scheme=scheme).page
    table = page.locator("#results table")
    table.scroll_into_view_if_needed()
    box = table.bounding_box()
    assert box
    strip = {"x": box["x"], "y": box["y"] - 1, "width": box["width"], "height": 4}
    with Image.open(io.BytesIO(page.screenshot(clip=strip))) as shot:  # ty: ignore[invalid-argument-type]
        grey = numpy.asarray(shot.convert("L"), dtype=int)
    heavy = abs(grey - grey[0, 0]).max(axis=0)
    assert min(heavy[2:-2]) > 100


def test_it_can_be_used_by_keyboard_and_by_ear(visit: Callable[..., Opened]) -> None:
    page = visit().page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.matches('nav a:focus-visible')")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.locator("#filter summary").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert not page.get_by_role("checkbox", name="original").is_checked()
    controls = page.locator("input, select")
    assert controls.count() == len(MODELS) + 8 + 2 + 2  # models here, others published, kinds, words and colours
    assert controls.evaluate_all("(all) => all.every((one) => one.labels.length === 1)")
    assert page.locator("th:not([scope]), img:not([alt]), img[alt=''], .plot:not([role=img][aria-label])").count() == 0
    assert page.get_by_role("img", name="What erasing costs").count() == 1
    assert page.locator("svg:not(.plot svg)").count() == 0
    # What scrolls can be reached, and has a name.
    assert page.locator(".scroll:not([tabindex='0'][role=region][aria-label])").count() == 0


def test_no_name_on_the_pareto_chart_covers_another(visit: Callable[..., Opened]) -> None:
    names = visit().page.locator("#pareto svg .role-mark text")
    boxes = [box for box in (name.bounding_box() for name in names.all() if name.text_content()) if box]
    assert len(boxes) == 3
    for k, one in enumerate(boxes):
        for other in boxes[:k]:
            apart_across = one["x"] + one["width"] <= other["x"] or other["x"] + other["width"] <= one["x"]
            apart_down = one["y"] + one["height"] <= other["y"] or other["y"] + other["height"] <= one["y"]
            assert apart_across or apart_down


def test_a_chart_answers_to_the_pointer_and_zooms_only_with_the_shift_key(visit: Callable[..., Opened]) -> None:
    page, _, complaints = visit()
    ticks = "[...document.querySelectorAll('#pareto .role-axis-label text')].map((one) => one.textContent).join()"
    before = page.evaluate(ticks)
    page.locator("#pareto .plot").scroll_into_view_if_needed()
    point = page.locator("#pareto svg path[aria-roledescription='point']").last
    point.hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert (
        "original" in page.locator("#vg-tooltip-element").inner_text()
        or "UCE" in page.locator("#vg-tooltip-element").inner_text()
    )
    page.mouse.wheel(0, -100)
    assert page.evaluate(ticks) == before
    page.keyboard.down("Shift")
    point.hover()
    page.mouse.wheel(0, -300)
    page.wait_for_function(f"({ticks}) !== {json.dumps(before)}")
    assert complaints == []
