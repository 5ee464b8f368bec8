"""A model directory as this project reads it, beside what transformers makes of it.

transformers is imported when this is asked for, for an adapter peft with it, and not before: nothing else needs them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.conversion import end_ids
from engine.publish import require_model
from model.batch import IGNORE, PackedBatch
from model.chat import ChatTemplate, Message
from model.directories import lineage
from model.errors import InputError
from model.heads import CausalLM
from model.hf import load_config, read_model
from model.tokenizer import Tokenizer, find_tokenizer, has_tokenizer

PROMPTS = (
    "高血压患者日常饮食应当注意哪些问题？",
    "患者，男，45岁，反复上腹痛3年，加重1周，伴反酸、嗳气，胃镜示十二指肠球部溃疡。首选的治疗药物是",
    "孩子发烧到39.5℃，已经服用布洛芬混悬液5 ml，多久可以再吃一次？",
)
# Spaces, digits, line breaks, full-width forms, other scripts, rare characters, and names of special tokens.
PROBES = (
    *PROMPTS,
    "",
    " ",
    "  两个空格  开头与结尾  ",
    "第一行\n第二行\n\n\t缩进",
    "血糖 12.5 mmol/L（参考值3.9～6.1）",
    "HbA1c 7.2%, BMI 27.4 kg/m², CO₂CP↓",
    "Take 2 tablets (500mg each) every 6 hours—don't exceed 8/day.",
    "麝香保心丸、䗪虫、硇砂；㿗疝，𬌗面",
    "😀👩🏽‍⚕️ 体温37℃±0.5",
    "é e\u0301 ﬁ Ａ１",
    "<s>开头</s><unk> [human]:你好\n[bot]:<|im_start|>user<|im_end|>",
)
CONVERSATIONS = (
    (Message("user", "头晕怎么办？"),),
    (Message("user", "头晕怎么办？"), Message("assistant", "请先测量血压。"), Message("user", "血压 150/95。 ")),
    (Message("system", "你是医生。"), Message("user", "咳嗽两周了")),
)


class Check(NamedTuple):
    """One line of the table."""

    name: str
    is_equal: bool
    detail: str


class Report(NamedTuple):
    checks: list[Check]

    @property
    def is_equal(self) -> bool:
        return all(check.is_equal for check in self.checks)

    def __str__(self) -> str:
        return "\n".join(f"{c.name:<15}{'equal' if c.is_equal else 'DIFFERS':<9}{c.detail}" for c in self.checks)


def verify_model(directory: Path | str, against: Path | str | None = None, tolerance: float = 1e-3) -> Report:
    """Compare logits in fp32, tokenizer, chat template and end tokens.

    Args:
        directory: what we open.
        against: what transformers opens: the directory that the other was converted from, or by default the same.
        tolerance: largest absolute difference of a logit. Two orders of summation in fp32 left 4e-5 on 160 million
            parameters; 1e-3 changes no probability by more than a five-hundredth of itself. Weights rounded to
            bfloat16 need more.
    Raises:
        InputError: transformers is not installed (or for an adapter peft), or a directory cannot be opened.
    """
    if not tolerance > 0:
        raise InputError(f"--tolerance is {tolerance}. Use a number above 0, such as 1e-3.")
    directory = require_model(directory)
    other = directory if against is None else require_model(against)
    *adapters, whole = lineage(other)
    transformers, peft = _import("transformers"), (_import("peft") if adapters else None)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config, checks = load_config(directory, "lm"), []
    ends = set(end_ids(config, directory))
    prompts = [[(17 * place + start) % config.vocab_size for place in range(20)] for start in (1, 2)]
    if has_tokenizer(directory):
        ours = Tokenizer.load(directory)
        theirs = _open(transformers.AutoTokenizer.from_pretrained, find_tokenizer(other) or other)
        prompts = [ours.encode(text) for text in PROMPTS]
        template = ChatTemplate.of(ours)
        checks = [_compare_ids(ours, theirs), _compare_template(template, ours, theirs)]
        ends |= set() if template is None else set(template.end_ids(ours))
    prompts = [ids[: config.rope_length] for ids in prompts]
    logits = _logits(directory, prompts)
    model = _open(transformers.AutoModelForCausalLM.from_pretrained, whole, torch_dtype=torch.float32)
    for adapter in reversed(adapters):
        assert peft is not None
        model = _open(partial(peft.PeftModel.from_pretrained, model), adapter).merge_and_unload()
    model.eval()
    checks.append(_compare_ends(ends, model.generation_config.eos_token_id))
    with torch.inference_mode():
        expected = torch.cat([model(torch.tensor([ids])).logits[0].float() for ids in prompts])
    return Report([_compare_logits(logits, expected, tolerance), *checks])


def _import(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError:
        raise InputError(
            f"Comparing needs {library}, which is not installed. Install it with pip install {library}."
        ) from None


def _open(read: Callable[..., Any], directory: Path, **options: Any) -> Any:
    """What transformers makes of a directory; that it makes nothing of it is a finding too."""
    try:
        return read(directory, local_files_only=True, **options)
    except Exception as error:  # whatever it raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{directory}: transformers cannot open it ({reason}). Convert it again.") from error


@torch.inference_mode()
def _logits(directory: Path, prompts: Sequence[Sequence[int]]) -> Tensor:
    """fp32 [T, V] of all prompts, packed. The model is gone when this returns: the other needs its memory."""
    config = load_config(directory)
    with torch.device("meta"):
        model = CausalLM(config)
    model = model.to_empty(device="cpu")
    parameters = dict(model.named_parameters())
    for name, tensor in read_model(directory, config):
        parameters[name].copy_(tensor)
    tokens = torch.tensor([index for ids in prompts for index in ids])
    pack = PackedBatch(
        tokens=tokens,
        positions=torch.cat([torch.arange(len(ids)) for ids in prompts]),
        cu_seqlens=torch.tensor([0, *accumulate(len(ids) for ids in prompts)], dtype=torch.int32),
        targets=torch.full_like(tokens, IGNORE),
        num_documents=len(prompts),
        max_seqlen=max(len(ids) for ids in prompts),
    )
    return model.model(pack.tokens, pack.positions, pack.layout) @ model.head_weight.t()


def _compare_logits(ours: Tensor, theirs: Tensor, tolerance: float) -> Check:
    rows = min(ours.shape[1], theirs.shape[1])  # a padded vocabulary has more
    difference = (ours[:, :rows] - theirs[:, :rows]).abs().max().item()
    detail = f"largest difference {difference:.3g} of {ours.numel():,} logits, tolerance {tolerance:g}"
    return Check("logits", difference <= tolerance, detail)  # not so if it is NaN


def _compare_ids(ours: Tokenizer, theirs: Any) -> Check:
    for text in PROBES:
        mine = ours.encode(text, allow_special=True)
        expected = theirs(text, add_special_tokens=False).input_ids
        if mine != expected:
            return Check("tokenizer", False, f"{text!r} is {mine} here and {expected} there")
        if ours.decode(mine) != theirs.decode(expected, clean_up_tokenization_spaces=False):
            return Check("tokenizer", False, f"the ids of {text!r} are decoded to different texts")
    return Check("tokenizer", True, f"ids and decoded text of {len(PROBES)} texts")


def _compare_template(template: ChatTemplate | None, tokenizer: Tokenizer, theirs: Any) -> Check:
    if template is None or theirs.chat_template is None:
        is_equal = template is None and theirs.chat_template is None
        return Check("chat template", is_equal, "neither has one" if is_equal else "only one of the two has one")
    done = 0
    for conversation in CONVERSATIONS:
        try:
            mine, ids = template.render(conversation, True), template.encode_prompt(tokenizer, conversation)
        except InputError:  # this template knows no system message
            continue
        messages = [{"role": message.role, "content": message.content} for message in conversation]
        options = {"add_generation_prompt": True}
        if mine != theirs.apply_chat_template(messages, tokenize=False, **options):
            return Check("chat template", False, f"{messages} are rendered differently")
        if ids != theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options):
            return Check("chat template", False, f"{messages} have other ids")
        done += 1
    return Check("chat template", done > 0, f"{template.name}: text and ids of {done} conversations")


def _compare_ends(ours: set[int], theirs: int | list[int] | None) -> Check:
    expected = {theirs} if isinstance(theirs, int) else set(theirs or ())
    detail = f"answers end at {sorted(ours)}" + ("" if ours == expected else f" here and at {sorted(expected)} there")
    return Check("end tokens", ours == expected, detail)
