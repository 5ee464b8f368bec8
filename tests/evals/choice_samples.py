"""A few multiple-choice questions in the formats of C-Eval, CMMLU, MedQA, CMExam and CMB."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import NamedTuple


class Sample(NamedTuple):
    """A question; its answer holds one letter or several."""

    text: str
    options: tuple[str, ...]
    answer: str


def _samples(table: str) -> tuple[Sample, ...]:
    """A question a line: its text, options and answer."""
    rows = (line.split("|") for line in table.strip("\n").split("\n"))
    return tuple(Sample(text, tuple(options), answer) for text, *options, answer in rows)


FIRST = _samples("""
成人安静时的正常心率是每分钟多少次？|30-50 次|60-100 次|110-130 次|140-160 次|B
测量血压时，袖带的下缘应在肘窝上方约|2-3 cm|8-10 cm|12-15 cm|20 cm|A
下列哪一项是糖尿病的典型症状？|视物清晰|体重增加|多饮、多尿|食欲消失|C
缺铁性贫血首选的治疗药物是|维生素 K|青霉素|胰岛素|口服铁剂|D
发热患者体温超过多少时称为“高热”？|37.0 ℃|37.5 ℃|38.0 ℃|39.1 ℃|D
对青霉素过敏的患者，应当避免使用|阿莫西林|红霉素|万古霉素|甲硝唑|A
哮喘急性发作时首先使用的是|止咳糖浆|吸入短效支气管扩张剂|抗真菌药|利尿剂|B
判断成人心跳骤停，应触摸的动脉是|足背动脉|桡动脉|颈动脉|腘动脉|C
""")
SECOND = _samples("""
人体最大的器官是|皮肤|肝|脑|心|A
 胰岛素由哪种细胞分泌？ |红细胞|肝细胞|胰岛 B 细胞|神经元|C
气体交换发生在|气管|肺泡|喉|鼻|B
肾的基本功能单位是|肾盂|输尿管|膀胱|肾单位|D
血液中运输氧的主要是|血小板|血红蛋白|白蛋白|葡萄糖|B
胆汁由哪个器官分泌？|胃|胰|脾|肝|D
成人有多少颗恒牙（含智齿）？|32|28|24|20|A
""")
DEV = _samples("""
维生素 C 缺乏会导致|夜盲症|佝偻病|坏血病|脚气病|C
正常人的体温约为|37 ℃|35 ℃|39 ℃|41 ℃|A
传播疟疾的是|苍蝇|按蚊|虱|跳蚤|B
心脏有几个腔？|一个|两个|三个|四个|D
骨折后首先应当|按摩|固定|热敷|活动|B
""")
# Five options, one answer.
FIVE = _samples("""
下列不属于上呼吸道的是|鼻|咽|喉|口腔|支气管|E
新生儿最常见的黄疸是|生理性黄疸|溶血|胆道闭锁|肝炎|败血症|A
""")
SEVERAL = _samples("""
高血压患者的生活方式应包括哪些？|限盐|戒烟|大量饮酒|规律运动|ABD
属于脂溶性维生素的是|维生素 A|维生素 B1|维生素 D|维生素 C|维生素 E|ACE
""")
SUBJECTS = {"clinical_medicine": FIRST, "basic_medicine": SECOND}
"""Of C-Eval; CMMLU has its own two."""
CMMLU_SUBJECTS = {"clinical_knowledge": FIRST, "anatomy": SECOND}


def many(samples: tuple[Sample, ...], copies: int) -> tuple[Sample, ...]:
    """So many of each, no two the same."""
    again = (sample._replace(text=f"{sample.text}（{copy}）") for copy in range(1, copies) for sample in samples)
    return (*samples, *again)


def _write_table(path: Path, header: list[str], rows: list[list[object]], encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows([header, *rows])


def write_ceval(folder: Path, copies: int = 1) -> Path:
    """dev with explanations, val with answers, test without."""
    for subject, samples in SUBJECTS.items():
        header = ["id", "question", "A", "B", "C", "D"]
        for split, found in (("dev", DEV), ("val", many(samples, copies)), ("test", samples)):
            more = {"dev": ["answer", "explanation"], "val": ["answer"], "test": []}[split]
            rows: list[list[object]] = [
                [index, sample.text, *sample.options, *[sample.answer, "因为如此。"][: len(more)]]
                for index, sample in enumerate(found)
            ]
            _write_table(folder / split / f"{subject}_{split}.csv", header + more, rows)
    return folder


def write_cmmlu(folder: Path, copies: int = 1) -> Path:
    """With its column of numbers that has no name."""
    for subject, samples in CMMLU_SUBJECTS.items():
        for split, found in (("dev", DEV), ("test", many(samples, copies))):
            rows: list[list[object]] = [[i, x.text, *x.options, x.answer] for i, x in enumerate(found)]
            _write_table(folder / split / f"{subject}.csv", ["", "Question", "A", "B", "C", "D", "Answer"], rows)
    return folder


def _options(sample: Sample) -> dict[str, str]:
    return dict(zip("ABCDEFGH", sample.options, strict=False))


def write_medqa(path: Path, samples: tuple[Sample, ...] = (*FIRST, *FIVE), as_list: bool = False) -> Path:
    """Options as an object, or as a list of {key, value}."""
    lines = []
    for sample in samples:
        options = _options(sample)
        given = [{"key": key, "value": value} for key, value in options.items()] if as_list else options
        record = {"question": sample.text, "options": given, "answer": options[sample.answer], "meta_info": "内科"}
        lines.append(json.dumps({**record, "answer_idx": sample.answer}, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_cmexam(path: Path, samples: tuple[Sample, ...] = (*FIVE, *SEVERAL)) -> Path:
    """With a byte-order mark, and a column that the released test file has too."""
    rows: list[list[object]] = [
        [x.text, "\n".join(f"{key} {value}" for key, value in _options(x).items()), x.answer, "略", "临床医学"]
        for x in samples
    ]
    header = ["Question", "Options", "Answer", "Explanation", "Medical Discipline"]
    _write_table(path, header, rows, encoding="utf-8-sig")
    return path


def write_cmb(path: Path, answers: Path | None = None, copies: int = 1) -> Path:
    """A list over several lines; with `answers`, these lie in that file."""
    records = []
    for number, sample in enumerate(many((*FIRST[:3], *FIVE, *SEVERAL), copies), 1):
        kind = "单项选择题" if len(sample.answer) == 1 else "多项选择题"
        exam = "医师考试" if number % 2 else "护理考试"
        record = {"id": number, "exam_type": exam, "exam_class": "执业考试", "exam_subject": "内科"}
        record |= {"question_type": kind, "question": sample.text, "option": {**_options(sample), "F": ""}}
        records.append({**record, "answer": sample.answer})
    if answers is not None:
        kept = [{name: record[name] for name in ("id", "exam_type", "answer")} for record in records]
        answers.write_text(json.dumps(kept, ensure_ascii=False, indent=1), encoding="utf-8")
        records = [{name: value for name, value in record.items() if name != "answer"} for record in records]
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    return path
