"""What every job shares: configuration, overrides, dry runs and how a job ends."""

import json
import os

import pytest

from ray_jobs import job
from ray_jobs.errors import ConfigError, JobError
from ray_jobs.job import HUGE_PAGES, Report, builtin_configs, connected, load_config, main
from recsys.recipe import read_recipe


def test_every_configuration_that_comes_with_the_package_is_valid():
    assert builtin_configs() == ["globo", "ml-1m", "retailrocket", "shop-10m", "synthetic"]
    for name in builtin_configs():
        assert load_config(name).name == name


def test_the_large_shop_updates_the_rows_that_a_step_looked_at():
    config = load_config("shop-10m")
    recipe = read_recipe(config.train.recipe, config.train.overrides)
    assert recipe.optimiser.item_rows == "touched"


def test_overrides_replace_single_values():
    config = load_config("synthetic", ["train.trainer.max_epochs=3", "train.name=abc"])
    assert config.train.trainer.max_epochs == 3
    assert config.train.name == "abc"  # a bare word is a string


def test_every_wrong_key_is_named_with_its_path():
    with pytest.raises(ConfigError) as caught:
        load_config("synthetic", ["train.recipee=a", "serve.port=99999"])
    assert "train.recipee" in str(caught.value)
    assert "serve.port" in str(caught.value)


def test_a_date_that_does_not_parse_is_named():
    dates = ["split.kind=temporal-cut", "split.test_from=yesterday"]
    with pytest.raises(ConfigError, match=r"split.test_from: .*valid datetime"):
        load_config("synthetic", dates)


def test_a_wrong_recipe_value_is_named():
    with pytest.raises(ConfigError, match=r"train.overrides"):
        load_config("synthetic", ["train.overrides.model.dim=7"])


@pytest.mark.parametrize(
    ("override", "message"),
    [("train", "is not KEY=VALUE"), ("seed.x=1", "'seed' is a value, not a section")],
)
def test_an_override_that_makes_no_sense_says_why(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config("synthetic", [override])


def test_a_missing_file_names_what_there_is():
    with pytest.raises(
        ConfigError, match=r"There is no configuration 'nope'; give a path, or one of: globo"
    ):
        load_config("nope")


def test_a_file_that_is_not_toml_is_one_sentence(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text("a = = 1")
    with pytest.raises(ConfigError, match=r"is not valid TOML"):
        load_config(str(path))


def test_a_variable_that_is_not_set_is_named(monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    config = load_config("synthetic", ["storage.root=$NOWHERE/x"])
    with pytest.raises(ConfigError, match=r"needs the environment variable NOWHERE"):
        _ = config.storage.lake_uri


def _run_never(config):
    raise AssertionError("a dry run starts nothing")


def test_a_dry_run_prints_the_resolved_configuration(capsys):
    main(_run_never, job="train", argv=["--config", "synthetic", "--dry-run", "--set", "seed=9"])
    assert json.loads(capsys.readouterr().out)["seed"] == 9


def test_wrong_arguments_exit_with_2_and_the_reason_as_last_line(capsys):
    with pytest.raises(SystemExit) as caught:
        main(_run_never, job="train", argv=["--config", "synthetic", "--set", "nope=1"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("train failed: ")


def test_a_failed_job_exits_with_1_and_the_reason_as_last_line(capsys, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: True)

    def run(config):
        raise JobError("There is no wine.")

    with pytest.raises(SystemExit) as caught:
        main(run, job="train", argv=["--config", "synthetic"])
    assert caught.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == "train failed: There is no wine."


def test_the_last_line_of_a_report_is_json(capsys, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    report = Report("train", "done", {"items": 1234, "ndcg10": 0.12345})
    main(lambda config: report, job="train", argv=["--config", "synthetic"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["train: done", "  items   1,234", "  ndcg10  0.1235"]
    assert json.loads(lines[-1]) == {
        "job": "train",
        "headline": "done",
        "items": 1234,
        "ndcg10": 0.12345,
    }


def test_secrets_come_from_the_environment_and_are_never_shown(monkeypatch):
    monkeypatch.setenv("SHOP_KEY", "abc123")
    options = 'storage.options={AWS_SECRET_ACCESS_KEY="$SHOP_KEY", AWS_REGION="eu-central-1"}'
    config = load_config("synthetic", [options])
    assert config.storage.options["AWS_SECRET_ACCESS_KEY"] == "abc123"
    shown = config.model_dump(mode="json")["storage"]["options"]
    assert shown == {"AWS_SECRET_ACCESS_KEY": "***", "AWS_REGION": "eu-central-1"}
    assert "abc123" not in config.model_dump_json()


def test_an_option_from_an_unset_variable_says_so(monkeypatch):
    monkeypatch.delenv("SHOP_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"storage\.options: .* SHOP_KEY is not set"):
        load_config("synthetic", ['storage.options={AWS_ACCESS_KEY_ID="$SHOP_KEY"}'])


@pytest.mark.parametrize("own", [None, "glibc.malloc.check=1"])
def test_workers_of_a_ray_of_our_own_ask_for_huge_pages(own, monkeypatch):
    (name,) = HUGE_PAGES
    monkeypatch.setenv(name, own or "")
    if own is None:
        monkeypatch.delenv(name)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    started_with = []
    monkeypatch.setattr(job.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(job.ray, "init", lambda **_: started_with.append(os.environ[name]))
    monkeypatch.setattr(job.ray, "shutdown", lambda: None)
    with connected():
        pass
    assert started_with == [own or HUGE_PAGES[name]]
