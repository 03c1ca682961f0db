"""The deployment definitions, as far as they can be checked without a cluster."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

DEPLOYMENTS = Path(__file__).resolve().parent.parent.parent / "deployments"
KINDS = ("process", "docker", "docker_bucket", "kubernetes", "kubernetes_bucket")
JOBS = ("kubernetes", "kubernetes_bucket")
PLACEHOLDER = re.compile(r"^\{\{ (\w+) \}\}$")
# The shape of a Kubernetes Job, as far as our manifest uses it; unknown keys are refused.
JOB_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "batch/v1"},
        "kind": {"const": "Job"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "required": ["template"],
            "additionalProperties": False,
            "properties": {
                "backoffLimit": {"type": "integer"},
                "parallelism": {"type": "integer"},
                "completions": {"type": "integer"},
                "ttlSecondsAfterFinished": {"type": "integer"},
                "template": {
                    "type": "object",
                    "required": ["spec"],
                    "additionalProperties": False,
                    "properties": {"metadata": {"type": "object"}, "spec": {"$ref": "#/$defs/pod"}},
                },
            },
        },
    },
    "$defs": {
        "pod": {
            "type": "object",
            "required": ["containers", "restartPolicy"],
            "additionalProperties": False,
            "properties": {
                "restartPolicy": {"enum": ["Never", "OnFailure"]},
                "serviceAccountName": {"type": "string"},
                "automountServiceAccountToken": {"type": "boolean"},
                "terminationGracePeriodSeconds": {"type": "integer"},
                "nodeSelector": {"type": "object", "additionalProperties": {"type": "string"}},
                "tolerations": {"type": "array", "items": {"$ref": "#/$defs/toleration"}},
                "securityContext": {"type": "object"},
                "containers": {"type": "array", "minItems": 1},
                "volumes": {"type": "array", "items": {"required": ["name"]}},
            },
        },
        "toleration": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "key": {"type": "string"},
                "operator": {"enum": ["Exists", "Equal"]},
                "value": {"type": "string"},
                "effect": {"enum": ["NoSchedule", "PreferNoSchedule", "NoExecute"]},
            },
        },
    },
}


def pool(kind: str) -> dict[str, Any]:
    return dict(json.loads((DEPLOYMENTS / "pools" / f"{kind}.json").read_text()))


def rendered(template: Any, values: dict[str, Any]) -> Any:
    """The template with each placeholder replaced; entries without a value are left out."""
    if isinstance(template, dict):
        items = {key: rendered(value, values) for key, value in template.items()}
        return {key: value for key, value in items.items() if value is not None}
    if isinstance(template, list):
        return [rendered(value, values) for value in template]
    found = PLACEHOLDER.match(template) if isinstance(template, str) else None
    if found:
        return values.get(found[1])
    if isinstance(template, str):
        return re.sub(r"\{\{ (\w+) \}\}", lambda m: str(values.get(m[1], "")), template)
    return template


def defaults(kind: str) -> dict[str, Any]:
    properties = pool(kind)["variables"]["properties"]
    return {name: entry["default"] for name, entry in properties.items() if "default" in entry}


def job_manifest(kind: str = "kubernetes") -> dict[str, Any]:
    values = {"name": "digits-first", "labels": {"prefect.io/flow-run-name": "digits-first"}}
    manifest = pool(kind)["job_configuration"]["job_manifest"]
    return dict(rendered(manifest, {**defaults(kind), **values}))


@pytest.mark.parametrize("kind", KINDS)
def test_every_placeholder_of_a_pool_is_a_described_variable(kind: str) -> None:
    definition = pool(kind)
    jsonschema.Draft202012Validator.check_schema(definition["variables"])
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(definition["job_configuration"])))
    properties = definition["variables"]["properties"]
    assert used == set(properties)
    assert all(entry.get("description") for entry in properties.values())


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_satisfy_their_own_schema(kind: str) -> None:
    jsonschema.validate(defaults(kind), pool(kind)["variables"])


@pytest.mark.parametrize("kind", KINDS)
def test_runs_of_every_pool_beat_often_enough_to_be_rescued(kind: str) -> None:
    environment = defaults(kind)["env"]
    assert environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    assert int(environment["PREFECT_CLIENT_MAX_RETRIES"]) >= 8


@pytest.mark.parametrize("kind", JOBS)
def test_the_kubernetes_job_has_the_shape_of_one(kind: str) -> None:
    jsonschema.validate(job_manifest(kind), JOB_SCHEMA)


@pytest.mark.parametrize("kind", JOBS)
def test_the_kubernetes_job_runs_on_spot_nodes_and_is_given_time_to_save(kind: str) -> None:
    pod = job_manifest(kind)["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-spot": "true"}
    assert {"key": "spot", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    assert pod["terminationGracePeriodSeconds"] >= 30
    assert job_manifest(kind)["spec"]["backoffLimit"] == 0


@pytest.mark.parametrize("kind", JOBS)
def test_the_kubernetes_job_writes_a_notice_before_it_is_ended(kind: str) -> None:
    container = job_manifest(kind)["spec"]["template"]["spec"]["containers"][0]
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert "> /var/run/holdfast/preempted" in command[-1]
    assert mounts["/var/run/holdfast"] == "notices"


@pytest.mark.parametrize("kind", JOBS)
def test_the_kubernetes_job_has_no_more_rights_than_it_needs(kind: str) -> None:
    pod = job_manifest(kind)["spec"]["template"]["spec"]
    context = pod["containers"][0]["securityContext"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert context["readOnlyRootFilesystem"] is True
    assert context["allowPrivilegeEscalation"] is False
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert pod["automountServiceAccountToken"] is False


@pytest.mark.parametrize("kind", JOBS)
def test_each_mount_of_the_kubernetes_job_has_its_volume(kind: str) -> None:
    pod = job_manifest(kind)["spec"]["template"]["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == volumes


@pytest.mark.parametrize("kind", ["docker", "docker_bucket"])
def test_the_docker_container_is_not_root_and_cannot_write_its_image(kind: str) -> None:
    job = rendered(pool(kind)["job_configuration"], defaults(kind))
    assert job["privileged"] is False
    created = job["container_create_kwargs"]
    assert created["read_only"] is True
    assert not created["user"].startswith("0")
    assert created["cap_drop"] == ["ALL"]


def changes(before: Any, after: Any, place: str = "") -> set[str]:
    """The places in which two definitions differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        found = (
            changes(before.get(key), after.get(key), f"{place}.{key}".lstrip("."))
            for key in before.keys() | after.keys()
        )
        return set().union(*found)
    return set() if before == after else {place}


