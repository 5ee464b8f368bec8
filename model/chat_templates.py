"""The chat templates that go by a name, as the Jinja text that is stored beside a model.

Each writes a conversation of [system] user assistant user assistant .., and ends every answer with one token.
"""

from __future__ import annotations

from typing import NamedTuple


class NamedTemplate(NamedTuple):
    source: str
    needs: tuple[str, ...] = ()
    """tokens, or names of tokens such as bos_token, that the tokenizer must have"""


def _turns(system: str, user: str, assistant: str, header: str, before: str = "") -> str:
    """A template that writes message after message: Jinja expressions for each role and for an answer's header."""
    return (
        f"{before}{{% for message in messages %}}"
        f"{{% if message['role'] == 'system' %}}{{{{ {system} }}}}"
        f"{{% elif message['role'] == 'user' %}}{{{{ {user} }}}}"
        f"{{% else %}}{{{{ {assistant} }}}}{{% endif %}}"
        "{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ {header} }}}}{{% endif %}}"
    )


def _bracketed(human: str, bot: str) -> str:
    return _turns(
        system=r"message['content'] + '\n'",
        user=rf"'{human}:' + message['content'] + '\n'",
        assistant=f"'{bot}:' + message['content'] + eos_token",
        header=f"'{bot}:'",
    )


_PREAMBLE = "{{% if messages[0]['role'] != 'system' %}}{{{{ '{}' }}}}{{% endif %}}"

_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
).replace("'", r"\'")

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\\n\\n"
)

_LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    r"{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)

_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    r"{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

_CHATML = (
    "{% for message in messages %}"
    r"{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

NAMED_TEMPLATES = {
    "chimed": NamedTemplate(_bracketed("[human]", "[bot]")),
    "ziya": NamedTemplate(_bracketed("<human>", "<bot>")),
    "vicuna": NamedTemplate(
        _turns(
            before="{{ bos_token }}" + _PREAMBLE.format(_VICUNA),
            system="message['content'] + ' '",
            user="'USER: ' + message['content'] + ' '",
            assistant="'ASSISTANT: ' + message['content'] + eos_token",
            header="'ASSISTANT:'",
        )
    ),
    "llama2": NamedTemplate(_LLAMA2, needs=("bos_token",)),
    "llama3": NamedTemplate(_LLAMA3, needs=("bos_token", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "chatml": NamedTemplate(_CHATML, needs=("<|im_start|>", "<|im_end|>")),
    "alpaca": NamedTemplate(
        _turns(
            before="{{ bos_token }}" + _PREAMBLE.format(_ALPACA),
            system=r"message['content'] + '\n\n'",
            user=r"'### Instruction:\n' + message['content'] + '\n\n'",
            assistant=r"'### Response:\n' + message['content'] + eos_token",
            header=r"'### Response:\n'",
        )
    ),
    "plain": NamedTemplate(
        _turns(
            system=r"message['content'] + '\n'",
            user=r"message['content'] + '\n'",
            assistant="message['content'] + eos_token",
            header="''",
        )
    ),
}
