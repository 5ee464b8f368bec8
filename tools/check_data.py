"""Say what is in raw files or prepared directories, before anything is trained on them.

    python tools/check_data.py --data PATH... [--tokenizer DIR] [--held_out PATH...]
    python tools/check_data.py --data PATH... --model DIR --template chatml --context 4096

What the files hold, texts, conversations, comparisons of answers or questions alone (for tools/ppo.py,
tools/rejection.py and tools/chat.py --input), is found from the first records; --kind prompts takes a .txt file for a
question a line, and conversations for their questions. Tokens of all but texts are counted under a chat template, and
some are shown, with the trained ones marked. Files that cannot be read
are named at the end, each with the reason; then the exit code is 2.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.config import check_range
from engine.data.check import check, render
from engine.data.check_conversations import Counting, are_conversations, check_conversations, render_conversations
from engine.data.check_preferences import are_preferences, check_preferences, render_preferences
from engine.data.check_prompts import are_prompts, check_prompts, render_prompts
from engine.data.conversation_files import ConversationOptions
from engine.data.preference_files import PreferenceOptions
from engine.data.preferences import ONLY_PREFERENCES
from engine.data.progress import ProgressLine
from engine.data.shards import is_prepared
from engine.data.sources import DataOptions, list_files, only
from engine.launch import run, speak
from model.chat import resolve_template
from model.errors import InputError
from model.tokenizer import Tokenizer

Kind = Literal["text", "conversations", "preferences", "prompts"]
# Keys that say what asks, and nothing of answers.
_OF_PROMPTS = {"user", "system", "history"}


@dataclass
class CheckOptions(DataOptions):
    """Which files, and how they are read."""

    keys: dict[str, str] = field(default_factory=dict)
    """what fields mean, where the schema is not known by itself: user=ask assistant=answer; of comparisons user=ask
    chosen=good rejected=bad"""
    system: str | None = None
    """system prompt of conversations that have none; by default they have none"""
    max_responses: int = 9
    """of comparisons: answers to one prompt"""


@dataclass
class CheckConfig:
    """Report on raw files or prepared directories."""

    kind: Literal["auto", "text", "conversations", "preferences", "prompts"] = "auto"
    """what the files hold; auto: what their first records are"""
    model: str | None = None
    """the same as --tokenizer"""
    tokenizer: str | None = None
    """tokenizer or model directory, to count tokens of raw files"""
    template: str = "auto"
    """chat template of conversations: a name, a .jinja file, or auto for the one stored beside the tokenizer"""
    context: int | None = None
    """tokens of the longest conversation, or prompt alone: say what would be left out or cut"""
    held_out: list[str] = field(default_factory=list)
    """held-out files or prepared directories, to be looked for in the data"""
    verify: bool = False
    """compare every byte of prepared shards with what was written"""
    data: CheckOptions = field(default_factory=CheckOptions)


def main(config: CheckConfig) -> None:
    check_range("context", config, 2, "context")
    directory = config.tokenizer or config.model
    tokenizer = Tokenizer.load(directory) if directory else None
    progress = ProgressLine("Reading")
    kind, paths = config.kind, config.data.paths
    if kind == "auto":
        kind = _kind(config.data)
    counting = None
    if tokenizer is not None and kind != "text":
        template = resolve_template(config.template, tokenizer, replace=True)
        counting = Counting(template, tokenizer, config.context)
    if kind == "preferences":
        options = only(PreferenceOptions, config.data)
        options.check()
        compared = check_preferences(paths, options, counting, config.held_out, progress)
        print(render_preferences(compared, counting and config.context, "tokens" if counting else "characters"))
        return _name(compared.unusable)
    if kind == "conversations":
        conversations = only(ConversationOptions, config.data)
        talks = check_conversations(paths, conversations, counting, config.held_out, progress)
        print(render_conversations(talks, config.context))
        return _name(talks.unusable)
    if kind == "prompts":
        data = config.data
        asking = ConversationOptions({}, data.system, data.encoding, data.newlines, data.on_error)
        prompts = check_prompts(paths, asking, data.keys, counting, config.held_out, progress)
        print(render_prompts(prompts, config.context))
        return _name(prompts.unusable)
    texts = check(paths, tokenizer, config.data, config.held_out, config.verify, progress)
    print(render(texts))
    _name(texts.unusable)


def _name(unusable: list[str]) -> None:
    """Say which files cannot be read. Raises InputError if there are any."""
    if len(unusable) == 1:
        raise InputError(unusable[0])
    for sentence in unusable:
        speak(sentence)
    if unusable:
        raise InputError(
            f"{len(unusable):,} files cannot be read, for the reasons above. Mend them, or leave them out."
        )


def _kind(data: CheckOptions) -> Kind:
    """What the first records are, of the first file that has any, or what their fields are said to mean.

    Raises:
        InputError: no file has any; the others' reasons are said before the last one's.
    """
    if data.keys and data.keys.keys() <= _OF_PROMPTS:
        return "prompts"
    if data.keys:
        return "preferences" if data.keys.keys() & set(ONLY_PREFERENCES) else "conversations"
    if data.paths and is_prepared(data.paths[0]):
        return _kind_of(data.paths[0], data)
    unusable = []
    for file in list_files(data.paths).files:
        try:
            return _kind_of(file.path, data)
        except InputError as error:
            unusable.append(str(error))
    _name(unusable)
    raise AssertionError("there is a file, or list_files has said so")


def _kind_of(path: str, data: CheckOptions) -> Kind:
    if are_preferences([path], only(PreferenceOptions, data)):
        return "preferences"
    try:
        has_turns = are_conversations([path], only(ConversationOptions, data), data)
    except InputError:
        if are_prompts(path):
            return "prompts"
        raise
    if not has_turns:
        return "text"
    return "prompts" if are_prompts(path) else "conversations"


if __name__ == "__main__":
    # Messages about templates name the training job's flag.
    run(main, CheckConfig, aliases={"data": "data.paths", "chat.template": "template"})
