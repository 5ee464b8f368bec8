"""The chat page in Chromium: asking, streaming, stopping, beginning anew, and what goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.engine.serving.live import NAME, Alone, Live, served, wait_for
from tests.engine.serving.page.chat import Chat, Dictation, dictated
from tests.engine.serving.page.conftest import Open

QUESTION = "头晕怎么办？"
PIECES = ["建议", "先到内科就诊。\n", "1. 量血压；\n\n", "2. 查血", "常规。"]


def test_a_question_is_answered_as_the_generator_answers_it(chat: Chat, live: Live, alone: Alone) -> None:
    expect(chat.page.locator("h1")).to_have_text(f"ChiMed{NAME}")
    chat.set(temperature=0, max_tokens=12)
    chat.ask(QUESTION)
    expect(chat.facts).to_contain_text("token")
    assert chat.answer.text_content() == alone.chat(QUESTION, 12)
    whole = live.client().chat.completions.create(
        model=NAME, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=12
    )
    used = whole.usage
    assert chat.facts.text_content() == (
        f"提示 {used.prompt_tokens} + 回答 12 token，上下文已用 {used.total_tokens}\xa0/\xa0256"
    )
    expect(chat.page.locator(".cut")).to_have_text("回答达到长度上限，可能没有写完。")
    expect(chat.page.locator(".cut")).to_be_visible()


def test_the_text_grows_before_the_answer_ends(chat: Chat, dictation: Dictation) -> None:
    dictation.say(PIECES, allowed=0)
    chat.ask(QUESTION)
    expect(chat.facts).to_have_text("等待回答…")
    expect(chat.button("停止")).to_be_visible()
    expect(chat.button("发送")).to_be_hidden()
    for number in range(1, len(PIECES)):
        dictation.let(1)
        expect(chat.answer).to_have_text("".join(PIECES[:number]).replace("\n\n", ""), use_inner_text=False)
        expect(chat.facts).to_be_hidden()
    dictation.let(1)
    expect(chat.answer.locator("p")).to_have_text(["建议先到内科就诊。 1. 量血压；", "2. 查血常规。"])
    expect(chat.facts).to_contain_text("token")
    expect(chat.button("发送")).to_be_visible()
    expect(chat.button("停止")).to_be_hidden()
    expect(chat.page.locator(".cut")).to_be_hidden()


@pytest.mark.parametrize("how", ["button", "key", "new conversation", "closed page"])
def test_stopping_frees_the_place_and_keeps_what_was_written(
    chat: Chat, live: Live, dictation: Dictation, how: str
) -> None:
    dictation.say(PIECES, allowed=2)
    chat.ask(QUESTION)
    expect(chat.answer).to_have_text("建议先到内科就诊。")
    assert live.service.load[0] == 1
    if how == "button":
        chat.button("停止").click()
    elif how == "key":
        chat.page.keyboard.press("Escape")
    elif how == "new conversation":
        chat.button("新对话").click()
    else:
        chat.page.goto("about:blank")
        chat.page.goto(chat.origin)
    wait_for(lambda: live.service.load == (0, 0))
    assert live.generator.is_idle
    dictation.say(["好。"])
    if how in ("button", "key"):
        expect(chat.facts).to_have_text("已停止，上面是已经写出的部分。")
        chat.ask("然后呢？")
        expect(chat.answer).to_have_text("好。")
        assert chat.page.locator(".answer").first.text_content() == "建议先到内科就诊。\n"
        contents = [message["content"] for message in chat.asked[-1]["messages"]]
        assert contents == [QUESTION, "建议先到内科就诊。\n", "然后呢？"]
    else:
        expect(chat.page.locator("article")).to_have_count(0)
        chat.ask("你好")
        expect(chat.answer).to_have_text("好。")


def test_an_answer_that_was_stopped_can_be_had_anew(chat: Chat, live: Live, dictation: Dictation) -> None:
    dictation.say(PIECES, allowed=1)
    chat.ask(QUESTION)
    expect(chat.answer).to_have_text("建议")
    chat.button("停止").click()
    expect(chat.facts).to_contain_text("已停止")
    wait_for(lambda: live.service.load == (0, 0))
    dictation.say(["多休息。"])
    chat.button("重试").click()
    expect(chat.answer).to_have_text("多休息。")
    expect(chat.button("重试")).to_be_hidden()
    expect(chat.page.locator("article")).to_have_count(1)
    assert chat.asked[1] == chat.asked[0]


def test_the_server_is_sent_the_conversation_and_the_settings(chat: Chat, dictation: Dictation) -> None:
    chat.set(system="你是医生。", temperature=0.7, top_p=0.8, max_tokens=20, seed=7)
    for answer, question in ("好。", QUESTION), ("不用。", "要吃药吗？"):
        dictation.say([answer])
        chat.ask(question)
        expect(chat.answer).to_have_text(answer)
    said = [("system", "你是医生。"), ("user", QUESTION), ("assistant", "好。"), ("user", "要吃药吗？")]
    assert chat.asked[1] == {
        "model": NAME,
        "messages": [{"role": role, "content": content} for role, content in said],
        "temperature": 0.7,
        "top_p": 0.8,
        "max_tokens": 20,
        "seed": 7,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_settings_that_are_cancelled_or_cannot_be_are_not_sent(chat: Chat, dictation: Dictation) -> None:
    chat.button("设置").click()
    field = chat.page.locator("[name=temperature]")
    field.fill("3")
    chat.button("完成").click()
    expect(field).to_be_visible()  # the browser says why
    field.fill("0.5")
    chat.button("取消").click()
    dictation.say(["好。"])
    chat.ask(QUESTION)
    expect(chat.answer).to_have_text("好。")
    assert chat.asked[0]["temperature"] == 1 and chat.asked[0]["top_p"] == 0.9
    assert "max_tokens" not in chat.asked[0] and "seed" not in chat.asked[0]
    chat.button("设置").click()
    expect(field).to_have_value("1")


def test_a_new_conversation_forgets_the_old_one(chat: Chat, dictation: Dictation) -> None:
    dictation.say(["好。"])
    chat.ask(QUESTION)
    expect(chat.facts).to_contain_text("token")
    chat.button("新对话").click()
    expect(chat.page.locator("article")).to_have_count(0)
    expect(chat.page.get_by_text("有什么可以帮您？")).to_be_visible()
    expect(chat.question).to_be_focused()
    dictation.say(["您好。"])
    chat.ask("你好")
    expect(chat.answer).to_have_text("您好。")
    assert chat.asked[1]["messages"] == [{"role": "user", "content": "你好"}]


def test_an_error_is_told_in_the_servers_words_and_the_question_can_be_edited(
    chat: Chat, live: Live, dictation: Dictation
) -> None:
    long = "头晕" * 300
    _, _, told = live.post("/v1/chat/completions", {"model": NAME, "messages": [{"role": "user", "content": long}]})
    chat.ask(long)
    expect(chat.error).to_contain_text("对话太长")
    expect(chat.error).to_contain_text(told["error"]["message"])
    chat.button("修改问题").click()
    expect(chat.question).to_have_value(long)
    expect(chat.page.locator("article")).to_have_count(0)
    dictation.say(["好。"])
    chat.ask(QUESTION)
    expect(chat.answer).to_have_text("好。")
    assert [message["content"] for message in chat.asked[-1]["messages"]] == [QUESTION]


def test_a_network_that_is_down_is_told_and_the_question_asked_again(chat: Chat, dictation: Dictation) -> None:
    expect(chat.page.locator("#model")).to_have_text(NAME)
    chat.context.set_offline(True)
    chat.ask(QUESTION)
    expect(chat.error).to_have_text("连接不上服务器，请确认它在运行、网络正常。")
    chat.context.set_offline(False)
    dictation.say(["好。"])
    chat.button("重试").click()
    expect(chat.answer).to_have_text("好。")
    expect(chat.error).to_be_hidden()


def test_an_answer_that_breaks_off_says_so_and_stays(chat: Chat) -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "建议先"}, "finish_reason": None}]}
    body = f"data: {json.dumps(chunk)}\n\n"
    chat.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    chat.ask(QUESTION)
    expect(chat.error).to_have_text("连接中断，回答没有写完。")
    expect(chat.answer).to_have_text("建议先")
    expect(chat.button("重试")).to_be_visible()
    expect(chat.button("修改问题")).to_be_hidden()


def test_a_server_that_fails_while_it_answers_is_told(directory: Path, open_page: Open) -> None:
    with served(directory) as live, dictated(live) as dictation:
        chat = open_page(live)
        dictation.say(PIECES, allowed=1)
        chat.ask(QUESTION)
        expect(chat.answer).to_have_text("建议")
        dictation.fail_with(RuntimeError("out of memory"))
        expect(chat.error).to_have_text("服务器出错了。The server failed.")
        expect(chat.answer).to_have_text("建议")


def test_a_token_is_asked_for_and_kept_for_the_tab_alone(directory: Path, open_page: Open) -> None:
    with served(directory, token="secret") as live, dictated(live) as dictation:
        chat = open_page(live)
        field, model = chat.page.get_by_label("令牌", exact=True), chat.page.locator("#model")
        expect(field).to_be_focused()
        expect(chat.page.get_by_text("服务器不接受这个令牌。")).to_be_hidden()
        field.fill("secre")
        field.press("Enter")
        expect(chat.page.get_by_text("服务器不接受这个令牌。")).to_be_visible()
        chat.button("取消").click()
        expect(model).to_have_text("需要访问令牌。")

        chat.ask(QUESTION)
        chat.button("取消").click()
        expect(chat.error).to_contain_text("The token is missing or another.")
        dictation.say(["好。"])
        chat.button("重试").click()
        field.fill("secret")
        chat.button("继续").click()
        expect(chat.answer).to_have_text("好。")
        expect(model).to_have_text(NAME)

        chat.page.reload()
        expect(model).to_have_text(NAME)
        assert chat.page.evaluate("[sessionStorage.token, localStorage.token, document.cookie]") == ["secret", None, ""]


def test_what_looks_like_markup_is_shown_as_it_was_written(chat: Chat, dictation: Dictation) -> None:
    evil = ["<script>window.hit = 1</script>", '<img src="x" onerror="window.hit = 1">', "<b>粗</b>", "&amp;\n\n<hr>"]
    dictation.say(evil)
    chat.ask("".join(evil))
    expect(chat.facts).to_contain_text("token")
    assert chat.answer.text_content() == "".join(evil).replace("\n\n", "")
    assert chat.page.locator(".question").text_content() == "".join(evil)
    assert chat.page.locator("article :is(script, img, b, hr)").count() == 0
    told = json.dumps({"error": {"message": evil[1], "code": evil[1]}})
    chat.page.route("**/v1/chat/completions", lambda route: route.fulfill(status=400, body=told))
    chat.ask(QUESTION)
    expect(chat.error).to_have_text(f"服务器没有接受这个问题。{evil[1]}")
    assert chat.page.evaluate("window.hit") is None