def test_with_a_bucket_a_pod_needs_no_claim_no_secret_and_no_folder() -> None:
    """But a scratch folder, and the rights of its service account."""
    template = job_manifest("kubernetes_bucket")["spec"]["template"]
    [container] = template["spec"]["containers"]
    [scratch] = [one for one in template["spec"]["volumes"] if one["name"] == "scratch"]
    [mount] = [one for one in container["volumeMounts"] if one["name"] == "scratch"]
    told = defaults("kubernetes_bucket")["env"]["HOLDFAST_SCRATCH"]
    assert mount["mountPath"] == told
    size = scratch["emptyDir"]["sizeLimit"]
    assert container["resources"]["requests"]["ephemeral-storage"] == size == "50Gi"
    assert "persistentVolumeClaim" not in json.dumps(template)
    assert "secret" not in json.dumps(pool("kubernetes_bucket")).lower()
    assert template["spec"]["serviceAccountName"] in service_accounts()
    assert template["metadata"]["labels"]["azure.workload.identity/use"] == "true"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "kubernetes",
            {
                "job_configuration.job_manifest.spec.template.metadata.labels."
                "azure.workload.identity/use",
                "job_configuration.job_manifest.spec.template.spec.containers",
                "job_configuration.job_manifest.spec.template.spec.volumes",
                "variables.properties.env.default.HOLDFAST_SCRATCH",
                "variables.properties.service_account_name.description",
                "variables.properties.store_claim",
                "variables.properties.scratch_size",
            },
        ),
        (
            "docker",
            {
                "variables.properties.env.default.HOLDFAST_SCRATCH",
                "variables.properties.volumes.default",
                "variables.properties.volumes.description",
                "variables.properties.user.description",
            },
        ),
    ],
)
def test_a_pool_for_a_bucket_is_otherwise_the_one_for_a_folder(
    kind: str, expected: set[str]
) -> None:
    assert changes(pool(kind), pool(f"{kind}_bucket")) == expected


