"""The package and its extras. `install.sh` is the way to install it: it picks the set that fits the machine."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def requirements(name: str) -> list[str]:
    """The requirements of `requirements/<name>.txt`, with the files that it includes."""
    found = []
    for line in (ROOT / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        line = line.split("#")[0].strip()
        if line.startswith("-r "):
            found += requirements(Path(line[3:].strip()).stem)
        elif line:
            found.append(line)
    return found


setup(
    name="megatron-spice",
    version="0.1.0",
    description="SPICE self-play reinforcement learning on Megatron-Core and SGLang",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["megatron_spice", "megatron_spice.*"]),
    include_package_data=True,
    package_data={"megatron_spice.cost": ["devices/*.json"], "megatron_spice.report": ["*.jinja", "*.css", "*.js"]},
    install_requires=["pydantic", "pyyaml"],
    extras_require={name: requirements(name) for name in ("cpu", "cuda", "stages", "evaluation", "test")},
    entry_points={"console_scripts": ["megatron-spice = megatron_spice.__main__:main"]},
)
