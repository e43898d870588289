"""What the README shows is true: its configuration is valid, its jobs and targets exist."""

import re
from pathlib import Path

from ray_jobs.job import load_config
from recsys.recipe import builtin_recipes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_configuration_is_valid(tmp_path):
    example = re.search(r"```toml\n(.*?)```", README, re.DOTALL)[1]
    path = tmp_path / "my-shop.toml"
    path.write_text(example)
    config = load_config(str(path))
    assert config.ingest.events[0].values["event_type"]["order"] == "purchase"
    assert config.sequences.max_events_per_user == 5000


def first_column(section):
    """Names in the first column of the tables of a section."""
    text = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)


def test_every_recipe_of_the_table_exists_and_the_other_way_round():
    assert sorted(first_column("The models")) == builtin_recipes()


def test_every_job_of_the_table_exists():
    jobs = first_column("The jobs")
    assert {"generate", "ingest", "build_sequences", "train", "evaluate", "publish"} <= set(jobs)
    assert [job for job in jobs if not (ROOT / "ray_jobs" / f"{job}.py").exists()] == []


def test_every_folder_of_the_tree_exists():
    tree = README.partition("## Where things are")[2].partition("```\n")[2].partition("```")[0]
    folders = re.findall(r"^(\w+)/ ", tree, re.MULTILINE)
    assert len(folders) == 7
    assert all((ROOT / folder).is_dir() for folder in folders)


def test_linked_files_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
