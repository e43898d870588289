"""What an operator applies fits the schemas of what reads it."""

import importlib.metadata
import itertools
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import ray.autoscaler
import yaml
from ray.serve.schema import ServeDeploySchema

from ray_jobs.http_path import FAST
from ray_jobs.job import HUGE_PAGES, load_config
from serve_app.settings import Settings
from tests.cluster.kuberay import SCHEMAS
from tests.cluster.manifests import (
    CLUSTER,
    KUBERNETES,
    OVERLAYS,
    all_templates,
    environment_of,
    find,
    pod_templates,
    render,
    values_of,
)

ROOT = CLUSTER.parent
KUBERNETES_VERSION = "1.33"
PIPELINE = KUBERNETES / "base/pipeline.toml"
IN_THE_POD = "/etc/nextitem/pipeline/pipeline.toml"
SECRETS = {
    ("nextitem-ray", "auth_token"),
    ("nextitem-redis", "password"),
    ("nextitem-api-keys", "keys"),
}
"""The runbook makes them."""
JOBS = sorted((KUBERNETES / "jobs").glob("*.yaml"))
SCHEDULED = ("ingest", "canary", "monitor", "maintain", "retrain")

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
in_every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


@pytest.mark.parametrize("path", sorted(CLUSTER.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_manifest_is_yaml(path):
    assert all(yaml.safe_load_all(path.read_text()))


def test_the_image_runs_as_somebody_and_holds_what_it_copies():
    text = (CLUSTER / "Dockerfile").read_text()
    *_, cpu, cuda = re.split(r"^FROM ", text, flags=re.MULTILINE)

    for stage in (cpu, cuda):
        assert re.findall(r"^USER (.*)$", stage, re.MULTILINE) == ["shop"]
        assert stage.index("USER shop") > stage.index("RUN pip install")
    copied = [
        name
        for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE)
        for name in line.split()[:-1]
    ]
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in allowed
    assert re.search(r"^ENV .*\\\n.*RAY_AUTH_MODE=token", text, re.MULTILINE)


@in_every_overlay
def test_pods_run_as_the_user_of_the_image(overlay):
    (uid,) = re.findall(r"useradd .*--uid (\d+)", (CLUSTER / "Dockerfile").read_text())
    for template in all_templates(overlay):
        context = template["spec"]["securityContext"]
        assert context["runAsNonRoot"] is True
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        images = {container["image"] for container in template["spec"]["containers"]}
        if images <= {"nextitem:cpu", "nextitem:cuda"}:
            assert context["runAsUser"] == int(uid)


def test_the_serve_configuration_fits_serve_and_our_settings():
    content = yaml.safe_load((CLUSTER / "serve.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(content).applications
    module, _, name = application.import_path.partition(":")
    assert hasattr(__import__(module, fromlist=[name]), name)
    assert Settings.from_environment({}, application.args).deadline_ms == 70


def test_the_cluster_of_ray_up_fits_the_schema_of_ray():
    config = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())
    schema = Path(ray.autoscaler.__file__).with_name("ray-schema.json").read_text()
    jsonschema.validate(config, json.loads(schema))

    types = config["available_node_types"]
    assert config["head_node_type"] in types
    assert types["a100"]["resources"] == {"CPU": 96, "GPU": 8, "accelerator_type:A100": 1}
    assert sum(kind["max_workers"] for kind in types.values()) <= config["max_workers"]
    options = config["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    for name in ("CPU", "GPU"):
        most = sum(kind["max_workers"] * kind["resources"].get(name, 0) for kind in types.values())
        assert f"--env NEXTITEM_CLUSTER_{name}S={most}" in options
    for name, value in HUGE_PAGES.items():
        assert f"--env {name}={value}" in options
    for local in config["file_mounts"].values():
        assert local.startswith("~") or (ROOT / local).exists()


@in_every_overlay
def test_every_object_fits_the_schema_of_kubernetes_or_of_kuberay(overlay):
    for manifest in render(overlay):
        if manifest["apiVersion"] == "ray.io/v1":
            jsonschema.validate(manifest, SCHEMAS[manifest["kind"]])
        else:
            kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)


@in_every_overlay
def test_every_pod_of_ray_fits_the_schema_of_kubernetes(overlay):
    for manifest in render(overlay):
        for template in pod_templates(manifest):
            pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "any"}}
            kubernetes_validate.validate(
                {**pod, "template": template}, KUBERNETES_VERSION, strict=True
            )


def test_a_field_that_kuberay_does_not_know_is_refused():
    manifest = find(render("kind"), "RayCluster", "nextitem-jobs")
    wrong = {**manifest, "spec": {**manifest["spec"], "enableAutoscaling": True}}
    with pytest.raises(jsonschema.ValidationError, match="enableAutoscaling"):
        jsonschema.validate(wrong, SCHEMAS["RayCluster"])


