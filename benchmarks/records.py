"""Files of measurements: one record a line, added as they come, so that a run which is started again goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Job = tuple[Record, Callable[[], Record]]  # what names a record, and what makes it


def complete(path: Path, jobs: Iterable[Job]) -> None:
    """Do the jobs whose records a file has not yet; one whose package or data are missing is left out."""
    records: list[Record] = json.loads(path.read_text()) if path.exists() else []
    for made, measure in jobs:
        if any(made.items() <= r.items() for r in records):
            continue
        try:
            records.append({**made, **measure()})
        except (ImportError, FileNotFoundError) as error:
            print(f"left out: {made}: {error}")
            continue
        print(records[-1], flush=True)
        path.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")


def rerender(path: Path, render: Callable[[list[Record]], str]) -> None:
    """Write the page of a file of records beside it."""
    path.with_suffix(".md").write_text(render(json.loads(path.read_text())), "utf-8")
