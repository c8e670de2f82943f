"""Caches of compiled kernels belong on the node: on a shared file system a thousand processes compile, lock and overwrite the
same files at once, and NFS cannot lock what they believe they have locked.

Where, the first of these that can be written: SPICE_SCRATCH (slurm/site.sh), SLURM_TMPDIR, and inside a Slurm job TMPDIR or /tmp.
A folder of the user's own is made there, that no other user can write to: what is in it is executed. It stays when the job has
ended, where Slurm lets it, so that the next one does not compile again. On a single machine without SPICE_SCRATCH the libraries'
own places stay as they are. A variable that is set already is left alone.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Mapping
from pathlib import Path

# Variable -> folder below the scratch folder. XDG_CACHE_HOME is where those look that have no variable of their own.
FOLDERS = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "CUDA_CACHE_PATH": "cuda",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "SGLANG_CACHE_DIR": "sglang",
    "DG_JIT_CACHE_DIR": "deep_gemm",
    "SGLANG_DG_CACHE_DIR": "deep_gemm",
    "HF_MODULES_CACHE": "hf_modules",
    "XDG_CACHE_HOME": "cache",
}


def cache_folders(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables to set on this node, with folders that are there; {} where the libraries' own places are right."""
    places = [environment.get("SPICE_SCRATCH")]
    if "SLURM_JOB_ID" in environment:
        places += [environment.get("SLURM_TMPDIR"), environment.get("TMPDIR"), "/tmp"]
    for place in filter(None, places):
        if (folder := _own_folder(Path(place))) is not None:
            break
    else:
        return {}
    found = {name: str(folder / part) for name, part in FOLDERS.items() if name not in environment}
    for path in found.values():
        Path(path).mkdir(exist_ok=True)
    return found


def _own_folder(place: Path) -> Path | None:
    """A folder in `place` that belongs to this user and nobody else can write to; None where there cannot be one."""
    folder = place / f"spice-{_user()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    is_ours = found.st_uid == os.geteuid() and not found.st_mode & 0o022 and folder.is_dir() and not folder.is_symlink()
    return folder if is_ours and os.access(folder, os.W_OK) else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an id without a name, in a container
        return str(os.geteuid())