@in_every_overlay
def test_the_service_fits_serve_and_our_settings(overlay):
    spec = find(render(overlay), "RayService", "nextitem")["spec"]
    (application,) = ServeDeploySchema.model_validate(
        yaml.safe_load(spec["serveConfigV2"])
    ).applications
    secret = {"NEXTITEM_REDIS_URL": "redis://redis", "NEXTITEM_SHARED_CACHE": "redis://redis-cache"}
    settings = Settings.from_environment({**environment_of(overlay), **secret}, application.args)

    assert settings.history == ("feast" if overlay == "feast" else "redis")
    assert settings.ranker_gpus == (0 if overlay == "kind" else 1)
    assert settings.max_rankers >= settings.min_rankers
    root = Path(load_config(str(PIPELINE)).storage.root.replace("$NEXTITEM_HOME", "/srv/nextitem"))
    assert settings.registry == root / "registry"
    assert settings.events_landing == f"{root}/landing"
    assert settings.exposures == f"{root}/exposures"


def test_a_ranker_fills_its_pod_so_that_the_ingress_stays_on_cpus():
    spec = find(render("a100"), "RayService", "nextitem")["spec"]["rayClusterConfig"]
    cpu, a100 = spec["workerGroupSpecs"]
    (container,) = a100["template"]["spec"]["containers"]

    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["resources"]["limits"]["cpu"] == environment_of("a100")["NEXTITEM_RANKER_CPUS"]
    assert "nvidia.com/gpu" not in str(cpu)
    assert a100["maxReplicas"] >= int(environment_of("a100")["NEXTITEM_MAX_RANKERS"])


@in_every_overlay
def test_every_ray_asks_for_the_token(overlay):
    clusters = [
        *values_of(render(overlay), "rayClusterConfig"),
        find(render(overlay), "RayCluster", "nextitem-jobs")["spec"],
    ]
    assert len(clusters) == 2
    for cluster in clusters:
        assert cluster["authOptions"] == {"mode": "token", "secretName": "nextitem-ray"}
        assert cluster["rayVersion"] == importlib.metadata.version("ray")
    assert environment_of(overlay)["RAY_AUTH_MODE"] == "token"
    for name in SCHEDULED:
        (template,) = pod_templates(find(render(overlay), "CronJob", name))
        variables = {entry["name"]: entry for entry in template["spec"]["containers"][0]["env"]}
        assert variables["RAY_AUTH_MODE"]["value"] == "token"
        assert "secretKeyRef" in variables["RAY_AUTH_TOKEN"]["valueFrom"]


@in_every_overlay
def test_secrets_are_named_and_not_told(overlay):
    assert not [manifest for manifest in render(overlay) if manifest["kind"] == "Secret"]
    references = list(values_of(render(overlay), "secretKeyRef"))
    assert {(reference["name"], reference["key"]) for reference in references} <= SECRETS
    for variables in values_of(render(overlay), "env"):
        for entry in variables:
            if re.search("PASSWORD|TOKEN|KEYS", entry["name"]):
                assert set(entry) == {"name", "valueFrom"}
            assert "@" not in entry.get("value", "").replace("$(REDIS_PASSWORD)@", "")


@in_every_overlay
def test_what_a_pod_names_is_there(overlay):
    names = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in render(overlay)}
    for template in all_templates(overlay):
        for volume in template["spec"].get("volumes", []):
            if not volume.get("configMap", {}).get("optional"):
                wanted = [("ConfigMap", volume.get("configMap", {}).get("name"))]
                wanted += [
                    (
                        "PersistentVolumeClaim",
                        volume.get("persistentVolumeClaim", {}).get("claimName"),
                    )
                ]
                assert {pair for pair in wanted if pair[1]} <= names
        for reference in values_of(template, "configMapRef"):
            assert ("ConfigMap", reference["name"]) in names
        mounted = {mount["name"] for mount in itertools.chain(*values_of(template, "volumeMounts"))}
        claims = {"data"} if "redis" in str(template["metadata"]["labels"]) else set()
        assert mounted - claims <= {
            volume["name"] for volume in template["spec"].get("volumes", [])
        }


