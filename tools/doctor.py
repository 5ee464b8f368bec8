"""Say whether training can work here: what is there, what is missing, what to do.

    python tools/doctor.py [--out ckpt]
    torchrun --nproc-per-node 8 tools/doctor.py [--out ckpt]      the ranks and their links too, on one host or more

Exit code 0, or 2 where training cannot work.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.doctor.finding import render
from engine.doctor.gpus import gpus
from engine.doctor.ranks import group, ranks
from engine.doctor.software import software
from engine.doctor.storage import storage


class Parser(argparse.ArgumentParser):
    """Says what is wrong in a sentence, as the other tools do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{message[:1].upper()}{message[1:]}. See --help.\n")


def main() -> int:
    # Not the parser of the other tools: it needs packages, and this must run without any.
    parser = Parser(description="Say whether training can work here.")
    parser.add_argument("--out", default="ckpt", type=Path, help="where runs will be written (default: ckpt)")
    out = parser.parse_args().out
    peers = group()
    findings = [*software(), *gpus(), *storage(out, peers.on_this_host if peers else 1)]
    has_torch = not any(finding.name == "torch" and finding.state == "wrong" for finding in findings)
    if peers and has_torch:
        findings += ranks(out, findings)
    if peers is None or peers.rank == 0:
        print(render(findings))
    return 2 if any(finding.state == "wrong" for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(main())
