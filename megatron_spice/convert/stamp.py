"""What tells whether a model's folder is still the same: the names, sizes and times of its files. Reading weights would take minutes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def stamp(folder: Path) -> str:
    """16 hexadecimal digits that change when files of `folder` do."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    listed = sorted((str(f.relative_to(folder)), f.stat().st_size, f.stat().st_mtime_ns) for f in files)
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]
