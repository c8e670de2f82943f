"""Order of the tests: what takes milliseconds first, what starts processes and loads models last."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from slurm_cluster import Cluster, cluster_or_skip

# How long an example takes says how busy the machine is, not whether the law holds.
hypothesis.settings.register_profile("default", deadline=None)
hypothesis.settings.load_profile("default")

ROOT = Path(__file__).parent
FIRST = ("config", "game", "corpus", "telemetry", "evaluation", "tools")
LAST = ("weights", "checkpoint", "policy", "cluster", "rollout", "train")


@pytest.fixture(scope="session")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster_or_skip(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        yield running


@pytest.fixture
def slurm(_cluster: Cluster) -> Iterator[Cluster]:
    """One real Slurm for all tests, which each finds empty and with both nodes."""
    yield _cluster
    _cluster.clear()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rewrite-snapshots", action="store_true", help="write what is found to tests/snapshots instead of comparing")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _rank(item.path.relative_to(ROOT).parts))


def _rank(parts: tuple[str, ...]) -> int:
    room = parts[0] if len(parts) > 1 else ""
    if room in FIRST:
        return FIRST.index(room)
    return len(FIRST) + (1 + LAST.index(room) if room in LAST else 0)
