"""Choosing, checking and storing templates, fitting conversations into a context, and keeping users' text text."""

from __future__ import annotations

import pickle
import re
import time
import tracemalloc
from pathlib import Path

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from model.chat import (
    ChatTemplate,
    ConversationError,
    Encoded,
    Message,
    fit,
    fit_batch,
    fit_prompt,
    resolve_template,
)
from model.chat_encoding import ConversationEncoder
from model.chat_templates import NAMED_TEMPLATES
from model.errors import InputError
from model.tokenizer import Tokenizer
from tests.model.chat_bases import FOREIGN, NEEDS_QWEN, talk, write_bases
from tests.model.tokenizer_bases import ENGLISH, sentences, write_json

LONG = talk(*sentences(6, 10), system="你是医生。")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_bases(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def tokenizer(bases: dict[str, Path]) -> Tokenizer:
    return Tokenizer.load(bases["trained"])


def own(source: str, tokenizer: Tokenizer) -> ChatTemplate:
    return ChatTemplate(source, tokenizer.special_names, "own.jinja")


# What a template must do.


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "writes no end token after an answer"),
        ("{% for m in messages %}{{ m.content }}<stop>{% endfor %}", "writes no end token after an answer"),
        ("{{ messages | tojson }}", "writes no end token after an answer"),
        ("{{ messages | length }}{{ eos_token }}", "does not write a question and its answer once each"),
        ("{{ messages[-1].content }}{{ eos_token }}", "does not write a question and its answer once each"),
        ("{% for m in messages %}", r"own\.jinja, line 1: the chat template is not Jinja"),
        ("{{ messages | unknown }}", r"own\.jinja, line 1: the chat template is not Jinja"),
        ("{{ raise_exception('never') }}", r"refuses a conversation of user, assistant \(TemplateError: never\)"),
        ("{{ messages[0].content.nothing.more }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}",
            "ignores add_generation_prompt, so that generation could not begin an answer with 'assistant: '",
        ),
        (
            "{% for m in messages[-1:] %}last {% endfor %}{% for m in messages %}{{ m.content }}{% if loop.last %} end"
            "{% endif %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}:{% endif %}",
            "writes the turns before an answer otherwise",
        ),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused(source: str, message: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=message):
        own(source, tokenizer).check(tokenizer)


def test_a_template_that_ends_only_some_answers_is_refused(tokenizer: Tokenizer) -> None:
    template = own(
        "{% for m in messages %}{{ m.content }}{% if loop.last and m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}",
        tokenizer,
    )
    template.check(tokenizer)
    with pytest.raises(InputError, match=r"ends an answer with '</s>' in one turn and with '' in another"):
        template.encode(tokenizer, talk("问", "答", "问", "答"))


def test_a_system_message_that_moves_to_the_last_question_is_refused(tokenizer: Tokenizer) -> None:
    template = own(
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
        "{% if m.role == 'user' %}[{{ system if m == (messages | selectattr('role', 'equalto', 'user') | list)[-1] }}"
        "{{ m.content }}]{% elif m.role == 'assistant' %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        tokenizer,
    )
    assert template.render(talk("甲", "乙", "丙", system="丁")) == "[甲]乙</s>[丁丙]"
    template.encode(tokenizer, talk("甲", "乙", system="丁"))
    with pytest.raises(InputError, match="training would not see what generation continues"):
        template.encode(tokenizer, talk("甲", "乙", "丙", "戊", system="丁"))


def test_questions_in_another_order_are_refused(tokenizer: Tokenizer) -> None:
    template = own(
        "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}{% set n = namespace(i=0) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set n.i = n.i - 1 %}{{ asked[n.i].content }}:"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        tokenizer,
    )
    assert template.render(talk("甲", "乙", "丙", "戊")) == "丙:乙</s>甲:戊</s>"
    with pytest.raises(InputError, match="training would not see what generation continues"):
        template.encode(tokenizer, talk("甲", "乙", "丙", "戊"))


