"""The job from the command line: what it reads, what it says, what it leaves."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from engine.metrics import Speed, Speedometer
from model.chat import ChatTemplate, Message
from model.generate import Generator, Request
from model.sampling import SamplingOptions
from model.tokenizer import Tokenizer
from tests.small_base import small_conversations, write_small_base, write_small_conversations
from tests.tools.in_child import TOOLS, run_tool
from tests.tools.small_job import held_out_losses, losses, rows, weights
from tests.tools.small_sft import sft, write_small_sft_job

QUIET = ("--log.tensorboard", "false", "--log.curves", "false")
SHOWN = "你是医生。\n[human]:患者0，头晕，怎么办？\n[bot]:⟦可能是高血压，注意休息。<eos>⟧\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job, and its plain run in `run`: four steps on one process."""
    folder = write_small_sft_job(tmp_path_factory.mktemp("job"))
    said = sft(folder, "run").stderr
    (folder / "said").write_text(said, encoding="utf-8")
    return folder


def test_without_flags_the_bundled_dialogues_follow_pre_training(tmp_path: Path) -> None:
    write_small_base(tmp_path / "ckpt" / "pretrain", context=512)
    shorter = ("--train.steps", 6, "--eval.max_tokens", 4000, "--data.workers", 1)
    (ended,) = run_tool("sft", *shorter, *QUIET, cwd=tmp_path)
    assert ended.code == 0, ended.stderr
    assert "No --data: these are the bundled dialogues." in ended.stderr
    out = tmp_path / "ckpt" / "sft"
    assert losses(out)[-1] < losses(out)[0]
    seen = held_out_losses(out)
    assert seen[6] < seen[0]
    assert json.loads((out / "MODEL_COMPLETE").read_text())["stage"] == "sft"


def test_what_will_be_trained_on_is_said_at_the_start(folder: Path) -> None:
    said = (folder / "said").read_text(encoding="utf-8")
    assert "300 conversations with 630 answers;" in said
    shortened = re.search(r"Longer than the context of 128 tokens: (\d+) conversations lost their (\d+) oldest", said)
    assert shortened is not None and int(shortened[2]) >= int(shortened[1]) > 0
    assert re.search(r"\d+ conversations, [\d,]+ tokens to train on; \d+ conversations, [\d,]+ tokens held out\.", said)
    filled = re.search(r"An epoch fills (\d+) packs of 256 tokens with ([\d.]+)% padding\.", said)
    assert filled is not None and int(filled[1]) > 90 and 0 < float(filled[2]) < 10
    assert f"The chat template is chimed. One conversation, trained tokens marked:\n{SHOWN}" in said


def test_steps_follow_from_epochs_and_packs(folder: Path) -> None:
    recipe = yaml.safe_load((folder / "run" / "config.yaml").read_text())
    assert (recipe["train"]["epochs"], recipe["optim"]["beta2"], recipe["optim"]["weight_decay"]) == (2.0, 0.98, 1e-4)
    packs = int(re.findall(r"An epoch fills (\d+) packs", (folder / "said").read_text(encoding="utf-8"))[0])
    (ended,) = run_tool(
        "sft", *("--model", "base", "--data", "chats.jsonl", "--data.workers", 1, "--out", "whole", *QUIET),
        *("--train.micro_batch_tokens", 256, "--train.batch_tokens", 2048, "--eval.fraction", 0.1), cwd=folder,
    )  # fmt: skip
    assert ended.code == 0, ended.stderr
    resolved = yaml.safe_load((folder / "whole" / "config.yaml").read_text())
    assert resolved["train"]["steps"] == -(-2 * packs // 8) == len(losses(folder / "whole"))
    assert resolved["optim"]["lr"] == 1e-4


def test_the_published_directory_chats_in_transformers_as_it_does_here(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Long enough on few conversations for answers that end.
    write_small_conversations(folder / "few.jsonl", 8)
    learn = ("--data", "few.jsonl", "--train.steps", 80, "--train.batch_tokens", 256, "--optim.lr", 0.03)
    sft(folder, "tuned", *learn, "--eval.fraction", 0, "--checkpoint.every", 0)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "tuned", dtype=torch.float32)
    reader = AutoTokenizer.from_pretrained(folder / "tuned")
    tokenizer = Tokenizer.load(folder / "tuned")
    template = ChatTemplate.of(tokenizer)
    assert template is not None and template.name == "chimed"
    greedy = SamplingOptions(temperature=0.0, max_new_tokens=40, stop_ids=template.end_ids(tokenizer))
    generator = Generator.from_directory(folder / "tuned")
    for record in small_conversations(8):
        messages = [message for message in record[:2] if message["role"] != "assistant"]
        prompt = reader.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert template.encode_prompt(tokenizer, [Message(**message) for message in messages]) == prompt  # type: ignore[arg-type]
        answered = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)[0, len(prompt) :]
        (ours,) = generator.generate([Request(prompt, greedy)])
        assert ours.ids == answered.tolist()
        assert ours.end_reason == "stop" and (ours.text or "").startswith("可能是")


