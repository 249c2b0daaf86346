"""The page in a browser: what a person does with it, and what a model's output must not do to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lm_eval_steering.report.page import Report, render
from lm_eval_steering.report.read import ItemOutput, Samples
from lm_eval_steering.report.tables import Results

SCHEMES, WIDTHS = ("light", "dark"), (1400, 420)


@pytest.fixture
def page(browser: Any, report: Report) -> Iterator[Any]:
    """The open page; at the end it must have logged nothing and requested nothing."""
    opened = browser.new_page(viewport={"width": 1400, "height": 900})
    said: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(report.page.as_uri())
    opened.wait_for_selector("#table tbody tr")
    opened.wait_for_selector("#items .item")
    yield opened
    assert said == []
    assert [url for url in asked if not url.startswith(("data:", report.page.as_uri()))] == []
    opened.close()


def shows(page: Any, place: str, text: str) -> None:
    """Wait until an element shows a text; the page's policy allows no evaluated condition."""
    page.locator(place, has_text=text).wait_for()


def column(page: Any, name: str) -> list[str]:
    heads = page.locator("#table th button").all_inner_texts()
    place = heads.index(name) + 1
    return page.locator(f"#table tbody td:nth-child({place})").all_inner_texts()


def test_tables_sort_by_numbers_both_ways_with_blanks_last(page: Any) -> None:
    page.get_by_role("tab", name="Every cell").click()
    head = page.get_by_role("button", name="difference", exact=True)
    for down in (False, True):
        head.click()
        numbers = [float(text) for text in column(page, "difference") if text]
        assert len(numbers) > 20
        assert numbers == sorted(numbers, reverse=down)
    assert page.locator('th[aria-sort="descending"] button').inner_text() == "difference"


def test_tables_filter_by_all_words(page: Any) -> None:
    page.get_by_role("tab", name="Every cell").click()
    page.fill("#filter", "THA_Thai acc")
    assert set(column(page, "metric")) == {"acc"}
    assert all("tha_Thai" in pair for pair in zip(column(page, "steered"), column(page, "evaluated"), strict=True))
    page.fill("#filter", "no such word")
    assert page.locator("#table tbody tr").count() == 0


def test_tabs_are_used_by_keyboard(page: Any) -> None:
    page.get_by_role("tab", name="Self and cross").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator('[role=tab][aria-selected="true"]').inner_text() == "Every cell"


def test_the_explorer_pages_searches_and_picks_by_language(page: Any) -> None:
    assert page.locator("#items .item").count() == 10
    first = page.locator("#items .item small").first.inner_text()
    page.locator("#sample-pager").get_by_role("button", name="Next").click()
    shows(page, "#sample-pager span", "page 2 of 6")
    assert page.locator("#items .item small").first.inner_text() != first
    page.fill("#search", "prompt 37")
    shows(page, "#found", "1 of 60 prompts")
    assert page.locator("#items mark").first.inner_text().lower() == "prompt 37"
    page.fill("#search", "")
    page.select_option("#steered", "tha_Thai")
    page.select_option("#verdict", "s")
    shows(page, "#found", "40 of 60 prompts")
    assert page.locator("#items .pill.s").first.inner_text() == "Thai"


def test_outputs_are_shown_with_the_baseline_by_factor(page: Any) -> None:
    heads = page.locator("#items .item").first.locator(".output header b").all_inner_texts()
    assert heads == ["baseline", "×2", "×4"]


def test_text_from_right_to_left_is_shown_so(page: Any) -> None:
    page.fill("#search", "الطقس")
    page.wait_for_selector("mark")
    text = page.locator(".text", has_text="الطقس").first
    assert text.get_attribute("dir") == "auto"
    assert text.evaluate("node => getComputedStyle(node).direction") == "rtl"


def test_what_a_model_wrote_does_no_harm(page: Any) -> None:
    page.fill("#search", "window.harm")
    page.wait_for_selector("mark")
    assert page.evaluate("window.harm") is None
    assert page.locator("#items script, #items img").count() == 0
    shown = page.locator(".output .text", has_text="window.harm").first
    assert "<script>" in shown.inner_text()
    assert shown.locator(".control").all_inner_texts() == ["U+202E", "U+202C", "U+2066", "U+2069"]


def test_the_policy_stops_a_script_that_got_in(browser: Any, report: Report, tmp_path: Any) -> None:
    broken = tmp_path / "broken.html"
    text = report.page.read_text(encoding="utf-8")
    broken.write_text(text.replace("<main>", "<main><script>window.harm = 3</script>"), encoding="utf-8")
    page = browser.new_page()
    page.goto(broken.as_uri())
    page.wait_for_selector("#table tbody tr")
    assert page.evaluate("window.harm") is None
    page.close()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_and_shows_the_figures_of_its_theme(
    browser: Any, report: Report, scheme: str, width: int
) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(report.page.as_uri())
    page.wait_for_selector("#items .item")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    visible = [image for image in page.locator(".plot img").all() if image.is_visible()]
    assert visible
    assert {image.get_attribute("class") for image in visible} == {scheme}
    assert all(image.evaluate("node => node.complete && node.naturalWidth > 0") for image in visible)
    page.get_by_role("button", name="Switch between light and dark").click()
    assert page.evaluate("document.documentElement.dataset.theme") != scheme
    page.close()


def test_a_hundred_thousand_outputs_stay_usable(browser: Any, results: Results, tmp_path: Path) -> None:
    found = results.sweep.samples
    each = 100_000 // len(found.outputs) + 1
    prompts = {key: {doc: f"prompt {doc} of many" for doc in range(each)} for key in found.prompts}
    outputs = {
        cell: [ItemOutput(doc, f"{own[doc % len(own)].text} and {doc} more words", own[doc % len(own)].language)
               for doc in range(each)]
        for cell, own in found.outputs.items()
    }  # fmt: skip
    samples = Samples(prompts, outputs)
    assert samples.count >= 100_000
    path = tmp_path / "many.html"
    path.write_text(render(replace(results, sweep=replace(results.sweep, samples=samples)), []), encoding="utf-8")
    assert path.stat().st_size < 30e6
    page = browser.new_page()
    started = time.perf_counter()
    page.goto(path.as_uri())
    page.wait_for_selector("#items .item")
    page.fill("#search", f"prompt {each - 1} of")
    shows(page, "#found", f"1 of {each:,} prompts")
    assert time.perf_counter() - started < 20  # seconds; 3 on an idle core
    assert page.locator("#items .item").count() == 1
    page.close()