@in_every_overlay
def test_every_container_is_bounded_and_has_no_rights_to_gain(overlay):
    for template in all_templates(overlay):
        for container in template["spec"]["containers"]:
            assert set(container["resources"]["requests"]) >= {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert re.search(r":[\w.-]+$", container["image"])
            assert not container["image"].endswith(":latest")


@in_every_overlay
def test_what_runs_for_long_says_whether_it_is_well(overlay):
    for template in all_templates(overlay):
        if template["spec"].get("restartPolicy") == "Never":
            continue
        for container in template["spec"]["containers"]:
            assert {"readinessProbe", "livenessProbe"} <= set(container)


@in_every_overlay
def test_policies_and_budgets_choose_pods_that_exist(overlay):
    labels = [template["metadata"]["labels"] for template in all_templates(overlay)]
    chosen = [
        manifest["spec"].get("podSelector") or manifest["spec"].get("selector") or {}
        for manifest in render(overlay)
        if manifest["kind"] in ("NetworkPolicy", "PodDisruptionBudget")
    ]
    assert len(chosen) == 8
    for selector in chosen:
        wanted = selector.get("matchLabels", {}).items()
        assert any(wanted <= found.items() for found in labels)
        for expression in selector.get("matchExpressions", []):
            assert set(expression["values"]) <= {found.get(expression["key"]) for found in labels}


def test_nobody_reaches_a_pod_by_default():
    policy = find(render("a100"), "NetworkPolicy", "nobody")["spec"]
    assert policy == {"podSelector": {}, "policyTypes": ["Ingress"]}


def test_nodes_on_kubernetes_have_the_variables_of_every_other_node():
    lines = (CLUSTER / "serve.env").read_text().splitlines()
    same = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert same == FAST
    assert environment_of("a100").items() >= FAST.items()
    script = environment_of("a100")["RAY_SERVE_HAPROXY_BINARY_PATH"]
    assert (ROOT / script.removeprefix("/opt/nextitem/")).exists()


@in_every_overlay
def test_jobs_know_how_far_their_cluster_grows(overlay):
    cluster, most = find(render(overlay), "RayCluster", "nextitem-jobs"), {"CPU": 0, "GPU": 0}
    for group in cluster["spec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        resources = container["resources"]
        most["CPU"] += group["maxReplicas"] * int(resources["requests"]["cpu"])
        most["GPU"] += group["maxReplicas"] * resources["limits"].get("nvidia.com/gpu", 0)
    told = {name: int(environment_of(overlay).get(f"NEXTITEM_CLUSTER_{name}S", 0)) for name in most}
    assert told == most


@in_every_overlay
def test_workers_of_jobs_ask_for_huge_pages(overlay):
    cluster = find(render(overlay), "RayCluster", "nextitem-jobs")
    for group in cluster["spec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        variables = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert HUGE_PAGES.items() <= variables.items()


def test_feast_has_the_views_of_the_package_and_a_store_that_exists():
    data = find(render("feast"), "ConfigMap", "nextitem-feast")["data"]
    store = yaml.safe_load(data["feature_store.yaml"])
    local = yaml.safe_load((CLUSTER / "feast/feature_store.yaml").read_text())

    assert data["views.py"] == (CLUSTER / "feast/views.py").read_text()
    assert store["online_store"].pop("type") == "redis"
    assert store["online_store"] == {"connection_string": "${NEXTITEM_FEAST_REDIS}"}
    assert {**store, "online_store": 0, "registry": 0} == {
        **local,
        "online_store": 0,
        "registry": 0,
    }


@pytest.mark.slow
def test_feast_reads_its_repository(tmp_path, monkeypatch):
    repo_config = pytest.importorskip("feast.repo_config")
    monkeypatch.setenv("NEXTITEM_HOME", "/srv/nextitem")
    monkeypatch.setenv("NEXTITEM_FEAST_REDIS", "redis:6379,db=2,password=secret")
    path = tmp_path / "feature_store.yaml"
    data = find(render("feast"), "ConfigMap", "nextitem-feast")["data"]
    path.write_text(data["feature_store.yaml"])

    config = repo_config.load_repo_config(tmp_path, path)

    assert config.online_store.connection_string == "redis:6379,db=2,password=secret"
    assert config.registry.path == "/srv/nextitem/feast/registry.db"


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_a_job_fits_kuberay_and_would_start(path, monkeypatch, capsys):
    manifest = yaml.safe_load(path.read_text())
    jsonschema.validate(manifest, SCHEMAS["RayJob"])
    cluster = find(render("a100"), "RayCluster", "nextitem-jobs")["metadata"]["name"]

    assert manifest["spec"]["clusterSelector"] == {"ray.io/cluster": cluster}
    assert dry_run(shlex.split(manifest["spec"]["entrypoint"]), monkeypatch, capsys) == "shop"


@pytest.mark.parametrize("name", SCHEDULED)
def test_what_the_schedule_submits_would_start(name, monkeypatch, capsys):
    (container,) = values_of(find(render("a100"), "CronJob", name), "containers")
    options, command = split_at(container[0]["args"], "--")

    assert container[0]["command"] == ["ray", "job", "submit"]
    assert options[0] == "--address=http://nextitem-jobs-head-svc:8265"
    assert dry_run(command, monkeypatch, capsys) == "shop"


def test_every_stage_has_a_job():
    done_by_others = {"generate", "serve", "demo", "registry"}
    jobs = {
        path.stem
        for path in (ROOT / "ray_jobs").glob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    assert jobs - done_by_others <= {path.stem for path in JOBS}


def split_at(words, mark):
    place = words.index(mark)
    return words[:place], words[place + 1 :]


def dry_run(command, monkeypatch, capsys):
    """The `name` in the configuration that the command resolves, as it would in a pod."""
    python, dash_m, module, *arguments = command
    assert (python, dash_m) == ("python", "-m")
    assert any(IN_THE_POD in argument for argument in arguments)
    local = [argument.replace(IN_THE_POD, str(PIPELINE)) for argument in arguments]
    monkeypatch.setattr(sys, "argv", [module, *local, "--dry-run"])
    runpy.run_module(module, run_name="__main__")
    return json.loads(capsys.readouterr().out)["name"]
