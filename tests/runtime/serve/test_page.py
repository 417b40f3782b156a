"""The page in headless Chromium: it types, streams, stops, retries, and complains of nothing."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import cvxq
import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="drives the browser")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PHONE = {"width": 360, "height": 640}
ANSWER = "Here is some code:\n```py\nprint(1 < 2)\n```\nand <b>no markup</b>."


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium or Chrome is installed")
    with sync_api.sync_playwright() as driver:
        options = ["--no-sandbox"] if os.getuid() == 0 else []
        started = driver.chromium.launch(executable_path=found, args=options)
        yield started
        started.close()


@pytest.fixture
def page(browser: Any, tiny: Any) -> Iterator[Any]:
    """The page of the tiny model; whatever the browser complains of fails the test."""
    context = browser.new_context(viewport=PHONE)
    opened = context.new_page()
    complaints: list[str] = []
    requests: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", lambda request: requests.append(request.url))
    opened.goto(tiny.url)
    sync_api.expect(opened.get_by_text("Ask something.")).to_be_visible()
    yield opened
    context.close()
    assert complaints == []
    assert all(url.startswith((tiny.url, "data:")) for url in requests)


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch, recite: Callable[[cvxq.Model, str], None]) -> Any:
    """Return `recite`, with 10 ms between two tokens."""
    import time

    from cvxq.stream import TextStream

    push = TextStream.push

    def pushed(self: TextStream, token: int) -> str:
        time.sleep(0.01)
        return push(self, token)

    monkeypatch.setattr(TextStream, "push", pushed)
    return recite


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press("Enter")


def test_an_answer_streams_and_can_be_retried(page: Any, tiny: Any, recite: Any) -> None:
    recite(tiny.served.model, "<think>Let me see.</think>" + ANSWER)
    ask(page, "Show me")
    answer = page.locator(".assistant")
    sync_api.expect(answer.get_by_text(re.compile(r"\d+ tokens, .* per second"))).to_be_visible()
    assert page.locator(".user").inner_text() == "Show me"
    assert answer.locator("pre").inner_text() == "print(1 < 2)"
    assert "<b>no markup</b>" in answer.locator(".text").inner_text()
    answer.get_by_text("Thinking").click()
    sync_api.expect(answer.get_by_text("Let me see.")).to_be_visible()
    recite(tiny.served.model, "Something else.")
    answer.get_by_role("button", name="Retry").click()
    sync_api.expect(page.locator(".assistant .text")).to_have_text("Something else.")
    assert page.locator(".user").count() == 1


def test_an_answer_can_be_stopped(page: Any, tiny: Any, slowly: Any, until: Any) -> None:
    slowly(tiny.served.model, "On and on. " * 150)
    ask(page, "Go on")
    sync_api.expect(page.locator(".assistant .text")).to_contain_text("On and on.")
    page.get_by_role("button", name="Stop").click()
    sync_api.expect(page.get_by_text("stopped")).to_be_visible()
    assert until(tiny.is_idle) < 1
    sync_api.expect(page.get_by_role("button", name="Send")).to_be_visible()
    page.get_by_role("button", name="New chat").click()
    assert page.locator(".assistant").count() == 0


def test_settings_go_into_requests_and_stay(page: Any, tiny: Any) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Instructions").fill("Be brief.")
    page.get_by_label("Most tokens").fill("4")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Colors").select_option("dark")
    page.get_by_role("button", name="Done").click()
    ground = "getComputedStyle(document.body).backgroundColor"
    sync_api.expect(page.locator(":root")).to_have_attribute("data-theme", "dark")
    assert page.evaluate(ground) == "rgb(23, 24, 26)"
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "Hi")
    body = sent.value.post_data_json
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["max_tokens"], body["seed"], body["temperature"]) == (4, 7, 0.7)
    sync_api.expect(page.get_by_text(re.compile("4 tokens, .* cut"))).to_be_visible()
    page.reload()
    page.get_by_role("button", name="Settings").click()
    assert page.get_by_label("Instructions").input_value() == "Be brief."
    assert page.evaluate(ground) == "rgb(23, 24, 26)"


def test_everything_fits_a_phone(page: Any, tiny: Any, recite: Any) -> None:
    recite(tiny.served.model, "word" * 200 + "\n```\n" + "x" * 300 + "\n```")
    ask(page, "long " * 100)
    sync_api.expect(page.get_by_text(re.compile("per second"))).to_be_visible()
    wide = "document.documentElement.scrollWidth"
    assert page.evaluate(wide) == PHONE["width"]
    for name in ("Send", "New chat", "Settings"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box["height"] >= 40
        assert 0 <= box["x"] <= box["x"] + box["width"] <= PHONE["width"]
        assert box["y"] + box["height"] <= PHONE["height"]


def test_a_key_is_asked_for_and_errors_are_shown(
    browser: Any, model: Any, serve: Any, recite: Any
) -> None:
    recite(model, ANSWER)
    with serve(model, keys=["secret"]) as tiny:
        page = browser.new_page(viewport=PHONE)
        page.goto(tiny.url)
        sync_api.expect(page.get_by_text("API key is missing or wrong")).to_be_visible()
        page.get_by_role("button", name="Settings").click()
        page.get_by_label("API key").fill("secret")
        page.get_by_label("Most tokens").fill("5")
        page.get_by_role("button", name="Done").click()
        sync_api.expect(page.get_by_label("Model")).to_have_value("tiny")
        ask(page, "Hi")
        sync_api.expect(page.get_by_text(re.compile("5 tokens"))).to_be_visible()
        ask(page, "a" * 3000)
        sync_api.expect(page.locator(".wrong")).to_contain_text("context of 2048")
        page.close()
