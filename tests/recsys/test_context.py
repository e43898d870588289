"""Context codes, worked out by hand."""

import numpy as np
import pyarrow as pa
import pytest

from recsys.context import NO_TIME, UNKNOWN, ContextConfig, ContextEncoder, count_seconds

SECOND = 1_000_000
HOUR = 3600 * SECOND


def make_encoder(categorical=("device",), time=(), timezone="UTC"):
    config = ContextConfig(categorical=categorical, time=time, timezone=timezone)
    return ContextEncoder.learn(config, {"device": {"app": 1, "web": 5}})


def encode_time(field, timestamp, previous=NO_TIME, **options):
    encoder = make_encoder((), (field,))
    codes_TF = encoder.encode(np.array([timestamp]), np.array([previous]), {}, **options)
    return int(codes_TF[0, 0])


def test_frequent_values_come_first_and_zero_is_unknown():
    encoder = make_encoder()
    columns = {"device": pa.array(["web", "app", "tv", None])}
    times = np.zeros(4, np.int64)
    assert encoder.encode(times, times, columns)[:, 0].tolist() == [1, 2, UNKNOWN, UNKNOWN]


def test_a_missing_column_is_unknown_throughout():
    times = np.zeros(2, np.int64)
    assert make_encoder().encode(times, times, {}).tolist() == [[UNKNOWN], [UNKNOWN]]


def test_dictionary_columns_are_read_like_strings():
    columns = {"device": pa.array(["app", None, "tv", "web", "app"]).dictionary_encode()}
    times = np.zeros(5, np.int64)
    codes = make_encoder().encode(times, times, columns)[:, 0]
    assert codes.tolist() == [2, UNKNOWN, UNKNOWN, 1, 2]


def test_seconds_count_from_the_first_time():
    times = np.array([[5_000_000, NO_TIME], [4_000_001, 7_900_000]])
    assert count_seconds(times).tolist() == [[1, 0], [1, 4]]
    assert count_seconds(np.array([-3_000_000, 0])).tolist() == [1, 4]


def test_no_time_at_all_is_no_seconds():
    assert count_seconds(np.full(3, NO_TIME)).tolist() == [0, 0, 0]
    assert count_seconds(np.zeros(0, np.int64)).tolist() == []


def test_what_is_later_than_68_years_counts_as_that():
    times = np.array([0, 100 * 365 * 86_400 * 1_000_000])
    assert count_seconds(times).tolist() == [1, 2**31 - 1]


def test_seconds_of_many_times_are_those_of_each():
    times = 1_000_000 * np.arange(200_000)[::-1] + 10**15
    times[::3] = NO_TIME
    seconds = count_seconds(times)
    known = times != NO_TIME
    assert (seconds[~known] == 0).all()
    assert (seconds[known] == 1 + (times[known] - times[known].min()) // 1_000_000).all()


def test_at_most_254_values_are_known():
    many = {f"v{n:03}": 1000 - n for n in range(300)}
    encoder = ContextEncoder.learn(
        ContextConfig(categorical=("device",), time=()), {"device": many}
    )
    assert encoder.sizes == (255,)
    columns = {"device": pa.array(["v253", "v254"])}
    times = np.zeros(2, np.int64)
    assert encoder.encode(times, times, columns).tolist() == [[254], [UNKNOWN]]


def test_hours_count_from_one():
    # 1 January 1970 was a Thursday: day 3 from Monday 0.
    assert encode_time("hour", 0) == 1
    assert encode_time("hour", 23 * HOUR) == 24
    assert encode_time("weekday", 0) == 1 + 3


def test_the_shop_s_clock_decides_the_hour():
    assert encode_time("hour", 0, timezone="Europe/Berlin") == 1 + 1


@pytest.mark.parametrize(
    ("gap_s", "code"), [(0, 1), (1, 2), (3, 3), (3600, 1 + 11), (10**12, 31), (-5, 1)]
)
def test_gaps_are_powers_of_two_of_a_second(gap_s, code):
    assert encode_time("gap", 10**19 // 2 + gap_s * SECOND, 10**19 // 2) == code


def test_missing_times_are_unknown():
    assert encode_time("hour", NO_TIME) == UNKNOWN
    assert encode_time("gap", NO_TIME, 0) == UNKNOWN
    assert encode_time("gap", 0, NO_TIME) == UNKNOWN


def test_a_request_knows_everything_but_the_event_type():
    encoder = make_encoder(("device", "event_type"), ("hour",))
    assert encoder.fields == ("device", "event_type", "hour")
    assert encoder.known_at_request_F.tolist() == [True, False, True]


def test_a_written_encoder_encodes_the_same(tmp_path):
    encoder = make_encoder(time=("hour", "gap"), timezone="Europe/Berlin")
    encoder.write(tmp_path / "context.json")
    assert ContextEncoder.read(tmp_path / "context.json") == encoder
