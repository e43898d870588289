import time

import pytest
import ray

from data_lake.errors import SourceError
from data_lake.ingest import PartTask
from data_lake.sources import Part, SourceConfig
from ray_jobs.exchange import _join_small, finish_in_order, get

COLUMNS = {"user_id": "u"}


def tasks_of(*weights):
    source = SourceConfig(path="x", format="csv", columns=COLUMNS)
    return [
        PartTask(source, Part("x", 0, 1, weight), index) for index, weight in enumerate(weights)
    ]


@pytest.mark.parametrize(
    ("weights", "joined"),
    [
        ((0.5, 0.5, 0.5), [[0, 1], [2]]),
        ((3, 0.1, 0.1, 1), [[0], [1, 2], [3]]),
        ((), []),
    ],
)
def test_small_neighbours_are_loaded_by_one_task(weights, joined):
    groups = _join_small(tasks_of(*weights))
    assert [[task.index for task in group] for group in groups] == joined


@pytest.mark.ray
def test_results_come_in_the_order_of_their_tasks(ray_cluster):
    @ray.remote
    def wait_and_say(number):
        time.sleep(0.05 * (number % 3))
        return number

    submitted = (wait_and_say.remote(number) for number in range(20))
    assert finish_in_order(submitted, get) == list(range(20))


@pytest.mark.ray
def test_tasks_are_submitted_a_few_at_a_time(ray_cluster):
    @ray.remote
    def say(number):
        return number

    submitted, most = 0, 0

    def submit():
        nonlocal submitted
        for number in range(50):
            submitted += 1
            yield say.remote(number)

    def finish(reference):
        nonlocal submitted, most
        most = max(most, submitted)
        submitted -= 1
        return get(reference)

    finish_in_order(submit(), finish)
    assert most <= 2 * 4  # two for each of the four CPUs


@pytest.mark.ray
def test_when_one_fails_those_under_way_come_to_their_end(ray_cluster):
    @ray.remote
    def fail_or_say(number):
        if number == 1:
            raise SourceError("number 1 is broken; mend it.")
        return number

    finished, submitted = [], []

    def submit():
        for number in range(50):
            submitted.append(number)
            yield fail_or_say.remote(number)

    def finish(reference):
        finished.append(get(reference))

    with pytest.raises(SourceError, match="number 1 is broken"):
        finish_in_order(submit(), finish)
    assert finished == [number for number in submitted if number != 1]
    assert len(submitted) < 50
