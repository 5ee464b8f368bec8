"""All tasks by name, and how words of --tasks become tasks. A name module:function is a builder of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.user_code import load_function, names_function
from evals import attitudes, choice, entities, generation, perplexity, reward
from evals.eval_config import require_file_name
from evals.suite import BuildContext, Builder, Judge, TaskSpec, nearest, parse_spec
from evals.task import Prompt, Task
from model.errors import InputError

_PROMPTINGS = ("auto", "chat", "plain")


BUILDERS: dict[str, Builder] = {
    **choice.BUILDERS,
    **entities.BUILDERS,
    **generation.BUILDERS,
    **attitudes.BUILDERS,
    **reward.BUILDERS,
    **perplexity.BUILDERS,
}


@dataclass(frozen=True)
class Suite:
    """What is asked of every model.

    words: of --tasks.
    seed, limit, judge: as in `BuildContext`; a word's own limit goes first.
    more: builders of tasks that `evals` does not have.
    """

    words: Sequence[str | Mapping[str, Any]]
    seed: int = 0
    limit: int | None = None
    judge: Judge | None = None
    more: Mapping[str, Builder] = field(default_factory=dict)

    def build(self, has_template: bool, fits: Callable[[Prompt, int], bool] | None = None) -> dict[str, Task]:
        """The tasks by their labels, for a model.

        Args:
            has_template: whether it can be asked messages.
            fits: as in `BuildContext`.
        Raises:
            InputError: a word, an option or a file is wrong; or there is nothing to ask.
        """
        tasks: dict[str, Task] = {}
        builders = {**BUILDERS, **self.more}
        for word in self.words:
            spec = parse_spec(word)
            if names_function(spec.name):
                builders[spec.name] = load_function(spec.name, "--tasks")
            if spec.name not in builders:
                raise InputError(f"--tasks {spec.name}: there is no such task. {nearest(spec.name, sorted(builders))}")
            label = spec.take_str("label", spec.name.partition(":")[2] or spec.name)
            require_file_name(label, f"--tasks {spec.name}")
            if label in tasks:
                raise InputError(f"--tasks: two are called {label}. Give one of them another name with label=NAME.")
            context = self._context(spec, has_template, fits)
            tasks[label] = builders[spec.name](spec, context)
            spec.check_all_taken()
            if not tasks[label].requests():
                raise InputError(f"--tasks {spec.name}: there is nothing to ask in {spec.path}. Give another file.")
        return tasks

    def _context(self, spec: TaskSpec, has_template: bool, fits: Callable[[Prompt, int], bool] | None) -> BuildContext:
        prompting = spec.take_choice("prompting", _PROMPTINGS)
        if prompting == "chat" and not has_template:
            raise InputError(
                f"--tasks {spec.name}: prompting=chat, but the model stores no chat template. Name one with "
                "--template, or use prompting=plain."
            )
        limit = spec.take_int("limit", self.limit, low=1)
        is_chat = has_template if prompting == "auto" else prompting == "chat"
        return BuildContext("chat" if is_chat else "plain", self.seed, limit, self.judge, fits)
