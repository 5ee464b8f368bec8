"""What is read from answers, in whichever form they come."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from evals.entity_answers import Parsed, parse
from evals.entity_files import Annotated, Entity
from evals.entity_mentions import divide, quote, says_none
from evals.entity_prompts import WORDINGS, write
from evals.entity_scores import pairs
from evals.entity_text import FoldedText, fold
from evals.entity_types import CCKS2019, CEHRNER, CMEDQANER, CMEEE, EntityType, TypeNames, named

NOTE = "患者发热、咳嗽三天，血压高，服用氨氯地平和维生素B、C，胸部CT未见异常，淋巴结（10个）、肝未见癌。"
TYPES = TypeNames(CMEDQANER)
FEVER, COUGH, DRUG = ("症状", "发热"), ("症状", "咳嗽"), ("药物", "氨氯地平")


def read(answer: str, text: str = NOTE) -> Parsed:
    return parse(answer, FoldedText(text), TYPES)


@pytest.mark.parametrize(
    "answer",
    [
        "症状：发热\n症状：咳嗽\n药物：氨氯地平",
        "症状: 发热\n症状: 咳嗽\n药物: 氨氯地平",
        "症状：发热、咳嗽\n药物：氨氯地平",
        "症状：发热，咳嗽；\n药物：氨氯地平。",
        "1. 症状：发热\n2、症状：咳嗽\n（3）药物：氨氯地平",
        "- **症状**：发热\n- **症状**：咳嗽\n* 药物：`氨氯地平`",
        "症状：\n- 发热\n- 咳嗽\n药物：\n- 氨氯地平",
        "### 症状\n1. 发热\n2. 咳嗽\n### 药物\n1. 氨氯地平",
        "症状：\n发热\n咳嗽\n药物：\n氨氯地平",
        "symptom：发热\nSymptom：咳嗽\ndrug -> 氨氯地平",
        "临床表现：发热\n症状实体：咳嗽\n药品：氨氯地平",
        "症状 发热\n症状\t咳嗽\n药物 氨氯地平",
        "发热：症状\n咳嗽（症状）\n氨氯地平 药物",
        "症状：“发热”、“咳嗽”\n药物：「氨氯地平」",
        "以下是抽取结果：\n\n症状：发热\n症状：咳嗽\n药物：氨氯地平\n\n希望对您有帮助！",
        "抽取结果：症状：发热、咳嗽\n药物：氨氯地平",
        '{"症状": ["发热", "咳嗽"], "药物": ["氨氯地平"]}',
        '```json\n{\n "症状": ["发热", "咳嗽"],\n "药物": ["氨氯地平"],\n "疾病": []\n}\n```\n以上。',
        '结果如下：{"症状": "发热、咳嗽", "药物": "氨氯地平", "检查": "无"}',
        '{"症状": ["发热"], "症状": ["咳嗽"], "药物": ["氨氯地平"]}',
        '[{"类别": "症状", "名称": "发热"}, {"type": "symptom", "mention": "咳嗽"},\n'
        '{"label": "drug", "name": "氨氯地平"}]\n以上。',
        '{"entities": [["症状", "发热"], ["咳嗽", "症状"], ["药物", "氨氯地平"]]}',
        '{"type": "症状", "entity": "发热", "start": 2}\n{"type": "症状", "entity": "咳嗽"}\n{"药物": "氨氯地平"}',
        '[{"症状": ["发热", "咳嗽"]}, {"药物": [{"名称": "氨氯地平"}]}, {"type": "疾病", "men',
    ],
)
def test_the_same_entities_are_read_from(answer: str) -> None:
    parsed = read(answer)
    assert parsed.entities == (FEVER, COUGH, DRUG)
    assert not (parsed.is_unreadable or parsed.unknown_types or parsed.invented or parsed.repeated)


@pytest.mark.parametrize(
    "answer",
    [
        "无",
        "无。",
        "没有",
        "文中未提及相关实体。",
        "无相关实体",
        "None",
        "未发现",
        "{}",
        "[]",
        '{"症状": [], "药物": "无"}',
        "药物：没有",
        "没有药物",
        "没有药物。\n未提及症状",
        "文中没有药物和症状",
        "1. 无相关疾病、症状",
        "未发现任何药物实体",
        "药物：没有药物",
        "药物：\n- 没有药物",
    ],
)
def test_an_answer_that_says_there_is_nothing_is_no_failure(answer: str) -> None:
    assert read(answer)[:2] == ((), True) and not read(answer).is_unreadable


@pytest.mark.parametrize("answer", ["", "  \n", "我不知道。", "您好，请问有什么可以帮您？", "[1, 2]", '{"症状": ["发'])
def test_an_answer_from_which_nothing_can_be_read_is_a_failure(answer: str) -> None:
    assert read(answer).is_unreadable


def test_nothing_of_one_type_leaves_the_others() -> None:
    assert read("疾病：无\n症状：发热\n症状：咳嗽\n药物：氨氯地平").entities == (FEVER, COUGH, DRUG)


def test_prose_is_counted_and_not_scored() -> None:
    assert read("好的，我来抽取。\n注：仅供参考\n症状：发热")[0::5] == ((FEVER,), 2)


def test_a_type_that_was_not_asked_for_is_kept_under_its_name_and_counted() -> None:
    parsed = read("职业：教师\n器官：肝\n症状：发热")
    assert parsed.entities == (("器官", "肝"), FEVER) and parsed.unknown_types == 1 and parsed.prose == 1
    assert read('{"职业": ["教师"]}')[0::2] == ((("职业", "教师"),), 1, 0)


def test_a_mention_that_the_text_does_not_have_is_kept_and_counted() -> None:
    parsed = read("症状：发热\n症状：胸痛")
    assert parsed.entities == (FEVER, ("症状", "胸痛")) and parsed.invented == 1


def test_an_entity_is_named_once_however_it_is_written() -> None:
    parsed = read("检查：胸部CT\n检查：胸部ＣＴ\n检查：胸部 ct\n检查：胸部Ct")
    assert parsed.entities == (("检查", "胸部CT"),) and parsed.repeated == 3


def test_a_mention_with_a_separator_stands_in_quotation_marks() -> None:
    assert read("药物：“维生素B、C”、氨氯地平").entities == (("药物", "维生素B、C"), DRUG)
    assert quote("维生素B、C") == "“维生素B、C”" and quote("氨氯地平") == "氨氯地平"


def test_a_line_is_one_mention_where_the_answer_gives_each_its_own_and_the_text_has_it_whole() -> None:
    assert read("药物：氨氯地平\n药物：维生素B、C").entities == (DRUG, ("药物", "维生素B、C"))
    assert read("药物：维生素B、C").entities == (("药物", "维生素B"), ("药物", "C"))
    assert read("药物：氨氯地平\n药物：维生素B、叶酸").entities == (DRUG, ("药物", "维生素B"), ("药物", "叶酸"))


def test_nothing_is_parted_inside_brackets_or_numbers() -> None:
    assert divide("淋巴结（10个、5个）、肝") == ["淋巴结（10个、5个）", "肝"]
    assert divide("1,25-二羟维生素D3,钙") == ["1,25-二羟维生素D3", "钙"]
    assert divide("肝（左叶、肺") == ["肝（左叶", "肺"]  # a bracket that never closes is none


def test_a_mention_with_inner_spaces_stays_whole() -> None:
    assert read("疾病：Hand Schuller Christian 病", "Hand Schuller Christian 病").entities == (
        ("疾病", "Hand Schuller Christian 病"),
    )


def test_no_word_means_two_types_of_a_dataset() -> None:
    for types in (CCKS2019, CMEEE, CMEDQANER, CEHRNER, named(["疾病", "药物", "drug", "症状"])):
        names = TypeNames(types)  # asserts it
        assert all(names.find(name) == kind.name for kind in types for name in (kind.name, *kind.aliases))


def test_types_are_known_by_their_aliases() -> None:
    assert TypeNames(CMEEE).find("dis") == TypeNames(CMEEE).find("Disease") == "疾病"
    assert TypeNames(CCKS2019).find("检验") == "实验室检验" and TypeNames(CCKS2019).find("检查") == "影像检查"
    assert TYPES.find("疾病类实体：") == "疾病" and TYPES.find("疾病史") is None


MENTION = st.text('甲乙a1 、，；,;：:“”"「」（）()[]{}。.*-`无·', min_size=1, max_size=8).filter(
    lambda one: fold(one) != ""
)
KINDS = ("疾病", "症状", "药物 类", "A-1")


@pytest.mark.parametrize("wording", ["lines", "short", "json"])
@given(entities=st.lists(st.tuples(st.sampled_from(KINDS), MENTION), max_size=6))
def test_the_right_answer_is_read_back_whatever_its_mentions_hold(wording: str, entities: list) -> None:
    assume(wording != "json" or not any(says_none(mention) for _, mention in entities))  # ["无"] means nothing
    text = Annotated(1, "".join(mention for _, mention in entities), tuple(Entity(*one) for one in entities))
    types = TypeNames(tuple(EntityType(name) for name in KINDS))
    parsed = parse(write(text, KINDS, WORDINGS[wording]), FoldedText(text.text), types)
    assert pairs(parsed.entities) == pairs(entities)
    assert parsed.says_none == (not entities) and not parsed.repeated and not parsed.unknown_types


@given(st.text('症状药物：:，、\n- 1.发热咳嗽{}[]"无“”（）', max_size=40))
def test_any_answer_can_be_read(answer: str) -> None:
    parsed = read(answer)
    assert len(pairs(parsed.entities)) == len(parsed.entities)
    assert all(fold(mention) for _, mention in parsed.entities)


@given(
    st.recursive(
        st.none() | st.integers() | st.text("症发", max_size=3),
        lambda inner: st.lists(inner) | st.dictionaries(st.text("症状type实体", max_size=4), inner),
    )
)
def test_any_json_can_be_read(value: object) -> None:
    found = read(json.dumps(value, ensure_ascii=False))
    assert all(mention for _, mention in found.entities)


def test_a_denied_type_is_nothing_and_a_denied_finding_is_not() -> None:
    assert read("没有药物\n症状：发热")[:2] == ((FEVER,), True)
    assert read("没有发热").is_unreadable and read("无药物过敏").is_unreadable  # a finding is no type
    assert read("症状：没有药物过敏").entities == (("症状", "没有药物过敏"),)
    for answer in ("症状：无症状", "症状：\n- 无症状", "症状：\n无症状"):  # the text has it
        assert read(answer, "感染后无症状。").entities == (("症状", "无症状"),)
    assert read("无症状", "感染后无症状。")[:2] == ((), True)


def test_says_none_is_not_taken_for_a_mention_that_begins_so() -> None:
    assert says_none("未见异常") is False and says_none("无力") is False and says_none("无") is True
