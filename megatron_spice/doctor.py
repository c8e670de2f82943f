"""What this machine has, what is missing for which recipe, and how to get it: `python -m megatron_spice doctor`.

Packages are looked up by their metadata, not imported: the doctor must answer on machines where importing one of them
would crash. Two questions need an import: whether torch itself sees the GPUs, and whether Transformer Engine, whose libraries
must fit torch's, can be used at all. They are asked in child processes, and only where `nvidia-smi` lists some.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from megatron_spice import machine
from megatron_spice.config.checks import check
from megatron_spice.config.errors import PIP_INSTALL, ConfigError
from megatron_spice.config.fp8_needs import EMULATED, NEEDS, fp8_obstacles
from megatron_spice.config.loader import load_config
from megatron_spice.config.schema import Config

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
INSTALL = "bash install.sh"


@dataclass(frozen=True, slots=True)
class Finding:
    """One row: `state` is "ok", "absent" (nothing lost that this machine could use), "missing" or "wrong"."""

    name: str
    state: str
    value: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Package:
    """A package the doctor looks for. `needed` is "always", "cuda" (on a GPU machine) or "never" (it only makes faster)."""

    title: str
    distributions: tuple[str, ...]
    needed: str
    purpose: str
    remedy: str = INSTALL


ENGINE = Package("transformer-engine", ("transformer-engine",), "cuda", "FP8 and fused layers")
ENGINE_REMEDY = f"{INSTALL}, and no other CUDA libraries in LD_LIBRARY_PATH"
PACKAGES = (
    Package("torch", ("torch",), "always", "tensors"),
    Package("megatron-core", ("megatron-core",), "always", "the policy"),
    Package("sglang", ("sglang",), "always", "rollouts"),
    Package("transformers", ("transformers",), "always", "tokenizers, model folders"),
    Package("math-verify", ("math-verify",), "always", "scores Integer and Expression answers"),
    Package("tensorboard", ("tensorboard",), "always", "metrics (telemetry.tensorboard)"),
    ENGINE,
    Package("flashinfer", ("flashinfer-python", "flashinfer"), "cuda", "SGLang's attention"),
    Package("sglang kernels", ("sglang-kernel", "sgl-kernel"), "cuda", "SGLang's CUDA kernels"),
    Package("DALI", ("nvidia-dali-cuda130", "nvidia-dali-cuda120"), "never", "corpus loading", f"{PIP_INSTALL} nvidia-dali-cuda130==2.4.0"),
    Package("flash-attn", ("flash-attn",), "never", "attention of the policy", f"{PIP_INSTALL} --no-build-isolation flash-attn"),
    Package("gigatoken", ("gigatoken",), "never", "faster tokenising of corpora"),
    Package("datatrove", ("datatrove",), "never", "corpus filters, deduplication", f"{PIP_INSTALL} -r requirements/stages.txt"),
    Package("reasoning-gym", ("reasoning-gym",), "never", "made-up questions (evaluate.py)", f"{PIP_INSTALL} -r requirements/evaluation.txt"),
    Package("wandb", ("wandb",), "never", "metrics (telemetry.wandb_project)", f"{PIP_INSTALL} wandb"),
)
APEX_REMEDY = "NVIDIA's is built from source: https://github.com/NVIDIA/apex"


def main(as_json: bool = False, nodes: int | None = None) -> int:
    """Prints the report and returns 0: an incomplete machine is a finding, not a failure.

    Args:
        nodes: of the cluster whose nodes are like this machine; None: as many as a recipe's name says.
    """
    gpus = machine.accelerators()
    report = {
        "machine": [*_hardware(gpus), *_batch_system()],
        "packages": [*(_package(package, bool(gpus)) for package in PACKAGES), _apex()],
        "training": [*(_fp8(recipe, gpus) for recipe in NEEDS), _fused_optimiser(gpus), _gradient_fusion(gpus)],
        "recipes": [_recipe(path, gpus, nodes or nodes_in_name(path)) for path in sorted(EXAMPLES.glob("*.yaml"))],
    }
    if as_json:
        print(json.dumps({name: [asdict(row) for row in rows] for name, rows in report.items()}, indent=2))
    else:
        print("\n\n".join(_table(name, rows) for name, rows in report.items()))
    return 0


def _hardware(gpus: list[machine.Accelerator]) -> list[Finding]:
    cpu = machine.processor()
    memory, shared = machine.memory_gib(), machine.shared_memory_gib()
    rows = [
        Finding("python", *_python()),
        Finding("processor", "ok", f"{cpu['model']}, {cpu['cores']} usable cores"),
        Finding("CPU features", "ok", " ".join(cpu["features"]) or "none of " + " ".join(machine.CPU_FEATURES)),
        Finding("memory", "ok", f"{memory:.1f} GiB" if memory is not None else "unknown"),
        _shared_memory(shared),
    ]
    if not gpus:
        note = "nvidia-smi is there but lists none" if shutil.which("nvidia-smi") else "none (no nvidia-smi)"
        return [*rows, Finding("accelerators", "absent", f"{note}; runs on the CPU")]
    for gpu in gpus:
        rows.append(Finding("accelerator", "ok", f"{gpu.name}, {gpu.memory_mib / 1024:.0f} GiB, driver {gpu.driver}"))
    return [*rows, _torch_sees(len(gpus))]


def _python() -> tuple[str, str, str]:
    good = (3, 10) <= sys.version_info[:2] <= (3, 12)
    return ("ok" if good else "wrong", platform.python_version(), "" if good else "3.10 to 3.12; SPICE_PYTHON names one")


def _shared_memory(gib: float | None) -> Finding:
    if gib is None:
        return Finding("/dev/shm", "missing", "none", "weights travel to the engines through it: mount a tmpfs there")
    if gib < 1:
        return Finding("/dev/shm", "wrong", f"{gib:.2f} GiB", "too small for weights; for a container: --shm-size=16g")
    return Finding("/dev/shm", "ok", f"{gib:.1f} GiB")


def _torch_sees(expected: int) -> Finding:
    """Whether torch can use what nvidia-smi lists; a driver that is too old shows here."""
    counted = machine.output_of([sys.executable, "-c", "import torch; print(torch.cuda.device_count())"], timeout=120)
    if counted is None:
        return Finding("torch on CUDA", "missing", "torch cannot be imported", INSTALL)
    if counted != str(expected):
        return Finding("torch on CUDA", "wrong", f"torch sees {counted} of {expected} GPUs", "CUDA build of torch, newer driver?")
    return Finding("torch on CUDA", "ok", f"torch sees {counted} GPUs")


def _batch_system() -> list[Finding]:
    slurm, runtimes = machine.slurm(), machine.container_runtimes()
    return [
        Finding("Slurm", "ok", slurm) if slurm else Finding("Slurm", "absent", "no sinfo; slurm/spice.sh runs on this machine"),
        Finding("containers", "ok" if runtimes else "absent", ", ".join(runtimes) or "none"),
    ]


def _package(package: Package, has_gpu: bool) -> Finding:
    found = machine.first_version(*package.distributions)
    if found and package is ENGINE and has_gpu and (failure := _engine_failure()):
        return Finding(package.title, "wrong", f"{found}, cannot be imported: {failure}", ENGINE_REMEDY)
    if found:
        return Finding(package.title, "ok", found)
    needed = package.needed == "always" or (package.needed == "cuda" and has_gpu)
    remedy = package.remedy if needed or package.needed == "never" else ""
    reason = "" if package.needed == "always" else "optional" if package.needed == "never" else "only for GPUs"
    return Finding(package.title, "missing" if needed else "absent", ", ".join(filter(None, [reason, package.purpose])), remedy)


def _apex() -> Finding:
    apex = machine.apex()
    if apex.state == "nvidia":
        return Finding("Apex", "ok", apex.version or "found, version unknown")
    if apex.state == "unbuilt":
        value = "NVIDIA's, built without its CUDA extensions: not used"
        return Finding("Apex", "wrong", value, f"build it anew with them. {APEX_REMEDY}")
    if apex.state == "wrong":
        return Finding(
            "Apex",
            "wrong",
            f"apex {apex.version or '(unknown version)'} is another project of that name, not NVIDIA's (no apex.optimizers)",
            f".venv/bin/python -m pip uninstall apex. {APEX_REMEDY}",
        )
    return Finding("Apex", "absent", "optional, fused optimiser", f"not the apex on PyPI, another project; {APEX_REMEDY}")


def _fp8(recipe: str, gpus: list[machine.Accelerator]) -> Finding:
    """Whether `policy.fp8.recipe` would run in real FP8 here, or be emulated, and what is missing for it."""
    name = f"FP8 {recipe}"
    if not gpus:
        if recipe in EMULATED:
            return Finding(name, "ok", "emulated on the CPU: operands rounded to FP8, wider products")
        return Finding(name, "absent", f"needs a GPU; emulated are {' and '.join(EMULATED)}")
    obstacles = _fp8_obstacles(recipe)
    if obstacles:
        return Finding(name, "missing", "", "\n".join(obstacles))
    engine, capability = machine.first_version(*ENGINE.distributions), machine.compute_capability()
    gpu = "of unknown compute capability" if capability is None else "of compute capability {}.{}".format(*capability)
    return Finding(name, "ok", f"Transformer Engine {engine}, GPUs {gpu}, CUDA {machine.torch_cuda()}")


def _fp8_obstacles(recipe: str) -> list[str]:
    engine = machine.first_version(*ENGINE.distributions)
    found = fp8_obstacles(recipe, engine, machine.compute_capability(), machine.torch_cuda())
    return [*found, *_broken_engine()]


@cache
def _engine_failure() -> str | None:
    """What keeps the Transformer Engine that is installed from being imported after torch, as the policy does; None: nothing."""
    return machine.import_failure("torch", "transformer_engine.pytorch")


def _broken_engine() -> list[str]:
    """That Transformer Engine is installed and of no use, if so."""
    version = machine.first_version(*ENGINE.distributions)
    failure = version and _engine_failure()
    return [f"Transformer Engine {version} is installed and cannot be imported ({failure}): {ENGINE_REMEDY}"] if failure else []


def _has_engine() -> bool:
    return machine.first_version(*ENGINE.distributions) is not None and not _broken_engine()


def _fused_optimiser(gpus: list[machine.Accelerator]) -> Finding:
    """Whose Adam a run would take, in the order of policy/fused.py."""
    name = "fused optimiser"
    if not gpus:
        return Finding(name, "absent", "torch's AdamW; fused ones are for GPUs")
    if machine.apex().state == "nvidia":
        return Finding(name, "ok", "Apex FusedAdam")
    if _has_engine():
        return Finding(name, "ok", "Transformer Engine FusedAdam")
    return Finding(name, "missing", "torch's AdamW", f"Transformer Engine has one: {INSTALL}. {APEX_REMEDY}")


def _gradient_fusion(gpus: list[machine.Accelerator]) -> Finding:
    """Whether weight gradients are added to the float32 buffer as they are computed. Transformer Engine's layers do it
    themselves; Apex's kernel is for Megatron's own, which a run takes only without Transformer Engine."""
    name = "weight-gradient fusion"
    if not gpus:
        return Finding(name, "absent", "torch: a gradient, then an addition; fused ones are for GPUs")
    if _has_engine():
        return Finding(name, "ok", "Transformer Engine, in its layers")
    if machine.apex().state == "nvidia" and machine.has_module("fused_weight_gradient_mlp_cuda"):
        return Finding(name, "ok", "Apex, in Megatron's layers")
    return Finding(name, "missing", "torch: a gradient, then an addition", f"Transformer Engine has it: {INSTALL}")


def nodes_in_name(recipe: Path) -> int:
    """The nodes of a recipe that is named <model>-<nodes>n<gpus>g-..., 1 for any other."""
    said = re.search(r"-(\d+)n\d+g-", recipe.name)
    return int(said[1]) if said else 1


def _recipe(path: Path, gpus: list[machine.Accelerator], nodes: int) -> Finding:
    """Whether a recipe can run on so many nodes like this machine, and if not, everything that is in its way."""
    try:
        config = load_config(path)
    except ConfigError as error:
        return Finding(path.name, "wrong", "; ".join(error.problems))
    obstacles = _lacks(config, gpus)
    try:
        check(config, nodes)
    except ConfigError as error:
        obstacles += error.problems
    kind = "cpu" if not gpus and config.cluster.device == "auto" else config.cluster.device
    value = f"{kind}, {config.policy.precision}, {config.cluster.ranks_per_node} ranks a node{f', {nodes} nodes' if nodes > 1 else ''}"
    if not obstacles:
        return Finding(path.name, "ok", value)
    if path.name == "quickstart.yaml" and not config.policy.model.exists():
        return Finding(path.name, "missing", value, "its model and texts are not there yet: bash examples/quickstart.sh")
    return Finding(path.name, "missing", value, "\n".join(obstacles))


def _lacks(config: Config, gpus: list[machine.Accelerator]) -> list[str]:
    lacks = []
    for package in PACKAGES:
        needed = package.needed == "always" or (package.needed == "cuda" and gpus and config.cluster.device != "cpu")
        if needed and machine.first_version(*package.distributions) is None:
            lacks.append(f"{package.title} is not installed: {package.remedy}")
    if gpus and config.cluster.device != "cpu":
        lacks += _fp8_obstacles(config.policy.fp8.recipe) if config.policy.precision == "fp8" else _broken_engine()
    if config.cluster.device == "cuda" and len(gpus) < config.cluster.ranks_per_node:
        lacks.append(f"{config.cluster.ranks_per_node} GPUs a node (cluster.ranks_per_node), this machine has {len(gpus)}")
    return lacks


def _table(title: str, rows: list[Finding]) -> str:
    name_width = max((len(row.name) for row in rows), default=0)
    lines = [title]
    for row in rows:
        lines.append(f"  {row.name:<{name_width}}  {row.state:<7}  {row.value}")
        lines += [f"  {'':<{name_width}}  {'':<7}    -> {line}" for line in row.remedy.splitlines()]
    return "\n".join(lines)
