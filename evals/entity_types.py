"""Which types of entities a dataset has, and what they are called.

The first name stands in prompts and reports. A model that says one of the others means the same type: the dataset's own
code, its English name, and what doctors write instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from evals.entity_text import fold


class EntityType(NamedTuple):
    name: str
    aliases: tuple[str, ...] = ()


def _table(text: str) -> tuple[EntityType, ...]:
    """A type a line, its names behind one another."""
    rows = (line.split() for line in text.strip().splitlines())
    return tuple(EntityType(first, tuple(rest)) for first, *rest in rows)


# Yidu-S4K, task 1 of CCKS 2019.
CCKS2019 = _table("""
疾病和诊断 疾病 诊断 疾病与诊断 疾病或诊断 disease
影像检查 检查 影像 影像学检查 imaging
实验室检验 检验 化验 实验室检查 test
手术 手术治疗 operation surgery
药物 药品 用药 drug medicine
解剖部位 部位 身体部位 解剖 身体 body anatomy
""")

# CBLUE's nine classes, in the words of its description.
CMEEE = _table("""
疾病 dis disease 疾病名称
临床表现 sym symptom 症状
药物 dru drug 药品
医疗设备 equ equipment 设备
医疗程序 pro procedure 程序 操作 医疗操作 手术操作
身体 bod body 身体部位 部位
医学检验项目 ite item 检验项目 检验 检查项目
微生物类 mic microorganism 微生物
科室 dep department
""")

# ChineseBLUE. Its files hold codes alone; the names are ours, from what they mark.
CMEDQANER = _table("""
疾病 disease
症状 symptom 临床表现
身体部位 body 部位 身体
治疗 treatment 治疗方法
药物 drug 药品
检查 test 检验 检查项目
人群 crowd
生理 physiology 生理现象
特征 feature 程度
时间 time
科室 department
""")

# ChineseBLUE: the types of CCKS 2019, and symptoms.
CEHRNER = (*CCKS2019, EntityType("症状", ("symptom", "临床表现")))


def named(names: Sequence[str]) -> tuple[EntityType, ...]:
    """Types of a file that brings its own: known by their names, and by the usual ones that no other has."""
    usual = {"疾病": ("disease",), "症状": ("symptom",), "检查": ("test",), "药物": ("drug",), "手术": ("surgery",)}
    return tuple(
        EntityType(name, tuple(alias for alias in usual.get(name, ()) if alias not in map(fold, names)))
        for name in names
    )


class TypeNames:
    """Which type a model means."""

    def __init__(self, types: Sequence[EntityType]) -> None:
        self._names: dict[str, str] = {}
        for kind in types:
            for name in (kind.name, *kind.aliases):
                assert self._names.setdefault(fold(name), kind.name) == kind.name, f"{name} names two types"

    def find(self, label: str) -> str | None:
        """The name of the type that a label means, up to `fold`; None where it is none of them."""
        folded = fold(label.strip(" \t\u3000*`_。.:：“”\"'「」【】[]"))
        for suffix in ("", "实体", "类", "类实体", "名称"):
            if folded.endswith(suffix) and (name := self._names.get(folded.removesuffix(suffix))):
                return name
        return None