def write_chatml_base(directory: Path) -> Path:
    """A base whose answers end with a token of their own, beside the end of a document."""
    write_small_base(directory, context=128)
    path = directory / "tokenizer.json"
    table = json.loads(path.read_text())
    for number, content in enumerate(("<|im_start|>", "<|im_end|>"), 400):
        rules = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        table["added_tokens"].append({"id": number, "content": content, "special": True, **rules})
    path.write_text(json.dumps(table))
    return directory


def test_generation_config_lists_every_token_that_ends_an_answer(folder: Path) -> None:
    from transformers import GenerationConfig

    write_chatml_base(folder / "chatml-base")
    said = sft(folder, "chatml", "--model", "chatml-base", "--chat.template", "chatml", "--train.steps", 1).stderr
    assert "<|im_start|>assistant\n⟦可能是高血压，注意休息。<|im_end|>⟧" in said
    assert GenerationConfig.from_pretrained(folder / "chatml").eos_token_id == [401, 2]
    assert GenerationConfig.from_pretrained(folder / "run").eos_token_id == 2
    # The next stage takes template and end tokens from there.
    more = sft(folder, "more", "--model", "chatml", "--train.steps", 1).stderr
    assert "The chat template is chatml." in more
    assert json.loads((folder / "more" / "generation_config.json").read_text())["eos_token_id"] == [401, 2]


def test_a_model_is_trained_into_another_template_when_it_is_asked_to_replace_its_own(folder: Path) -> None:
    plain = ("--model", "run", "--chat.template", "plain", "--chat.replace", "true", "--train.steps", 1)
    said = sft(folder, "plain", *plain).stderr
    assert "The chat template is plain." in said
    stored = ChatTemplate.of(Tokenizer.load(folder / "plain"))
    assert stored is not None and stored.name == "plain"


def test_noise_is_the_same_on_any_number_of_processes_and_none_is_in_held_out_loss(folder: Path) -> None:
    noisy = ("--train.neftune_alpha", 5)
    sft(folder, "noisy", *noisy)
    sft(folder, "noisy-2", *noisy, world=2)
    assert losses(folder / "noisy-2") == pytest.approx(losses(folder / "noisy"), rel=1e-5)
    assert held_out_losses(folder / "noisy-2") == pytest.approx(held_out_losses(folder / "noisy"), rel=1e-5)
    # The same weights at first: noise shows in the loss that is trained, and not in the one that is judged.
    assert held_out_losses(folder / "noisy")[0] == held_out_losses(folder / "run")[0]
    assert abs(losses(folder / "noisy")[0] - losses(folder / "run")[0]) > 1e-4


def test_bf16_with_noise_and_recomputed_activations_learns(folder: Path) -> None:
    sft(folder, "half", "--train.precision", "bf16", "--train.recompute", "full", "--train.neftune_alpha", 5)
    assert [row["skipped"] for row in rows(folder / "half") if "loss" in row] == [0, 0, 0, 0]
    assert losses(folder / "half")[-1] < losses(folder / "half")[0]
    # The judged loss has no noise in it, and eight bits of mantissa.
    assert held_out_losses(folder / "half")[0] == pytest.approx(held_out_losses(folder / "run")[0], rel=2**-8)


