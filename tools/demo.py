"""Run the whole regime on the bundled sample, printing the command of each stage as a user would type it.

    make demo

Some minutes on two CPU cores, no network. On a machine with a GPU the same commands use it. Interrupted, the same
command goes on. Exit code 4: the figures are not where they should be.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.launch import EXIT_GATE
from samples.chain.figures import figures, gains, out_of_place
from samples.chain.page import write_page
from samples.chain.stages import STAGES, Ledger, run_stages
from samples.chain.table import aligned, rows, times
from samples.ranking import ranking


def main() -> int:
    ledger = Ledger(ROOT, STAGES)
    code = run_stages(STAGES, ledger, ROOT)
    if code:
        return code
    found = figures(ROOT)
    print("\nHeld-out figures, with 95% intervals:")
    print("\n".join(aligned(rows(found))))
    print("\nBy each task's first metric: < is surely worse than the next, > surely better, ~ not surely either.")
    print("\n".join(ranking(ROOT / "ckpt" / "evaluation" / "report.json")))
    print("\n" + "\n".join(times(STAGES, ledger.read())))
    print(f"{write_page(ROOT, STAGES, found).relative_to(ROOT)}: the figures, the curves, and every model's answers")
    wrong = out_of_place(found, gains(ROOT))
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    if wrong:
        return EXIT_GATE
    print("\nTalk to the last model:\n$ python tools/chat.py --model ckpt/ppo")
    return 0


if __name__ == "__main__":
    sys.exit(main())
