"""What users get wrong in asking how a step scales: one mistake a row of docs/errors.md."""

from __future__ import annotations

from tests.tools.mistakes import Mistake


def scaling(*words: object) -> Mistake:
    return Mistake("scaling", words)


MISTAKES_SCALING: dict[str, Mistake] = {
    "a number of GPUs that fills no whole nodes": scaling("--gpus", 8, 12),
    "a step that is no whole number of micro-batches": scaling("--tokens_per_gpu", 12288),
    "a micro-batch that is shorter than a document": scaling("--context", 4096, "--micro_batch_tokens", 2048),
    "a utilisation above 1": scaling("--mfu", 50),
    "a network without speed": scaling("--network", 0),
    "scaling of a model that there is not": scaling("--model", "ziya-13b"),
}
