"""Audit all kernels and leave the result as JSON, for the tests: `python -m kernels.offline FILE`.

A process of its own: kernels imported under TRITON_INTERPRET=1 cannot be compiled.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from kernels.offline.package import all_kernels, audit_package

if __name__ == "__main__":
    audit = audit_package()
    rows = {"rows": [asdict(row) for row in audit.rows], "kernels": list(all_kernels())}
    found = {"broken": audit.broken, "silent": audit.silent, "uncovered": audit.uncovered, "idle": audit.idle}
    Path(sys.argv[1]).write_text(json.dumps(rows | found), encoding="utf-8")
