"""Caches of compiled kernels belong on the node: on a shared file system a thousand processes compile, lock and overwrite the
same files at once, and NFS cannot lock what they believe they have locked.

Where, the first of these that can be written: SPICE_SCRATCH (slurm/site.sh), which is made if it is not there, and inside a Slurm
job SLURM_TMPDIR, TMPDIR or /tmp.
A folder of the user's own is made there, that no other user can write to: what is in it is executed. It stays when the job has
ended, where Slurm lets it, so that the next one does not compile again. On a single machine without SPICE_SCRATCH the libraries'
own places stay as they are. A variable that is set already is left alone.
"""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Iterable, Mapping
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
    """Variables to set on this node, with folders that are there; {} where the libraries' own places are right. A SPICE_SCRATCH
    that cannot be used is told on stderr."""
    asked = environment.get("SPICE_SCRATCH")
    places = [asked]
    if "SLURM_JOB_ID" in environment:
        places += [environment.get("SLURM_TMPDIR"), environment.get("TMPDIR"), "/tmp"]
    names = [name for name in FOLDERS if name not in environment]
    reason, used, found = "", "the libraries' own places", {}
    for place in filter(None, places):
        try:
            if place == asked:
                Path(place).mkdir(parents=True, exist_ok=True)
            found, used = _made(Path(place), names), place
            break
        except OSError as error:
            reason = reason or str(error)
    if asked and used != asked:
        print(f"spice: SPICE_SCRATCH={asked} cannot be used for caches ({reason}); {used} will be", file=sys.stderr)
    return found


def _made(place: Path, names: Iterable[str]) -> dict[str, str]:
    """The variables' folders in a folder in `place` that belongs to this user and nobody else can write to.

    Raises:
        OSError: there cannot be one.
    """
    folder = place / f"spice-{_user()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    is_ours = found.st_uid == os.geteuid() and not found.st_mode & 0o022 and folder.is_dir() and not folder.is_symlink()
    if not is_ours or not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is not a folder of this user's own that nobody else can write to")
    made = {name: folder / FOLDERS[name] for name in names}
    for path in made.values():
        path.mkdir(exist_ok=True)
    return {name: str(path) for name, path in made.items()}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an id without a name, in a container
        return str(os.geteuid())