def test_the_same_command_gives_the_same_bits_and_a_longer_one_goes_on(folder: Path) -> None:
    constant = ("--schedule.kind", "constant", "--schedule.warmup_steps", 0, "--train.neftune_alpha", 5)
    sft(folder, "whole-8", *constant, "--train.steps", 8)
    sft(folder, "parts", *constant, "--train.steps", 3)
    said = sft(folder, "parts", *constant, "--train.steps", 8).stderr
    assert "Resuming parts after step 3." in said
    assert rows(folder / "parts")[-6:] == rows(folder / "whole-8")[-6:]
    assert weights(folder / "parts") == weights(folder / "whole-8")


def write_laps() -> None:
    """Have the speedometer write down what it is told."""
    lap = Speedometer.lap

    def write(self: Speedometer, tokens: int, *rest: float) -> Speed:
        with open("laps", "a") as file:
            print(tokens, file=file)
        return lap(self, tokens, *rest)

    Speedometer.lap = write  # type: ignore[method-assign]


def test_speed_is_that_of_all_tokens_read_not_only_of_those_trained(folder: Path) -> None:
    sft(folder, "timed", before=write_laps)
    state = json.loads((folder / "timed" / "state" / "step-00000004" / "trainer.json").read_text())["trainer"]
    assert sum(map(int, (folder / "laps").read_text().split())) == state["cursor"]["tokens"]
    assert state["progress"]["tokens"] < 0.5 * state["cursor"]["tokens"], "most tokens are the prompts'"


def test_a_dry_run_plans_and_shows_one_conversation_and_writes_nothing(folder: Path) -> None:
    before = sorted(folder.iterdir())
    (ended,) = run_tool("sft", "--config", "sft.yaml", "--out", "never", "--dry-run", cwd=folder)
    assert ended.code == 0, ended.stderr
    assert [path for path in sorted(folder.iterdir()) if not path.name.startswith(".said")] == [
        path for path in before if not path.name.startswith(".said")
    ]
    estimated = re.search(r"data: about ([\d,]+) tokens", ended.stdout)
    counted = re.search(r"of ([\d,]+) tokens are trained", (folder / "said").read_text(encoding="utf-8"))
    assert estimated is not None and counted is not None
    about, exact = (int(found[1].replace(",", "")) for found in (estimated, counted))
    assert about == pytest.approx(exact, rel=0.1)
    assert re.search(r"^A rank needs [\d.]+ GiB", ended.stdout, re.MULTILINE)
    assert "4 steps of 1,024 tokens" in ended.stdout
    assert (
        "trained tokens marked:\n你是医生。\n[human]:患者0，头晕，怎么办？\n[bot]:⟦可能是高血压，注意休息。<eos>⟧\n"
        in ended.stdout
    )


def test_the_recipe_for_13b_is_planned_without_weights_or_gpu(tmp_path: Path) -> None:
    write_small_base(tmp_path / "base")
    facts = json.loads((tmp_path / "base" / "config.json").read_text())
    size = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
    size |= {"num_key_value_heads": 40, "head_dim": 128, "vocab_size": 39424, "max_position_embeddings": 4096}
    (tmp_path / "base" / "config.json").write_text(json.dumps({**facts, **size, "tie_word_embeddings": False}))
    (tmp_path / "base" / "model.safetensors").unlink()
    messages = json.dumps({"messages": small_conversations(1)[0]}, ensure_ascii=False)
    (tmp_path / "chats.jsonl").write_text(messages)
    recipe = TOOLS.parent / "configs" / "ziya2-13b" / "8x80gb" / "sft.yaml"
    card = ("--plan.world", 8, "--plan.device_gib", 79.1)
    (ended,) = run_tool(
        "sft", "--config", recipe, "--model", "base", "--data", "chats.jsonl", "--dry-run", *card, cwd=tmp_path
    )
    assert ended.code == 0, ended.stderr
    assert "it fits the 79.1 GiB" in ended.stdout