SERVICE_ACCOUNT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "v1"},
        "kind": {"const": "ServiceAccount"},
        "metadata": {
            "type": "object",
            "required": ["name", "namespace", "annotations"],
            "additionalProperties": False,
            "properties": {
                "name": {"type": "string", "pattern": "^[a-z-]+$"},
                "namespace": {"const": "holdfast"},
                "annotations": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "eks.amazonaws.com/role-arn": {"pattern": "^arn:aws:iam::[0-9]{12}:role/"},
                        "iam.gke.io/gcp-service-account": {
                            "pattern": r"@.*\.gserviceaccount\.com$"
                        },
                        "azure.workload.identity/client-id": {"pattern": "^[0-9a-f-]{36}$"},
                    },
                },
            },
        },
        "automountServiceAccountToken": {"const": False},
    },
}


def service_accounts() -> dict[str, Any]:
    """By name."""
    text = (DEPLOYMENTS / "service_account.yaml").read_text()
    return {account["metadata"]["name"]: account for account in yaml.safe_load_all(text)}


def test_the_service_accounts_have_the_shape_of_ones() -> None:
    assert set(service_accounts()) == {"holdfast-run", "holdfast-rescuer"}
    for account in service_accounts().values():
        jsonschema.validate(account, SERVICE_ACCOUNT_SCHEMA)


class Composing(yaml.SafeLoader):
    """Knows Compose's tag of what takes the place of what stands in the file before."""


class Override(list[Any]):
    """What has that tag."""


Composing.add_constructor(
    "!override", lambda loader, node: Override(loader.construct_sequence(node))
)


def compose(name: str = "docker-compose.yaml") -> dict[str, Any]:
    return dict(yaml.load((DEPLOYMENTS / name).read_text(), Composing))


def composed() -> dict[str, Any]:
    """Both files as Compose merges them: mappings by their keys, lists one after the other."""

    def merged(before: Any, after: Any) -> Any:
        if isinstance(before, dict) and isinstance(after, dict):
            both = {key: merged(before.get(key), after[key]) for key in after}
            return {**before, **both}
        is_longer = isinstance(before, list) and not isinstance(after, Override)
        return [*before, *after] if is_longer else after

    merged_files = merged(compose(), compose("docker-compose.bucket.yaml"))
    return {key: value for key, value in merged_files.items() if not key.startswith("x-")}


def test_with_a_bucket_compose_mounts_a_scratch_folder_in_the_place_of_the_store() -> None:
    services = composed()["services"]
    for name in ("worker", "rescuer"):
        [volume] = services[name]["volumes"]
        assert volume.split(":")[0] in composed()["volumes"]
        assert volume.split(":")[1] == services[name]["environment"]["HOLDFAST_SCRATCH"]
    for name in ("deploy", "worker", "rescuer"):
        environment = services[name]["environment"]
        assert environment["HOLDFAST_STORE"].startswith("${HOLDFAST_STORE:?")
        assert environment["PREFECT_API_URL"] == "http://server:4200/api"
        named = {key for key, value in environment.items() if value is None}
        assert named == {"AWS_REGION", "AWS_ENDPOINT_URL", "AZURE_STORAGE_ACCOUNT_NAME"}
    assert services["database"] == compose()["services"]["database"]


def test_compose_names_only_services_volumes_and_networks_that_it_defines() -> None:
    definition = compose()
    for service in definition["services"].values():
        assert set(service.get("depends_on", {})) <= set(definition["services"])
        assert set(service.get("networks", [])) <= set(definition["networks"])
        names = {volume.split(":")[0] for volume in service.get("volumes", [])}
        assert names <= set(definition["volumes"])


def test_compose_keeps_concurrency_slots_over_a_restart_of_the_server() -> None:
    environment = compose()["services"]["server"]["environment"]
    lease_storage = environment["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"]
    assert lease_storage.endswith("lease_storage.filesystem")
    assert environment["PREFECT_API_DATABASE_CONNECTION_URL"].startswith("postgresql+asyncpg://")


def test_compose_lets_nobody_at_the_api_without_a_password() -> None:
    services = compose()["services"]
    server = services["server"]["environment"]["PREFECT_SERVER_API_AUTH_STRING"]
    assert server.startswith("${HOLDFAST_API_AUTH:?")  # compose refuses to start without it
    for name in ("deploy", "worker", "rescuer"):
        assert services[name]["environment"]["PREFECT_API_AUTH_STRING"] == server
    assert services["server"]["ports"] == ["127.0.0.1:4200:4200"]


def test_compose_keeps_workers_from_the_database() -> None:
    services = compose()["services"]
    reaching = {name for name, found in services.items() if "database" in found.get("networks", [])}
    assert reaching == {"database", "server"}
    assert compose()["networks"]["database"] == {"internal": True}


