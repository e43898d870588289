import json
import os
from multiprocessing import get_context

import pytest

from recsys.artifact import MANIFEST
from recsys.errors import ArtifactError
from recsys.registry import (
    Serving,
    end_canary,
    list_states,
    list_versions,
    promote,
    read_decisions,
    read_serving,
    record_decision,
    repair,
    roll_back,
    serving_version,
)


@pytest.fixture
def root(tmp_path):
    for version in ("20260102", "20260101", ".20260103-half"):
        (tmp_path / version).mkdir()
        (tmp_path / version / MANIFEST).write_text("{}")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_versions_are_listed_oldest_first_without_unfinished_ones(root):
    assert list_versions(root) == ["20260101", "20260102"]


def test_promoted_version_serves_and_may_be_replaced(root):
    promote(root, "20260101")
    assert serving_version(root) == "20260101"

    promote(root, "20260102")
    assert serving_version(root) == "20260102"
    assert list(root.glob("*SERVING.json*")) == [root / "SERVING.json"]


def test_unknown_version_cannot_serve(root):
    with pytest.raises(ArtifactError, match=r"Version 7 is not in .* 20260101, 20260102"):
        promote(root, "7")


def test_registry_without_promotion_says_what_to_run(tmp_path):
    with pytest.raises(ArtifactError, match=r"serves yet; run ray_jobs\.publish first"):
        serving_version(tmp_path)


def test_canary_has_its_share_until_it_is_promoted_or_rolled_back(root):
    promote(root, "20260101")

    assert promote(root, "20260102", 0.1) == Serving("20260101", {"20260102": 0.1})
    assert read_serving(root).share_of("20260101") == pytest.approx(0.9)
    assert promote(root, "20260102", 0.3).shares == {"20260102": 0.3}
    assert roll_back(root) == read_serving(root) == Serving("20260101")
    assert promote(root, "20260102") == Serving("20260102")


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_share_lies_above_zero_and_is_at_most_all(root, share):
    with pytest.raises(ArtifactError, match="is none; give a number above 0"):
        promote(root, "20260101", share)


def test_canary_needs_a_champion_that_keeps_visitors(root):
    with pytest.raises(ArtifactError, match="beside no other champion"):
        promote(root, "20260101", 0.5)
    promote(root, "20260101")
    with pytest.raises(ArtifactError, match="beside no other champion"):
        promote(root, "20260101", 0.5)

    (root / "20260103").mkdir()
    (root / "20260103" / MANIFEST).write_text("{}")
    promote(root, "20260102", 0.5)
    with pytest.raises(ArtifactError, match=r"20260102: 0.5, 20260103: 0.5 leave nothing"):
        promote(root, "20260103", 0.5)


def test_what_served_is_remembered_in_its_order(root):
    old, new = list_versions(root)
    promote(root, old)
    promote(root, new, 0.25)
    promote(root, new)
    assert list_states(root) == [Serving(old), Serving(old, {new: 0.25}), Serving(new)]


def test_roll_back_goes_back_step_by_step_and_says_where_it_ends(root):
    promote(root, "20260101")
    promote(root, "20260102")

    assert roll_back(root) == Serving("20260101")
    with pytest.raises(ArtifactError, match=r"Nothing served in .* before 20260101"):
        roll_back(root)


def test_visitor_stays_with_a_canary_while_its_share_grows():
    visitors = [f"u{number}" for number in range(20_000)]
    small, large = Serving("a", {"b": 0.1}), Serving("a", {"b": 0.25})
    of_small = {visitor for visitor in visitors if small.choose(visitor) == "b"}
    of_large = {visitor for visitor in visitors if large.choose(visitor) == "b"}

    # Five standard deviations of a share among 20,000.
    assert len(of_small) / len(visitors) == pytest.approx(0.1, abs=0.011)
    assert len(of_large) / len(visitors) == pytest.approx(0.25, abs=0.016)
    assert of_small < of_large


def test_every_version_has_its_share_and_the_next_canary_meets_other_people():
    visitors = [f"u{number}" for number in range(20_000)]
    serving = Serving("a", {"b": 0.2, "c": 0.3})
    chosen = [serving.choose(visitor) for visitor in visitors]
    again = Serving("a", {"d": 0.2})
    both = [
        visitor
        for visitor, version in zip(visitors, chosen, strict=True)
        if version == "b" and again.choose(visitor) == "d"
    ]

    for version in serving.versions:
        share = chosen.count(version) / len(visitors)
        assert share == pytest.approx(serving.share_of(version), abs=0.018)
    assert len(both) / chosen.count("b") == pytest.approx(0.2, abs=0.032)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"serving": 1, "before": []}', '{"serving": {}, "before": []}']
)
def test_damaged_file_says_so_and_what_to_do(root, content):
    (root / "SERVING.json").write_text(content)

    for act in (read_serving, roll_back, lambda root: promote(root, "20260101")):
        with pytest.raises(
            ArtifactError, match=r"SERVING\.json is damaged; run python -m .* repair"
        ):
            act(root)


