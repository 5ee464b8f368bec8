"""The chat page in Chromium: by keyboard, for screen readers, in both languages, on narrow screens, in both lights."""

from __future__ import annotations

import re
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from engine.chatting import DISCLAIMER
from engine.serving.page import load_page
from tests.engine.serving.live import NAME, Live
from tests.engine.serving.page.chat import Chat, Dictation
from tests.engine.serving.page.conftest import Open

QUESTION = "头晕怎么办？"
WIDE = "a" * 200 + "\n\n    x = " + "9" * 120 + "\n\n| 检查 | " + "参考范围 | " * 30 + "\n|---|" + "---|" * 60


def focused(page: Page) -> str:
    """What has the focus, by its name."""
    return page.evaluate("""() => {
        const node = document.activeElement;
        return node.labels?.length ? node.labels[0].querySelector("span")?.textContent ?? node.labels[0].textContent
            : node.textContent.trim();
    }""")


def has_visible_focus(page: Page) -> bool:
    """An outline, or the frame of what to write in."""
    return page.evaluate("""() => {
        const node = document.activeElement, style = getComputedStyle(node);
        const frame = node.id === "question" ? getComputedStyle(node.parentElement).boxShadow !== "none" : false;
        return frame || (style.outlineStyle === "solid" && parseFloat(style.outlineWidth) >= 2);
    }""")


def tab_through(page: Page, stops: int) -> list[str]:
    names = []
    for _ in range(stops):
        page.keyboard.press("Tab")
        names.append(focused(page))
        assert has_visible_focus(page), names[-1]
    return names


def test_all_can_be_done_by_keyboard(chat: Chat, dictation: Dictation) -> None:
    page, keyboard = chat.page, chat.page.keyboard
    assert focused(page) == "问题" and has_visible_focus(page)
    page.locator("h1").click()  # where the tabulator begins
    examples = page.locator("#examples button").all_text_contents()
    assert tab_through(page, 8) == ["新对话", "设置", "English", *examples, "问题", "发送"]

    chat.button("设置").focus()
    keyboard.press("Enter")
    assert focused(page) == "系统提示词"
    fields = ["温度（temperature）", "核采样（top_p）", "最长回答（max_tokens）", "随机种子（seed）"]
    assert tab_through(page, 7) == [*fields, "恢复默认", "取消", "完成"]
    keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    assert focused(page) == "设置"

    dictation.say(["建议", "休息。"], allowed=1)
    chat.question.focus()
    keyboard.type("头晕")
    keyboard.press("Shift+Enter")
    keyboard.type("怎么办？")
    expect(page.locator("article")).to_have_count(0)
    keyboard.press("Enter")
    expect(chat.answer).to_have_text("建议")
    assert chat.asked[0]["messages"][0]["content"] == "头晕\n怎么办？"
    assert focused(page) == "问题"
    assert tab_through(page, 1) == ["停止"]
    dictation.let(1)
    expect(chat.button("停止")).to_be_hidden()
    assert focused(page) == "问题"  # and not nowhere, with the button that went away


def test_enter_that_ends_a_composition_does_not_send(chat: Chat, dictation: Dictation) -> None:
    """As with an input method for Chinese: what is composed is shown, Enter accepts it, and only the next one sends."""
    chat.question.focus()
    browser = chat.context.new_cdp_session(chat.page)
    browser.send("Input.imeSetComposition", {"text": "touyun", "selectionStart": 6, "selectionEnd": 6})
    expect(chat.question).to_have_value("touyun")
    chat.page.keyboard.press("Enter")
    browser.send("Input.insertText", {"text": "头晕"})
    expect(chat.question).to_have_value(re.compile("头晕"))
    expect(chat.page.locator("article")).to_have_count(0)
    # Where the composition is over before the key is told, its code still says whose it was.
    chat.question.dispatch_event("keydown", {"key": "Enter", "keyCode": 229, "bubbles": True})
    expect(chat.page.locator("article")).to_have_count(0)
    dictation.say(["好。"])
    chat.question.press("Enter")
    expect(chat.answer).to_have_text("好。")
    assert len(chat.asked) == 1


