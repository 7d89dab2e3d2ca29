"""Limits of control groups, as containers of both versions and service managers set them."""

from pathlib import Path

import pytest

from worker import cgroup
from worker.supervisor.slots import cores

pytestmark = pytest.mark.unit


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroup, "ROOT", tmp_path / "cgroup")
    monkeypatch.setattr(cgroup, "OWN", tmp_path / "own")
    return tmp_path / "cgroup"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n", encoding="ascii")


def test_a_host_without_groups_sets_no_limit(root: Path) -> None:
    assert not root.exists()
    assert (cgroup.memory_bytes(), cgroup.processors()) == (None, None)
    write(cgroup.OWN, "0::/user.slice")
    assert (cgroup.memory_bytes(), cgroup.processors()) == (None, None)


def test_a_container_of_version_2_sees_its_own_group_as_the_root(root: Path) -> None:
    write(cgroup.OWN, "0::/")
    write(root / "memory.max", "2000")
    write(root / "cpu.max", "150000 100000")
    assert (cgroup.memory_bytes(), cgroup.processors()) == (2000, 1.5)
    write(root / "memory.max", "max")
    write(root / "cpu.max", "max 100000")
    assert (cgroup.memory_bytes(), cgroup.processors()) == (None, None)


def test_the_narrowest_of_the_groups_around_a_service_counts(root: Path) -> None:
    write(cgroup.OWN, "0::/system.slice/worker.service")
    write(root / "system.slice" / "worker.service" / "memory.max", "3000")
    write(root / "system.slice" / "memory.max", "2500")
    write(root / "user.slice" / "memory.max", "10")
    write(root / "system.slice" / "cpu.max", "max 100000")
    write(root / "system.slice" / "worker.service" / "cpu.max", "200000 100000")
    assert (cgroup.memory_bytes(), cgroup.processors()) == (2500, 2.0)


@pytest.mark.parametrize("where", ["", "docker/abc"], ids=["its own group alone is mounted", "all are"])
def test_version_1_has_a_tree_for_memory(where: str, root: Path) -> None:
    write(cgroup.OWN, "12:cpu,cpuacct:/docker/abc\n9:memory:/docker/abc\n1:name=systemd:/docker/abc\n0::/docker/abc")
    write(root / "memory" / where / "memory.limit_in_bytes", "4000")
    assert cgroup.memory_bytes() == 4000


def test_the_processors_of_a_quota_are_the_cores_of_the_slots(root: Path) -> None:
    write(root / "cpu.max", "100000 100000")
    assert cores() == 1
    write(root / "cpu.max", "50000 100000")
    assert cores() == 1
    write(root / "cpu.max", "1000000000 100000")
    unlimited = cores()
    write(root / "cpu.max", "max 100000")
    assert cores() == unlimited
