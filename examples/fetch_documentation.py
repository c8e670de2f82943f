"""Fetches some 200 MB of English text for benchmarks: the documentation of Rust, OpenJDK, SageMath and C++ as Debian packs it.

    python examples/fetch_documentation.py assets/documentation.jsonl    # {"text", "source"} a line, one document a page

Needs Debian or Ubuntu (`apt-get download` and `dpkg-deb`, no root): 108 MB come over the network, nothing is installed. Pages are
HTML; what is kept is their text. Versions drift with the distribution's point releases, so the texts are alike, not identical.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

PACKAGES = ("rust-doc", "openjdk-17-doc", "sagemath-doc", "cppreference-doc-en-html")
MIN_CHARACTERS = 200
_AT_ONCE = 200  # pages

_UNSEEN = re.compile(r"(?is)<(script|style|head|nav)\b.*?</\1>")
_ENDS_LINE = re.compile(r"(?i)<(?:/p|/h[1-6]|/li|/tr|/pre|/div|br)\b[^>]*>")
_TAG = re.compile(r"<[^>]*>")


def unpack(package: str, folder: Path) -> Path:
    """The files of a package, without installing it.

    Raises:
        SystemExit: apt cannot get it.
    """
    place = folder / package
    place.mkdir()
    got = subprocess.run(["apt-get", "download", "-q", package], cwd=place, stdout=subprocess.DEVNULL, check=False)
    files = list(place.glob("*.deb"))
    if got.returncode or len(files) != 1:
        raise SystemExit(f"apt-get could not download {package}; try apt-get update, and see whether the release has it")
    subprocess.run(["dpkg-deb", "-x", files[0].name, "."], cwd=place, check=True)
    return place


def page_text(page: Path) -> str:
    """The text of an HTML page: a line for each paragraph, item or row."""
    text = _ENDS_LINE.sub("\n", _UNSEEN.sub(" ", page.read_text(encoding="utf-8", errors="replace")))
    text = re.sub(r"[ \t\r\f]+", " ", html.unescape(_TAG.sub("", text)))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()


def documents(pages: list[Path], source: str) -> list[str]:
    """JSON lines of the pages that have something to say."""
    texts = map(page_text, pages)
    return [json.dumps({"text": t, "source": source}, ensure_ascii=False) + "\n" for t in texts if len(t) >= MIN_CHARACTERS]


def all_documents(folder: Path) -> Iterator[str]:
    """JSON lines of all packages, in a fixed order."""
    with ProcessPoolExecutor() as pool:
        for package in PACKAGES:
            pages = sorted(page for page in unpack(package, folder).rglob("*.html") if page.is_file())
            batches = [pages[begin : begin + _AT_ONCE] for begin in range(0, len(pages), _AT_ONCE)]
            for lines in pool.map(documents, batches, [package] * len(batches)):
                yield from lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    if output.exists():
        print(f"{output} is there already")
        return
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            sys.exit(f"no {program} here: this needs Debian or Ubuntu; any JSON lines with a `text` will do instead")
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.partial")
    with tempfile.TemporaryDirectory(dir=output.parent) as folder, partial.open("w", encoding="utf-8") as file:
        file.writelines(all_documents(Path(folder)))
    partial.rename(output)
    print(f"{output}: {output.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