def test_whole_sentences_are_read_out_once_each(chat: Chat, dictation: Dictation) -> None:
    spoken = chat.page.get_by_role("log")
    assert spoken.get_attribute("aria-live") == "polite"
    pieces = ["建议", "休息。多", "喝水。\n", "复查", "血压"]
    dictation.say(pieces, allowed=1)
    chat.ask(QUESTION)
    expect(chat.answer).to_have_text("建议")
    expect(spoken.locator("p")).to_have_count(0)
    dictation.let(1)
    expect(spoken.locator("p")).to_have_text(["建议休息。"])
    dictation.let(2)
    expect(spoken.locator("p")).to_have_text(["建议休息。", "多喝水。"])
    dictation.let(1)
    expect(spoken.locator("p")).to_have_text(["建议休息。", "多喝水。", "复查血压"])
    live_parts = "[aria-live], [role=log], [role=status]"
    assert chat.page.locator(live_parts).count() == 1, "what grows on the page is not read out beside it"


@pytest.mark.parametrize(("language", "shown"), [("zh-CN", "zh"), ("en-GB", "en"), ("de-DE", "zh")])
def test_the_page_speaks_the_browsers_language_or_the_one_that_was_chosen(
    open_page: Open, live: Live, dictation: Dictation, language: str, shown: str
) -> None:
    chat = open_page(live, language=language)
    root, send = chat.page.locator("html"), chat.page.locator("#send")
    dictation.say(["好。"])
    chat.ask(QUESTION)
    expect(chat.facts).to_contain_text("token")
    says = {"zh": ("zh-CN", "发送", "提示", "English"), "en": ("en", "Send", "tokens of prompt", "中文")}
    for which in shown, {"zh": "en", "en": "zh"}[shown]:
        code, name, usage, other = says[which]
        expect(root).to_have_attribute("lang", code)
        expect(send).to_have_text(name)
        expect(chat.facts).to_contain_text(usage)
        expect(chat.answer).to_have_attribute("lang", "zh-CN")
        if which == shown:
            chat.button(other).click()
    chat.page.reload()
    expect(root).to_have_attribute("lang", code)


def test_both_languages_say_everything(chat: Chat) -> None:
    chinese, english = chat.page.evaluate("[Object.keys(TEXTS.zh), Object.keys(TEXTS.en)]")
    assert chinese == english
    page, _ = load_page()
    used = re.findall(r'data-t="(\w+)"', page)
    assert set(used) <= set(chinese) and len(used) > 20


def test_the_disclaimer_is_always_in_sight(open_page: Open, live: Live, dictation: Dictation) -> None:
    english, chinese = DISCLAIMER.splitlines()
    for language, text in ("zh-CN", chinese), ("en-US", english):
        for size in {"width": 1280, "height": 800}, {"width": 320, "height": 568}:
            chat = open_page(live, language=language, viewport=size)
            disclaimer = chat.page.get_by_text(text, exact=True)
            expect(disclaimer).to_be_in_viewport(ratio=1)
            dictation.say(["很长的回答。\n\n"] * 40)
            chat.ask(QUESTION)
            expect(chat.facts).to_contain_text("token")
            expect(disclaimer).to_be_in_viewport(ratio=1)
            expect(chat.facts).to_be_in_viewport()  # the end of the answer was followed
            chat.page.keyboard.press("Control+Home")
            chat.page.evaluate("scrollTo(0, 0)")
            expect(disclaimer).to_be_in_viewport(ratio=1)


def test_a_reader_who_scrolled_up_is_left_there(chat: Chat, dictation: Dictation) -> None:
    dictation.say(["很长的回答。\n\n"] * 60, allowed=40)
    chat.ask(QUESTION)
    expect(chat.answer.locator("p")).to_have_count(41)
    assert chat.page.evaluate("scrollY") > 500
    chat.page.evaluate("scrollTo(0, 100)")
    dictation.let(20)
    expect(chat.facts).to_contain_text("token")
    assert chat.page.evaluate("scrollY") == 100


