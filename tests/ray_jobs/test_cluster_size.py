"""How far a cluster goes."""

import pytest

from ray_jobs.cluster_size import present, reachable, refuse_absent_accelerator
from ray_jobs.errors import JobError


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch):
    resources = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:T4": 1.0, "accelerator_type:A100": 1.0}
    monkeypatch.setattr("ray.cluster_resources", lambda: resources)
    monkeypatch.delenv("NEXTITEM_CLUSTER_CPUS", raising=False)
    monkeypatch.delenv("NEXTITEM_CLUSTER_GPUS", raising=False)


def test_a_cluster_of_fixed_size_has_what_is_there():
    assert (reachable("CPU"), reachable("GPU")) == (8, 2)


def test_one_that_grows_has_the_most_that_it_grows_to(monkeypatch):
    monkeypatch.setenv("NEXTITEM_CLUSTER_CPUS", "64")
    monkeypatch.setenv("NEXTITEM_CLUSTER_GPUS", "1")
    assert (reachable("CPU"), reachable("GPU")) == (64, 2)
    assert (present("CPU"), present("GPU")) == (8, 2)


@pytest.mark.parametrize("text", ["many", "-1", "inf", "nan", ""])
def test_what_is_no_number_is_refused(monkeypatch, text):
    monkeypatch.setenv("NEXTITEM_CLUSTER_CPUS", text)
    with pytest.raises(JobError, match=r"NEXTITEM_CLUSTER_CPUS is .* give a number"):
        reachable("CPU")


def test_a_type_that_no_machine_has_is_refused_unless_machines_may_come(monkeypatch):
    refuse_absent_accelerator("T4")
    with pytest.raises(JobError, match="'H100', and the cluster's types are A100, T4; name one"):
        refuse_absent_accelerator("H100")
    monkeypatch.setenv("NEXTITEM_CLUSTER_GPUS", "8")
    refuse_absent_accelerator("H100")