LOOKS_INTO_QUESTIONS = (
    "{{% set urgent = '急' in messages[1].content %}}{{{{ {0} }}}}{{% for m in messages %}}{{{{ m.content }}}}"
    "{{% if m.role == 'user' %}}{{{{ {1} }}}}:{{% elif m.role == 'assistant' %}}{{{{ eos_token }}}}{{% endif %}}"
    "{{% endfor %}}"
)


@pytest.mark.parametrize(
    ("before", "behind", "number"),
    [
        ("'!' if urgent", "", 2),
        ("'!' if urgent else '.'", "", 2),
        ("", "'!' if urgent and add_generation_prompt", 3),
    ],
)
def test_a_question_that_changes_what_stands_before_it_or_only_its_prompt_is_refused(
    before: str, behind: str, number: int, tokenizer: Tokenizer
) -> None:
    template = own(LOOKS_INTO_QUESTIONS.format(before or "''", behind or "''"), tokenizer)
    batch = [talk("不痛", "答", system="甲"), talk("急痛", "答", system="甲")]
    fine, refused = fit_batch(template, tokenizer, batch, 100)
    assert fine == template.encode(tokenizer, batch[0])
    assert isinstance(refused, ConversationError) and str(refused).startswith(f"message {number} (")


def test_what_a_question_changes_beside_it_is_part_of_it(tokenizer: Tokenizer) -> None:
    template = own(LOOKS_INTO_QUESTIONS.format("''", "'!</s>' if urgent"), tokenizer)
    encoded = template.encode(tokenizer, talk("急痛", "答", system="甲"))
    asked, said = tokenizer.encode("甲急痛!</s>:"), [*tokenizer.encode("答"), tokenizer.eos_id]
    assert encoded == Encoded(asked + said, [False] * len(asked) + [True] * len(said))


def test_a_conversation_that_the_template_refuses_is_skipped_among_others_and_told_when_alone(
    tokenizer: Tokenizer,
) -> None:
    template = own(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
        "{{ m.content + eos_token }}{% endfor %}",
        tokenizer,
    )
    fine, refused = talk("问", "答"), talk("问", "答", system="你是医生。")
    first, second, third = fit_batch(template, tokenizer, [fine, refused, fine], 100)
    assert first == third == template.encode(tokenizer, fine)
    assert isinstance(second, ConversationError) and "own.jinja" in str(second) and "no system, please" in str(second)
    for refusal in (template.render, lambda messages: template.encode_prompt(tokenizer, messages[:-1])):
        with pytest.raises(InputError, match=r"own\.jinja: .*system, user.*no system, please.*--chat\.template"):
            refusal(refused)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(60) }}",
        "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
        "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ [0] * 999999999 }}",
        "{{ 7 ** 999999999 }}",
        "{% set n = namespace(x='ab') %}{% for a in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='ab') %}{% for a in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x=3) %}{% for a in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    ],
)
def test_a_template_that_would_not_end_is_stopped(source: str, tokenizer: Tokenizer) -> None:
    start = time.process_time()
    with pytest.raises(InputError, match=r"not done after|would make more than|RecursionError"):
        own(source, tokenizer).render(talk("问"))
    assert time.process_time() - start < 20  # unstopped, hours or all memory


# Which template a job takes.


def test_unknown_names_and_missing_tokens_are_named(bases: dict[str, Path], tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"chatlm: no such chat template\. Name one of chimed, ziya"):
        ChatTemplate.named("chatlm", tokenizer)
    with pytest.raises(InputError, match=rf"{bases['trained']}: .*no <\|im_start\|>, which the chat template chatml"):
        ChatTemplate.named("chatml", tokenizer)
    without_bos = Tokenizer.load(bases["qwen"])
    without_bos.config["bos_token"] = None
    with pytest.raises(InputError, match="no bos_token, which the chat template llama2 needs"):
        ChatTemplate.named("llama2", without_bos)
    assert {name: ChatTemplate.named(name, Tokenizer.load(bases["qwen"])).name for name in NAMED_TEMPLATES} == {
        name: name for name in NAMED_TEMPLATES
    }