@pytest.mark.parametrize("content", ["", "{", "\0\0\0", '{"serving": {"champion": "gone"'])
def test_a_damaged_file_is_repaired_from_its_copy(root, content):
    promote(root, "20260101")
    promote(root, "20260102", 0.1)
    (root / "SERVING.json").write_text(content)

    assert "20260101 serves, as the copy says, and the damaged file is now" in repair(root)
    assert read_serving(root) == Serving("20260101", {"20260102": 0.1})
    assert roll_back(root) == Serving("20260101")


def test_a_file_that_is_gone_or_names_what_is_not_there_is_repaired_too(root):
    promote(root, "20260101")
    (root / "SERVING.json").unlink()
    assert repair(root) == "20260101 serves, as the copy says."

    damaged = (root / "SERVING.json").read_text().replace("20260101", "20260191")
    (root / "SERVING.json").write_text(damaged)
    repair(root)
    assert serving_version(root) == "20260101"


def test_what_is_whole_is_left_and_gets_its_copy_back(root):
    promote(root, "20260101")
    (root / ".SERVING.copy.json").write_text("")
    assert repair(root).endswith("SERVING.json is whole; 20260101 serves.")
    (root / "SERVING.json").write_text("")
    repair(root)
    assert serving_version(root) == "20260101"


def test_without_a_whole_copy_a_version_is_promoted_again(root):
    promote(root, "20260101")
    for name in ("SERVING.json", ".SERVING.copy.json"):
        (root / name).write_text("?")
    with pytest.raises(ArtifactError, match=r"No copy .* promote one of 20260101, 20260102"):
        repair(root)
    assert promote(root, "20260102") == Serving("20260102")


def test_versions_stand_in_the_order_of_their_numbers_whatever_the_clocks_said(root):
    # Published last, by a machine whose clock is a year behind.
    (root / "20250103").mkdir()
    (root / "20250103" / MANIFEST).write_text('{"number": 3}')
    os.utime(root / "20250103" / MANIFEST, (0, 0))
    assert list_versions(root) == ["20260101", "20260102", "20250103"]


def test_a_canary_is_refused_when_another_champion_took_over(root):
    promote(root, "20260101")
    with pytest.raises(ArtifactError, match="was compared with 20260102, and 20260101 serves by"):
        promote(root, "20260102", 0.1, champion="20260102")
    assert promote(root, "20260102", 0.1, champion="20260101").shares == {"20260102": 0.1}


def test_of_many_versions_the_nearest_are_named(root):
    for day in range(10, 20):
        (root / f"202601{day}").mkdir()
        (root / f"202601{day}" / MANIFEST).write_text("{}")
    with pytest.raises(ArtifactError, match=r"not in .*; the nearest of 12: 20260119"):
        promote(root, "20260119x")
    with pytest.raises(ArtifactError, match=r"the newest of 12: 20260115, .*, 20260119\.$"):
        promote(root, "champion")


def promote_many(root, version):
    for _ in range(20):
        promote(root, version)


def test_promotions_at_the_same_time_follow_each_other(root):
    context = get_context("spawn")
    others = [
        context.Process(target=promote_many, args=(root, version))
        for version in ("20260101", "20260102")
    ]
    for other in others:
        other.start()
    for other in others:
        other.join()

    assert [other.exitcode for other in others] == [0, 0]
    # None was lost: each state but the last became a "before".
    content = json.loads((root / "SERVING.json").read_text())
    assert len(content["before"]) == 39


def test_one_canary_ends_and_others_keep_their_visitors(root):
    for version in ("20260103", "20260104"):
        (root / version).mkdir()
        (root / version / MANIFEST).write_text("{}")
    promote(root, "20260101")
    promote(root, "20260102", 0.1)
    promote(root, "20260103", 0.2)

    assert end_canary(root, "20260102") == Serving("20260101", {"20260103": 0.2})
    with pytest.raises(ArtifactError, match=r"20260102 is no canary in .*; 20260101, 20260103 ser"):
        end_canary(root, "20260102")


def test_no_canary_ends_where_nothing_serves(root):
    with pytest.raises(ArtifactError, match=r"20260102 is no canary in .*; nothing serves"):
        end_canary(root, "20260102")


def test_decisions_are_told_by_version_and_a_line_that_was_cut_off_is_passed_over(root):
    assert read_decisions(root, "20260101") == []
    for version, decision in (("20260101", "promote"), ("20260102", "roll back")):
        record_decision(root, {"version": version, "decision": decision})
    with (root / "DECISIONS.jsonl").open("a") as file:
        file.write('{"version": "20260101", "deci')
    record_decision(root, {"version": "20260101", "decision": "wait"})
    found = [decision["decision"] for decision in read_decisions(root, "20260101")]
    assert found == ["promote", "wait"]