NETWORK_POLICY_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "networking.k8s.io/v1"},
        "kind": {"const": "NetworkPolicy"},
        "metadata": {
            "type": "object",
            "required": ["name"],
            "additionalProperties": False,
            "properties": {"name": {"type": "string", "pattern": "^[a-z-]+$"}},
        },
        "spec": {
            "type": "object",
            "required": ["podSelector", "policyTypes"],
            "additionalProperties": False,
            "properties": {
                "podSelector": {"$ref": "#/$defs/selector"},
                "policyTypes": {"type": "array", "items": {"enum": ["Ingress", "Egress"]}},
                "ingress": {"type": "array", "items": {"$ref": "#/$defs/rule"}},
                "egress": {"type": "array", "items": {"$ref": "#/$defs/rule"}},
            },
        },
    },
    "$defs": {
        "selector": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "matchLabels": {"type": "object", "additionalProperties": {"type": "string"}}
            },
        },
        "peer": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "podSelector": {"$ref": "#/$defs/selector"},
                "ipBlock": {
                    "type": "object",
                    "required": ["cidr"],
                    "additionalProperties": False,
                    "properties": {"cidr": {"pattern": r"^([0-9]{1,3}\.){3}[0-9]{1,3}/[0-9]+$"}},
                },
            },
        },
        "rule": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "from": {"type": "array", "items": {"$ref": "#/$defs/peer"}},
                "to": {"type": "array", "items": {"$ref": "#/$defs/peer"}},
                "ports": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            "protocol": {"enum": ["TCP", "UDP"]},
                            "port": {"type": "integer"},
                        },
                    },
                },
            },
        },
    },
}


def network_policies() -> list[dict[str, Any]]:
    texts = [path.read_text() for path in sorted(DEPLOYMENTS.glob("network_policy*.yaml"))]
    return [policy for text in texts for policy in yaml.safe_load_all(text)]


def test_the_network_policies_have_the_shape_of_ones() -> None:
    for policy in network_policies():
        jsonschema.validate(policy, NETWORK_POLICY_SCHEMA)


def test_the_network_policies_select_the_pods_that_runs_have() -> None:
    labels = job_manifest()["spec"]["template"]["metadata"]["labels"]
    of_bucket = job_manifest("kubernetes_bucket")["spec"]["template"]["metadata"]["labels"]
    assert labels.items() <= of_bucket.items()
    by_name = {policy["metadata"]["name"]: policy["spec"] for policy in network_policies()}
    for name in ("runs-reach-the-api-alone", "runs-reach-the-bucket"):
        assert by_name[name]["podSelector"] == {"matchLabels": labels}
    allowed = by_name["api-for-workers-and-runs"]["ingress"][0]["from"]
    assert {"podSelector": {"matchLabels": labels}} in allowed
    assert by_name["nothing-comes-in"] == {"podSelector": {}, "policyTypes": ["Ingress"]}


def test_compose_gives_a_worker_longer_than_its_runs_need_to_save() -> None:
    assert compose()["services"]["worker"]["stop_grace_period"] == "45s"


def test_our_containers_run_commands_that_exist() -> None:
    from holdfast.flows.command_line.group import COMMANDS

    for service in compose()["services"].values():
        command = service.get("command", [])
        if command and command[0] == "holdfast":
            assert command[1] in COMMANDS


def test_the_image_copies_only_what_there_is_and_does_not_run_as_root() -> None:
    lines = (DEPLOYMENTS / "Dockerfile").read_text().splitlines()
    sources = [
        source
        for line in lines
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    root = DEPLOYMENTS.parent
    assert [source for source in sources if not (root / source).exists()] == []
    assert [line for line in lines if line.startswith("USER ")] == ["USER 10001:10001"]


def nightly() -> dict[str, Any]:
    definition = yaml.safe_load((DEPLOYMENTS / "prefect.yaml").read_text())
    return next(dict(d) for d in definition["deployments"] if d["name"] == "nightly")


def test_nights_do_not_overlap_and_a_preempted_night_is_not_cancelled() -> None:
    limit = nightly()["concurrency_limit"]
    assert (limit["limit"], limit["collision_strategy"]) == (1, "ENQUEUE")


def test_each_night_has_a_run_of_its_own_at_a_time_in_a_zone() -> None:
    schedule = nightly()["schedules"][0]
    assert schedule["timezone"]
    assert "{time}" in nightly()["parameters"]["run_id"]


def test_rescued_deployments_carry_the_tag() -> None:
    definition = yaml.safe_load((DEPLOYMENTS / "prefect.yaml").read_text())
    assert all(d["tags"] == ["holdfast"] for d in definition["deployments"])