def test_the_stored_template_is_taken_and_another_is_a_conflict(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert resolve_template("auto", tokenizer).name == "chimed"
    assert resolve_template("vicuna", tokenizer).name == "vicuna"
    stored = resolve_template("ziya", tokenizer).store(tokenizer)
    assert resolve_template("auto", stored).name == resolve_template("ziya", stored).name == "ziya"
    with pytest.raises(InputError, match=r"template ziya, but chimed .*--chat\.template auto.*--chat\.replace true"):
        resolve_template("chimed", stored)
    assert resolve_template("chimed", stored, replace=True).name == "chimed"
    file = tmp_path / "mine.jinja"
    file.write_text(FOREIGN["plain markers"], encoding="utf-8")
    assert resolve_template(str(file), tokenizer).source == FOREIGN["plain markers"]
    with pytest.raises(InputError, match=r"stores the chat template ziya, but .*mine\.jinja"):
        resolve_template(str(file), stored)
    with pytest.raises(InputError, match=r"nowhere\.jinja: cannot be read \(No such file or directory\)"):
        resolve_template(str(tmp_path / "nowhere.jinja"), tokenizer)
    file.write_bytes(b"\xff")
    with pytest.raises(InputError, match=r"mine\.jinja: not UTF-8"):
        resolve_template(str(file), tokenizer)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ([{"name": "rag", "template": "x"}], r"none of its chat templates \(rag\) is named default"),
        (7, r'"chat_template" is no text'),
        ("{% for", r"tokenizer_config\.json, line 1: the chat template is not Jinja"),
    ],
)
def test_a_stored_template_that_cannot_be_read_names_its_file(
    stored: object, message: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {**tokenizer.config, "chat_template": stored})
    with pytest.raises(InputError, match=message) as error:
        resolve_template("auto", Tokenizer.load(tmp_path))
    assert str(tmp_path) in str(error.value)


def test_fingerprints_tell_templates_apart(bases: dict[str, Path], tokenizer: Tokenizer) -> None:
    templates = [ChatTemplate.named(name, tokenizer) for name in ("chimed", "ziya", "plain")]
    templates.append(ChatTemplate.named("chimed", Tokenizer.load(bases["qwen"])))  # another end token
    assert len({template.fingerprint for template in templates}) == 4
    assert ChatTemplate.named("chimed", Tokenizer.load(bases["trained"])).fingerprint == templates[0].fingerprint


