import re
import subprocess
import sys
import time
from collections import Counter

import pytest

from benchmarks.measure import PeakMemory, machine, measured

MB = 1_000_000
HOLD = "import time; block = b'x' * 200_000_000; time.sleep(1); print('done')"


def python(program):
    return [sys.executable, "-c", program]


def test_a_command_is_measured_and_its_output_handed_back():
    seconds, peak_bytes, stdout = measured(python(HOLD))
    assert stdout == "done\n"
    assert seconds > 1
    assert peak_bytes == pytest.approx(200 * MB, rel=0.15)


def test_grandchildren_count_too():
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLD!r}])"
    assert measured(python(program)).peak_bytes == pytest.approx(200 * MB, rel=0.15)


def test_a_process_that_outlives_its_parent_still_counts():
    program = """
import os, sys
if os.fork() == 0:
    if os.fork() == 0:
        print("both are there", flush=True)
        input()  # the first sample is taken, now the parent may end
        os.kill(os.getppid(), 9)
        block = b"x" * 200_000_000
        print("held", flush=True)
        sys.stdin.read()
        os._exit(0)
    os.wait()
os.wait()
sys.stdin.read()
"""
    with subprocess.Popen(
        python(program), stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        with PeakMemory(process.pid) as memory:
            process.stdin.write(b"\n")
            process.stdout.readline()
        process.stdin.close()
    assert memory.peak_bytes == pytest.approx(200 * MB, rel=0.15)


def test_memory_that_two_children_map_counts_once():
    program = """
import mmap, os, time
pages = mmap.mmap(-1, 200_000_000)
for _ in range(2):
    if os.fork() == 0:
        for _ in range(200):
            pages.write(b"x" * 1_000_000)
        os._exit(time.sleep(3) or 0)
os.wait(), os.wait()
"""
    with subprocess.Popen(python(program)) as process, PeakMemory(process.pid) as memory:
        process.wait()
    assert memory.peak_bytes == pytest.approx(200 * MB, rel=0.15)
    assert memory.by_kind_at_peak["shared memory"] == pytest.approx(200 * MB, rel=0.05)


def test_a_block_is_measured_even_while_it_keeps_the_interpreter_busy():
    program = """
from benchmarks.measure import PeakMemory
with PeakMemory() as idle:
    pass
with PeakMemory() as busy:
    rows = [float(number) for number in range(5_000_000)]
assert busy.by_kind_at_peak["driver"] == busy.peak_bytes
print(busy.peak_bytes - idle.peak_bytes)
"""
    grown = int(measured(python(program)).stdout)
    assert grown == pytest.approx(200 * MB, rel=0.15)  # 32 bytes a float, 8 for its place


def test_a_command_that_fails_says_so():
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        measured(python("raise SystemExit(3)"))


@pytest.mark.ray
def test_workers_and_the_object_store_of_ray_are_told_apart(ray_cluster):
    import numpy as np
    import ray

    @ray.remote
    def hold(block):
        mine = np.ones(100 * MB, np.int8)
        time.sleep(2)
        return int(mine.sum() + block.sum())

    # Every worker has started and imported what it needs before memory is compared.
    ray.get([hold.remote(np.ones(1, np.int8)) for _ in range(2)])
    with PeakMemory() as before:
        pass
    block = ray.put(np.ones(150 * MB, np.int8))
    with PeakMemory() as memory:
        assert ray.get(hold.remote(block)) == 250 * MB
    more = Counter(memory.by_kind_at_peak)
    more.subtract(before.by_kind_at_peak)
    assert more["shared memory"] == pytest.approx(150 * MB, rel=0.15)
    assert more["ray workers"] > 0.9 * 100 * MB
    assert memory.by_kind_at_peak["ray system"] > 50 * MB


def test_the_machine_is_a_line():
    assert re.fullmatch(
        r"\d+ cores of .+, \d+ GiB, Python 3\.\d+\.\d+, 20\d\d-\d\d-\d\d", machine()
    )