@pytest.mark.parametrize("language", ["zh-CN", "en-US"])
@pytest.mark.parametrize("width", [320, 1280])
def test_nothing_is_wider_than_the_screen(
    open_page: Open, live: Live, dictation: Dictation, width: int, language: str
) -> None:
    chat = open_page(live, language=language, viewport={"width": width, "height": 640})
    dictation.say([WIDE])
    chat.ask("a" * 100)
    expect(chat.facts).to_contain_text("token")
    chat.page.route(
        "**/v1/chat/completions", lambda route: route.fulfill(status=400, json={"error": {"message": WIDE}})
    )
    chat.ask(QUESTION)
    expect(chat.error).to_be_visible()
    assert chat.page.evaluate("document.documentElement.scrollWidth") <= width
    chat.page.locator("#open").click()
    beyond = """width => [...document.querySelectorAll("body *")].filter(node => {
        const box = node.getBoundingClientRect();
        return box.width > 1 && (box.right > width + 0.5 || box.left < -0.5 || node.scrollWidth > node.clientWidth + 1
            && !["inline", "contents"].includes(getComputedStyle(node).display));
    }).map(node => node.outerHTML.slice(0, 80))"""
    assert chat.page.evaluate(beyond, width) == []


def test_a_screen_of_few_lines_is_not_filled_by_what_stands_still(open_page: Open, live: Live) -> None:
    """1280 x 1024 at 400 %."""
    chat = open_page(live, viewport={"width": 320, "height": 256})
    assert chat.page.evaluate("getComputedStyle(document.querySelector('header')).position") == "static"
    assert chat.page.evaluate("getComputedStyle(document.querySelector('footer')).position") == "static"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(open_page: Open, live: Live, scheme: Any) -> None:
    """Contrast of at least 4.5; 3 for the edges of what can be pressed or filled in (WCAG 2.2, 1.4.3 and 1.4.11)."""
    chat = open_page(live, color_scheme=scheme)
    names = ["ground", "paper", "ink", "soft", "edge", "accent", "on-accent", "said", "bad", "bad-ground"]
    colors = chat.page.evaluate(
        """names => Object.fromEntries(names.map(name => {
            const canvas = document.createElement("canvas").getContext("2d");
            canvas.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("--" + name);
            return [name, canvas.fillStyle];
        }))""",
        names,
    )
    assert (luminance(colors["ground"]) < 0.2) == (scheme == "dark")
    texts = "ink ground, ink paper, ink said, ink bad-ground, soft ground, soft paper, accent ground, accent paper"
    for pair in f"{texts}, on-accent accent, bad bad-ground".split(", "):
        assert contrast(*(colors[name] for name in pair.split())) >= 4.5, pair
    for pair in "edge ground", "edge paper", "accent ground":
        assert contrast(*(colors[name] for name in pair.split())) >= 3, pair


def luminance(color: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize(("motion", "moves"), [("no-preference", True), ("reduce", False)])
def test_nothing_moves_for_those_who_ask_for_that(
    open_page: Open, live: Live, dictation: Dictation, motion: Any, moves: bool
) -> None:
    chat = open_page(live, reduced_motion=motion)
    dictation.say(["建议", "休息"], allowed=1)
    chat.ask(QUESTION)
    expect(chat.answer).to_have_text("建议")
    caret = "getComputedStyle(document.querySelector('.answer p'), '::after').animationName"
    assert (chat.page.evaluate(caret) != "none") == moves
    dictation.let(1)


def test_no_other_script_runs_and_nobody_else_can_be_asked(open_page: Open, live: Live) -> None:
    chat = open_page(live)
    expect(chat.page.locator("#model")).to_have_text(NAME)
    chat.page.evaluate("""() => {
        const script = document.createElement("script");
        script.textContent = "window.hit = 1";
        document.body.append(script);
        document.body.insertAdjacentHTML("beforeend", "<i onclick='window.hit = 2' style='color: red'></i>");
        document.querySelector("i").click();
    }""")
    assert chat.page.evaluate("window.hit") is None
    assert chat.page.evaluate("fetch('http://127.0.0.2:1/').then(() => 'sent', () => 'refused')") == "refused"
    refused = [text for text in chat.complaints if "Content Security Policy" in text]
    assert len(refused) >= 4, chat.complaints
    chat.complaints.clear()
    chat.requests = [request for request in chat.requests if "127.0.0.2" not in request.url]
