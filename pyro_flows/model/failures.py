"""What a model raised, in a line: what it was, and near which site."""

from __future__ import annotations

import re

__all__ = ["in_a_line"]

_TRACE, _SITE = "Trace Shapes", re.compile(r"^ *(\S+) dist\b", re.MULTILINE)


def in_a_line(error: BaseException, limit: int = 300, site: str = "") -> str:
    """The error's kind and message, without Pyro's table of shapes, and the site that the model had reached: ``site``, or the last of that table."""
    message, _, table = str(error).partition(_TRACE)
    site = site or next(reversed(_SITE.findall(table)), "")
    text = " ".join(message.split())[:limit]
    return f"{type(error).__name__}: {text}" + (f" (at or after site {site!r})" if site else "")
