"""Run the whole regime on the bundled sample, printing the command of each stage as a user would type it.

    make demo
    make demo-lora        # and then each stage with adapters of rank 8, beside what training all weights has brought

Some minutes on two CPU cores, no network. On a machine with a GPU the same commands use it. Interrupted, the same
command goes on. Exit code 4: the figures are not where they should be.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.launch import EXIT_GATE
from samples.chain.figures import ADAPTERS, FULL, Chain, figures, gains, out_of_place
from samples.chain.page import write_page
from samples.chain.stages import ADAPTER_STAGES, STAGES, Ledger, run_stages
from samples.chain.table import aligned, beside, rows, times
from samples.ranking import ranking


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lora", action="store_true", help="then every stage with adapters of rank 8 beside it")
    is_adapted = parser.parse_args(arguments).lora
    stages = (*STAGES, *ADAPTER_STAGES) if is_adapted else STAGES
    ledger = Ledger(ROOT, stages)
    code = run_stages(stages, ledger, ROOT)
    if code:
        return code
    wrong = _conclude(FULL)
    if is_adapted:
        wrong += _conclude(ADAPTERS)
        print("\nHow far adapters lie from training all weights, and where that should be:")
        print("\n".join(aligned(beside(ADAPTERS.bands, figures(ROOT, ADAPTERS), gains(ROOT, ADAPTERS)))))
    print("\n" + "\n".join(times(stages, ledger.read())))
    page = write_page(ROOT, STAGES, figures(ROOT)).relative_to(ROOT)
    print(f"{page}: the figures, the curves, and every model's answers")
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    if wrong:
        return EXIT_GATE
    print("\nTalk to the last model:\n$ python tools/chat.py --model ckpt/ppo")
    return 0


def _conclude(chain: Chain) -> list[str]:
    """Print a chain's figures; returns a sentence for each that is not where it should be."""
    found = figures(ROOT, chain)
    print("\nHeld-out figures, with 95% intervals:")
    print("\n".join(aligned(rows(found, chain.models))))
    print("\nBy each task's first metric: < is surely worse than the next, > surely better, ~ not surely either.")
    print("\n".join(ranking(ROOT / "ckpt" / chain.evaluation / "report.json")))
    return out_of_place(found, gains(ROOT, chain), chain.bands)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
