"""What a container leaves of a machine's memory."""

import psutil
import pytest

from ray_jobs.free_memory import free_memory_bytes

V2 = {
    "memory.max": "1000\n",
    "memory.current": "700\n",
    "memory.stat": "anon 600\ninactive_file 50\nactive_file 20\n",
}
V1 = {
    "memory/memory.limit_in_bytes": "1000",
    "memory/memory.usage_in_bytes": "700",
    "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 50\n",
}


@pytest.fixture
def cgroup(tmp_path):
    def write(files):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return write


@pytest.mark.parametrize("files", [V2, V1], ids=["v2", "v1"])
def test_a_container_leaves_its_limit_without_what_it_uses(cgroup, files):
    # Pages of files that nobody reads give way.
    assert free_memory_bytes(cgroup(files)) == 1000 - (700 - 50)


def test_a_container_that_is_full_leaves_nothing(cgroup):
    assert free_memory_bytes(cgroup(V2 | {"memory.current": "1200"})) == 0


@pytest.mark.parametrize(
    "files",
    [{}, V2 | {"memory.max": "max\n"}, V1 | {"memory/memory.limit_in_bytes": str(2**63 - 4096)}],
    ids=["no cgroup", "v2", "v1"],
)
def test_without_a_limit_the_machine_counts(cgroup, monkeypatch, files):
    free = type("Free", (), {"available": 12_345})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert free_memory_bytes(cgroup(files)) == 12_345
