"""What lm-evaluation-harness makes of prompts and options, written down for `test_prompt_encoding.py`.

python -m venv lm && lm/bin/pip install 'lm_eval[hf]==0.4.13' torch
lm/bin/python tests/evals/record_encoding.py
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.evals.oracle_models import write_oracle_model  # noqa: E402

RECORD = ROOT / "tests" / "evals" / "recorded" / "encoding.json"
CONTEXT = 64
PAIRS = [
    ("题目：高血压的症状是\n答案：", "A"),
    ("题目：高血压的症状是\n答案：", " A"),
    ("题目：高血压的症状是\n答案： ", "B"),  # white space at the end belongs to the option
    ("正确答案是\n\n", "头晕"),
    ("正确答案　", "C"),  # an ideographic space is white space
    ("", "高血压患者头晕"),
    ("", " A"),
    ("答", "案"),  # one token where the vocabulary has it
    ("正", "确答案：对"),
    ("a fever, 38.5", " degrees"),
    ("选", "项选择正确"),
    ("高血压的症状是" * 20 + "答案：", "A"),  # longer than the context
    ("高血压的症状是" * 20, "头晕，乏力"),
    ("高血压的症状是" * 8, "头晕，乏力和心悸。" * 2),
]


def main() -> None:
    """Ask the harness, with the pairs it can ask: where an option is no token of its own, it fails."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    record = {}
    for kind in ("spm", "bytes"):
        with tempfile.TemporaryDirectory() as folder:
            write_oracle_model(Path(folder), kind, CONTEXT)
            model = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=1)
            pairs = []
            for prompt, option in PAIRS:
                if prompt:
                    begun, own = model._encode_pair(prompt, option)
                else:
                    begun, own = [model.prefix_token_id], model.tok_encode(option, add_special_tokens=False)
                pair = {"prompt": begun, "option": own}
                if own:
                    instance = Instance("loglikelihood", {}, (prompt, option), 0)
                    logprob, is_greedy = model.loglikelihood([instance], disable_tqdm=True)[0]
                    pair |= {"logprob": logprob, "is_greedy": is_greedy}
                pairs.append(pair)
            record[kind] = pairs
    packages = {name: version(name) for name in ("lm_eval", "transformers", "tokenizers", "torch")}
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps({"made by": packages, "context": CONTEXT, **record}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
