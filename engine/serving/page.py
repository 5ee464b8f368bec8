"""The chat page: one file, and the headers that keep it to itself."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files


def load_page() -> tuple[str, dict[str, str]]:
    """(HTML, headers). The browser runs this script and style alone, and lets them reach this server alone."""
    page = files("engine.serving").joinpath("page.html").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_source(page, 'script')}; style-src {_source(page, 'style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page, {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }


def _source(page: str, tag: str) -> str:
    """How Content-Security-Policy names the one element of that kind (CSP 3, section 2.3.1: 'sha256-…')."""
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