def test_a_used_template_can_be_pickled(bases: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(bases["ziya"])
    template = resolve_template("vicuna", tokenizer)
    conversation = talk("什么是</s>？", "</s>是结束。", "<human>", "<bot>")
    encoded = template.encode(tokenizer, conversation)
    copy, other = pickle.loads(pickle.dumps((template, tokenizer)))
    assert copy.encode(other, conversation) == encoded and copy.fingerprint == template.fingerprint


def test_one_template_serves_two_tokenizers(bases: dict[str, Path], tokenizer: Tokenizer) -> None:
    other = Tokenizer.load(bases["ziya"])
    template = ChatTemplate.named("chimed", tokenizer)
    for current in (tokenizer, other, tokenizer):
        assert template.encode(current, LONG) == ChatTemplate.named("chimed", current).encode(current, LONG)


def test_the_end_of_an_answer_is_the_templates_and_then_the_tokenizers(bases: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(bases["qwen"])
    [im_end] = tokenizer.encode("<|im_end|>", allow_special=True)
    assert ChatTemplate.named("chatml", tokenizer).end_ids(tokenizer) == (im_end, tokenizer.eos_id)
    assert ChatTemplate.named("chimed", tokenizer).end_ids(tokenizer) == (tokenizer.eos_id,)


# Fitting into a context.


def test_the_oldest_turns_are_left_out_whole_and_the_system_message_stays(tokenizer: Tokenizer) -> None:
    template = resolve_template("chimed", tokenizer)
    whole = template.encode(tokenizer, LONG)
    assert fit(template, tokenizer, LONG, len(whole.ids)) == whole
    for turns in range(1, 5):
        rest = template.encode(tokenizer, [LONG[0], *LONG[1 + 2 * turns :]])
        more = template.encode(tokenizer, [LONG[0], *LONG[2 * turns - 1 :]])
        for context in (len(rest.ids), len(more.ids) - 1):
            assert fit(template, tokenizer, LONG, context) == rest._replace(dropped_turns=turns)


def test_what_is_kept_of_a_long_conversation_grows_with_its_length_and_not_its_square(tokenizer: Tokenizer) -> None:
    def kept(turns: int) -> int:
        template = ChatTemplate.named("chimed", tokenizer)
        template.check(tokenizer)
        tracemalloc.start()
        try:
            template.encode(tokenizer, talk(*["问", "答"] * turns))
            return tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()

    assert kept(200) < 3 * kept(100)


def test_the_last_answer_is_cut_without_an_end_token(tokenizer: Tokenizer) -> None:
    template = resolve_template("chimed", tokenizer)
    last = [LONG[0], *LONG[-2:]]
    whole = template.encode(tokenizer, last)
    asked = len(template.encode_prompt(tokenizer, last[:-1]))
    for context in range(asked + 1, len(whole.ids)):
        cut = fit(template, tokenizer, LONG, context)
        assert cut == Encoded(whole.ids[:context], whole.trained[:context], dropped_turns=4, is_cut=True)
        assert tokenizer.eos_id not in cut.ids and any(cut.trained)
    with pytest.raises(ConversationError, match=f"its last question takes {asked} tokens of a context of {asked}"):
        fit(template, tokenizer, LONG, asked)


def test_a_prompt_leaves_room_for_one_token(tokenizer: Tokenizer) -> None:
    template = resolve_template("chimed", tokenizer)
    asked = LONG[:-1]
    whole = template.encode_prompt(tokenizer, asked)
    assert fit_prompt(template, tokenizer, asked, len(whole) + 1) == (whole, 0)
    shorter = template.encode_prompt(tokenizer, [LONG[0], *LONG[3:-1]])
    assert fit_prompt(template, tokenizer, asked, len(whole)) == (shorter, 1)
    last = template.encode_prompt(tokenizer, [LONG[0], LONG[-2]])
    assert fit_prompt(template, tokenizer, asked, len(last) + 1) == (last, 4)
    with pytest.raises(ConversationError, match=f"its last question takes {len(last)} tokens of a context"):
        fit_prompt(template, tokenizer, asked, len(last))


def test_a_batch_gives_what_each_gives_alone(bases: dict[str, Path]) -> None:
    for base in ("ziya", "qwen"):
        tokenizer = Tokenizer.load(bases[base])
        template = resolve_template("chimed", tokenizer)
        batch = [
            LONG,
            talk("问", "答"),
            talk("</s>", "<human>"),
            talk("问"),
            talk("\ud83d", "答"),
            talk("问", "答" * 300),
        ]
        results = fit_batch(template, tokenizer, batch, 200)
        for conversation, result in zip(batch, results, strict=True):
            if isinstance(result, ConversationError):
                with pytest.raises(ConversationError, match=re.escape(str(result))):
                    fit(template, tokenizer, conversation, 200)
            else:
                assert result == fit(template, tokenizer, conversation, 200)
        assert [str(result) for result in results if isinstance(result, ConversationError)] == [
            "no answer is in it",
            "message 1 (user) holds half a surrogate pair",
        ]


# Users' text stays text.


@pytest.mark.parametrize("base", ["trained", "ziya", "metaspace", "qwen"])
def test_the_guarded_way_of_encoding_gives_the_same_ids(
    base: str, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way that is taken where a user typed a special token, taken for texts without one."""
    tokenizer = Tokenizer.load(bases[base])
    sources = [template.source for template in NAMED_TEMPLATES.values() if base == "qwen" or len(template.needs) < 2]
    sources += [FOREIGN[shape] for shape in FOREIGN if base == "qwen" or shape not in NEEDS_QWEN]
    texts = [*sentences(7, 3), *ENGLISH, " a\n", ""]
    conversations = [talk(*texts[k:], *texts[:k], system=system) for k in range(8) for system in (None, "甲")]
    plain = [own(source, tokenizer).encode_batch(tokenizer, conversations) for source in sources]
    monkeypatch.setattr(ConversationEncoder, "_holds_marker", lambda *_: True)
    assert [own(source, tokenizer).encode_batch(tokenizer, conversations) for source in sources] == plain


def test_tokens_that_take_the_space_around_them_take_it_in_the_guarded_way_too(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Backend.from_file(str(bases["qwen"] / "tokenizer.json"))
    greedy = [AddedToken("<|end|>", rstrip=True, normalized=False), AddedToken("<|user|>", rstrip=True)]
    greedy.append(AddedToken("<|sep|>", lstrip=True, normalized=False))
    backend.add_special_tokens([*greedy, AddedToken("<|assistant|>", lstrip=True, rstrip=True, normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|endoftext|>"})
    tokenizer = Tokenizer.load(tmp_path)
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>\\n' + m.content + ' <|sep|>.<|end|>\\n' }}"
        "{% else %}{{ '  <|assistant|>\\n' + m.content + ' <|end|>\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '  <|assistant|>\\n' }}{% endif %}"
    )
    asked = talk("  发热 ", "多喝水", " 咳嗽")
    from transformers import AutoTokenizer

    text = own(source, tokenizer).render(asked, add_generation_prompt=True)
    assert "</s>" not in text
    prompt = own(source, tokenizer).encode_prompt(tokenizer, asked)
    oracle = AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(ConversationEncoder, "_holds_marker", lambda *_: True)
    assert own(source, tokenizer).encode_prompt(tokenizer, asked) == prompt == oracle


def test_added_tokens_of_white_space_are_nobodys_markers(bases: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    backend = Backend.from_file(str(bases["qwen"] / "tokenizer.json"))
    backend.add_tokens([AddedToken("\n", normalized=False), AddedToken("  ", normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|endoftext|>"})
    tokenizer = Tokenizer.load(tmp_path)
    template = resolve_template("chimed", tokenizer)
    asked = talk("第一行\n第二行  末", "答\n  案", "问")
    text = template.render(asked, add_generation_prompt=True)
    oracle = AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"]
    assert template.encode_prompt(tokenizer, asked) == oracle
    assert template.end_ids(tokenizer) == (tokenizer.eos_id,)


def test_a_marker_in_a_content_leaves_the_rest_of_the_prompt_alone(bases: dict[str, Path]) -> None:
    for base in ("trained", "ziya", "metaspace", "qwen"):
        tokenizer = Tokenizer.load(bases[base])
        eos = tokenizer.decode([tokenizer.eos_id])
        template = resolve_template("chimed", tokenizer)
        ids = template.encode_prompt(tokenizer, [Message("user", f"甲{eos}乙")])
        assert ids == tokenizer.encode(f"[human]:甲{eos}乙\n[bot]:")
        assert tokenizer.eos_id not in ids


def test_half_a_marker_beside_the_templates_text_stays_text(tokenizer: Tokenizer) -> None:
    template = own(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}/s>{% else %}{{ eos_token }}{% endif %}"
        "{% endfor %}",
        tokenizer,
    )
    ids = template.encode_prompt(tokenizer, talk("a<"))
    assert ids == tokenizer.encode("a</s>") and tokenizer.eos_id not in ids
    template = own(template.source.replace("{{ m.content }}{%", "<{{ m.content }}{%"), tokenizer)
    ids = template.encode_prompt(tokenizer, talk("/s>a"))
    assert ids == tokenizer.encode("</s>a/s>") and tokenizer.eos_id not in ids


# The page.


def test_the_page_shows_what_is_rendered(tokenizer: Tokenizer) -> None:
    page = (Path(__file__).parents[2] / "docs" / "chat.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)`( and so on)? \| `(.+?)`", page.replace("\\|", "\0"), re.MULTILINE)
    assert [name for name, *_ in rows] == list(NAMED_TEMPLATES)
    for name, shown, is_begun, with_system in rows:
        template = own(NAMED_TEMPLATES[name].source, tokenizer)
        whole, begun = template.render(talk("Q", "A", "R", "B")), template.render(talk("Q", system="S"))
        start, _, rest = shown.replace("\0", "|").replace("⏎", "\n").rpartition("…")
        assert whole.startswith(start) and (rest in whole if is_begun else whole.endswith(rest))
        assert begun.startswith(with_system.replace("\0", "|").replace("⏎", "\n"))
