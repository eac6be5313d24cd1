"""What a schema cannot see of deploy/kubernetes: that the parts fit each other, the command line and a real server."""

import contextlib
import functools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from kvcast.gateway.metrics import ASK_SECONDS
from kvcast.server import ServeConfig
from kvcast.server.__main__ import make_parser
from kvcast.server.stubs import list_stubs
from kvcast.server.view import find_models
from tests.deploy.pod import __file__ as pod_program
from tests.deploy.tools import run_tool
from tests.processes import find_children, wait_until

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
# The newest Kubernetes, and the oldest that is supported.
VERSIONS = ("1.37.0", "1.35.0")
# A custom resource of another project: not in Kubernetes' schemas.
CUSTOM = {"PodMonitor"}
OVERLAYS = ["cpu", "gpu"]
# What `kvcast serve` takes at most beyond the time for requests that are there: `TritonServer.stop`.
STOP_SECONDS = 20
BUILDS = ["overlays/cpu", "overlays/gpu", "repository", "haproxy"]
# With the definitions of custom resources (CustomResourceDefinition, YAML), objects are held against them too.
CRDS_VARIABLE = "KVCAST_CRDS"
# Names of fields, anywhere in a custom resource's spec, that its project's documentation has: for typing errors.
FIELDS = {
    "PodMonitor": "selector matchLabels podMetricsEndpoints port path interval scrapeTimeout",
}
LISTENING = "0A"  # in /proc/net/tcp

Object = dict[str, Any]


@functools.cache
def build(name: str) -> list[Object]:
    """Return what kustomize makes of a folder."""
    result = run_tool("kubectl", "kustomize", FOLDER / name)
    assert result.returncode == 0, result.stderr
    return [each for each in yaml.safe_load_all(result.stdout) if each]


def find(objects: list[Object], kind: str, name: str | None = None) -> Object:
    """Return the only object of a kind, or that of a name."""
    (found,) = (each for each in objects if each["kind"] == kind and name in (None, each["metadata"]["name"]))
    return found


def find_pod(objects: list[Object]) -> Object:
    """Return the pod of the only Deployment."""
    template: Object = find(objects, "Deployment")["spec"]["template"]
    return template


def find_container(objects: list[Object]) -> Object:
    (container,) = find_pod(objects)["spec"]["containers"]
    return dict(container)


def find_values(thing: Any, key: str) -> Iterator[Any]:
    """Return what a key has anywhere in an object."""
    if isinstance(thing, dict):
        yield from (value for name, value in thing.items() if name == key)
    for each in thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list) else ():
        yield from find_values(each, key)


def expand(container: Object) -> list[str]:
    """Return a container's arguments as the kubelet gives them to it."""
    limits = container["resources"]["limits"]
    values = {
        each["name"]: each.get("value") or str(math.ceil(float(limits[find_resource(each)])))
        for each in container["env"]
    }
    return [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], each) for each in container["args"]]


def find_resource(variable: Object) -> str:
    name: str = variable["valueFrom"]["resourceFieldRef"]["resource"]
    return name.removeprefix("limits.")


def parse_arguments(container: Object) -> Any:
    """Return the Deployment's arguments as `kvcast serve` reads them."""
    command, *arguments = expand(container)
    assert command == "serve"
    return make_parser().parse_args(arguments)


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> list[Object]:
    """What would be applied."""
    return build(f"overlays/{request.param}")


# -- all that is built


@pytest.mark.parametrize("name", BUILDS)
def test_what_is_built_is_what_kubernetes_takes(name):
    objects = build(name)
    assert {each["kind"] for each in objects} & {"Deployment", "Pod"}
    for thing, version in product(objects, VERSIONS):
        if thing["kind"] not in CUSTOM:
            kubernetes_validate.validate(thing, version, strict=True)


def test_every_folder_with_a_kustomization_is_built_here():
    folders = {str(path.parent.relative_to(FOLDER)) for path in FOLDER.rglob("kustomization.yaml")}
    assert folders == {*BUILDS, "base"}


def test_every_file_is_named_by_the_kustomization_beside_it():
    for path in FOLDER.rglob("*.*"):
        if path.name not in ("kustomization.yaml", "README.md"):
            assert f"- {path.name}\n" in path.with_name("kustomization.yaml").read_text(), path


@pytest.mark.parametrize("name", BUILDS)
def test_selectors_find_pods_and_ports_have_names_that_the_pods_have(name):
    objects = build(name)
    pods = [each["spec"]["template"] for each in objects if each["kind"] == "Deployment"]
    pods += [each for each in objects if each["kind"] == "Pod"]
    selectors = [labels for each in objects for labels in find_values(each, "matchLabels")]
    selectors += [each["spec"]["selector"] for each in objects if each["kind"] == "Service"]
    ours = [each for each in selectors if "app.kubernetes.io/name" in each]
    assert ours or name == "repository"
    servers = find_pod(build("overlays/cpu"))
    for labels in ours:
        assert any(labels.items() <= pod["metadata"]["labels"].items() for pod in [*pods, servers]), labels
    ports = {port["name"]: port["containerPort"] for pod in pods for port in find_ports(pod)}
    used = [
        port
        for thing in objects
        for key in ("port", "targetPort")
        for port in find_values(thing, key)
        if isinstance(port, str)
    ]
    assert {*used} <= {*ports}


def find_ports(pod: Object) -> list[Object]:
    return [port for container in pod["spec"]["containers"] for port in container.get("ports", [])]


def test_images_are_pinned_and_ours_is_of_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    images = {image for name in BUILDS for each in build(name) for image in find_values(each, "image")}
    for image in images:
        repository, _, tag = image.partition(":")
        assert re.fullmatch(r"\d+\.\d+\.\d+(-\w+)?", tag), image
        assert "kvcast" not in repository or tag.startswith(f"{version}-"), image
    assert {image.rpartition("-")[2] for image in images if "kvcast" in image} == {*OVERLAYS}


def test_names_that_objects_call_each_other_by_exist(overlay):
    pod = find_pod(overlay)["spec"]
    assert find(overlay, "ServiceAccount")["metadata"]["name"] == pod["serviceAccountName"]
    claim = find(build("repository"), "PersistentVolumeClaim")["metadata"]["name"]
    claims = {*find_values(overlay, "claimName"), *find_values(build("repository"), "claimName")}
    assert claims == {claim}
    proxy = build("haproxy")
    (volume,) = find_pod(proxy)["spec"]["volumes"]
    assert volume["configMap"]["name"] == find(proxy, "ConfigMap")["metadata"]["name"] != "kvcast-proxy"


# -- the server's pod


def test_the_command_is_one_that_kvcast_serve_takes_and_opens_the_ports_of_the_pod(overlay):
    container = find_container(overlay)
    arguments = parse_arguments(container)
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    opened = {name: getattr(arguments, f"{name}_port") for name in ports}
    assert opened == ports
    assert (arguments.host, arguments.is_guarded) == ("0.0.0.0", True)  # noqa: S104 in the pod
    assert find_models(arguments.models.split())
    assert dict(arguments.parameters) == {"intra_op_threads": container["resources"]["limits"]["cpu"]}
    services = [each for each in overlay if each["kind"] == "Service"]
    assert len(services) == 2
    for port in (port for each in services for port in each["spec"]["ports"]):
        assert port["port"] == ports[port["targetPort"]]


def test_the_image_starts_with_the_command_as_the_user_that_the_pod_wants(overlay):
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    entrypoint = json.loads(re.findall(r"^ENTRYPOINT (.+)$", dockerfile, re.MULTILINE)[-1])
    assert entrypoint[-1] == "kvcast"
    context = find_pod(overlay)["spec"]["securityContext"]
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}\n" in dockerfile


def test_nothing_runs_as_root_or_can_escalate():
    pods = [
        each["spec"].get("template", each)["spec"]
        for name in BUILDS
        for each in build(name)
        if each["kind"] in ("Deployment", "Pod")
    ]
    assert len(pods) == 4
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_what_is_mounted_exists_and_the_repository_is_only_read(overlay):
    pod, container = find_pod(overlay)["spec"], find_container(overlay)
    volumes = {each["name"]: each for each in pod["volumes"]}
    mounts = {each["mountPath"]: each for each in container["volumeMounts"]}
    assert {each["name"] for each in mounts.values()} == {*volumes}
    repository = mounts[str(parse_arguments(container).repository)]
    assert repository["readOnly"] is True
    assert volumes[repository["name"]]["persistentVolumeClaim"]["readOnly"] is True
    for mount in mounts.values():
        assert mount is repository or "sizeLimit" in volumes[mount["name"]]["emptyDir"], "a node's disk has an end"
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"  # noqa: S108


def budget(probe: Object) -> int:
    """Return after how many seconds a probe has failed."""
    return int(probe["periodSeconds"] * probe["failureThreshold"])


def test_the_times_fit_into_each_other(overlay):
    deployment, container = find(overlay, "Deployment")["spec"], find_container(overlay)
    arguments = parse_arguments(container)
    pre_stop = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    stopping = arguments.leave_seconds + arguments.drain_seconds + STOP_SECONDS
    assert find_pod(overlay)["spec"]["terminationGracePeriodSeconds"] >= pre_stop + stopping
    # `kvcast serve` times out first, with the reason.
    assert budget(container["startupProbe"]) > ServeConfig.start_timeout_seconds + 30
    assert deployment["progressDeadlineSeconds"] > budget(container["startupProbe"]) + deployment["minReadySeconds"]
    # Callers are led away at once; the server has time to mend itself.
    assert budget(container["readinessProbe"]) <= 5
    assert budget(container["livenessProbe"]) >= 600
    (endpoint,) = find(overlay, "PodMonitor")["spec"]["podMetricsEndpoints"]
    timeout, interval = (int(endpoint[name].removesuffix("s")) for name in ("scrapeTimeout", "interval"))
    assert ASK_SECONDS < timeout <= interval


def test_network_policies_allow_clients_and_prometheus_in_and_nothing_out(overlay):
    policy = find(overlay, "NetworkPolicy")["spec"]
    assert {*policy["policyTypes"]} == {"Ingress", "Egress"}
    assert policy["egress"] == []
    assert all(each["from"] for each in policy["ingress"]), "an empty list allows all"
    assert [[port["port"] for port in each["ports"]] for each in policy["ingress"]] == [["http", "grpc"], ["metrics"]]
    (selector,) = (each["podSelector"] for each in policy["ingress"][0]["from"] if "podSelector" in each)
    callers = [find(build("repository"), "Pod")["metadata"], find_pod(build("haproxy"))["metadata"]]
    assert all(selector["matchLabels"].items() <= each["labels"].items() for each in callers)


# -- sizes


def test_what_depends_on_the_model_is_in_the_sizes_alone():
    text = (FOLDER / "base" / "deployment.yaml").read_text()
    deployment = yaml.safe_load(text)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert "resources" not in container
    assert not list(find_values(deployment, "terminationGracePeriodSeconds"))
    volumes = {each["name"]: each["emptyDir"] for each in deployment["spec"]["template"]["spec"]["volumes"][1:]}
    assert "sizeLimit" not in volumes["shared-memory"]


def mebibytes(size: str) -> int:
    assert size.endswith("Mi")
    return int(size.removesuffix("Mi"))


# -- against a real server


def ask_as_kubelet(address: str, path: str) -> int:
    request = urllib.request.Request(
        f"http://{address}{path}",
        headers={"User-Agent": "kube-probe/1.35", "Accept": "*/*", "Connection": "close"},
    )
    with urllib.request.urlopen(request, timeout=5) as reply:  # noqa: S310
        return int(reply.status)


def test_probes_and_scrapes_are_answered_by_a_server(server, overlay):
    addresses = {"http": server.http_address, "metrics": server.metrics_address}
    container = find_container(overlay)
    asked = [container[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")]
    asked += find(overlay, "PodMonitor")["spec"]["podMetricsEndpoints"]
    for each in asked:
        assert ask_as_kubelet(addresses[each["port"]], each["path"]) == 200


class Pod:
    """The Deployment's container, in namespaces of its own."""

    def __init__(self, objects: list[Object], repository: Path, folder: Path) -> None:
        pod, container = find_pod(objects)["spec"], find_container(objects)
        volumes = {each["name"]: each for each in pod["volumes"]}
        mounts = {each["mountPath"]: volumes[each["name"]] for each in container["volumeMounts"]}
        writable = {path: each["emptyDir"]["sizeLimit"] for path, each in mounts.items() if "emptyDir" in each}
        context = pod["securityContext"]
        variables = {each["name"]: each["value"] for each in container["env"] if "value" in each}
        root = folder / "root"
        root.mkdir()
        spec = {
            "root": str(root),
            "volumes": {path: str(repository) for path in mounts if path not in writable},
            "writable": {path: f"size={mebibytes(size) << 20}" for path, size in writable.items()},
            "keep": [str(ROOT), sys.prefix, sys.base_prefix],
            "user": context["runAsUser"],
            "group": context["runAsGroup"],
            "environment": {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **variables},
            "command": [str(Path(sys.executable).with_name("kvcast")), *expand(container)],
        }
        (folder / "spec.json").write_text(json.dumps(spec))
        command = [*NAMESPACES, sys.executable, pod_program, str(folder / "spec.json")]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def wait_until_it_serves(self) -> None:
        assert self.process.stdout is not None
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if "Ctrl-C" in line:
                return
        raise AssertionError("".join(lines[-20:]))

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run something in the pod's network."""
        enter = ["nsenter", "--preserve-credentials", "-t", str(self.process.pid), "-U", "-n", "--"]
        return subprocess.run([*enter, *command], capture_output=True, text=True, check=False, timeout=30)

    def get(self, path: str) -> tuple[int, str]:
        """Ask as the kubelet does."""
        result = self.run(sys.executable, "-c", GET, f"http://127.0.0.1:8000{path}")
        assert result.returncode == 0, result.stderr
        status, _, body = result.stdout.partition(" ")
        return int(status), body

    def find_listeners(self) -> set[tuple[bool, int]]:
        """Return whether it is on the loopback only, and the port, of each socket that listens."""
        rows = [line.split() for line in self.run("cat", "/proc/net/tcp", "/proc/net/tcp6").stdout.splitlines()]
        addresses = [row[1].partition(":") for row in rows if row[3] == LISTENING]
        return {(bool(int(host, 16)), int(port, 16)) for host, _, port in addresses}


NAMESPACES = ["unshare", "--user", "--map-root-user", "--mount", "--net"]
GET = """
import sys, urllib.error, urllib.request
try:
    reply = urllib.request.urlopen(sys.argv[1], timeout=5)
except urllib.error.HTTPError as error:
    reply = error
print(reply.status, reply.read().decode())
"""


@pytest.fixture
def make_pod(tmp_path: Path) -> Iterator[Callable[[list[Object], Path], Pod]]:
    tried = subprocess.run([*NAMESPACES, "true"], capture_output=True, check=False) if shutil.which("unshare") else None
    if tried is None or tried.returncode or shutil.which("nsenter") is None:
        pytest.skip("this machine does not allow namespaces of one's own (unshare)")
    with contextlib.ExitStack() as stack:

        def make(objects: list[Object], repository: Path) -> Pod:
            pod = Pod(objects, repository, tmp_path)
            stack.callback(pod.process.communicate)
            stack.callback(pod.process.terminate)
            return pod

        yield make


def test_the_pod_serves_and_repairs_itself_and_leaves_with_nothing_writable_but_its_volumes(make_pod, tiny_repository):
    objects = build("overlays/cpu")
    model = parse_arguments(find_container(objects)).models
    pod = make_pod(objects, tiny_repository)
    pod.wait_until_it_serves()
    assert pod.get("/v2/health/ready")[0] == 200
    public = {port for is_loopback, port in pod.find_listeners() if not is_loopback}
    assert public == {each["containerPort"] for each in find_container(objects)["ports"]}
    triton = next(pid for pid in find_children(pod.process.pid) if list_stubs(pid))
    status = Path(f"/proc/{triton}/status").read_text()
    assert re.search(r"^CapEff:\s+0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)

    (stub,) = list_stubs(triton)
    os.kill(stub, signal.SIGKILL)
    wait_until(lambda: json.loads(pod.get("/kvcast/state")[1])["repairs"] == 1, 20)
    kvcast = str(Path(sys.executable).with_name("kvcast"))
    probe = pod.run(kvcast, "probe", "--address", "127.0.0.1:8001", "--model", model)
    assert probe.returncode == 0, probe.stderr

    pod.process.terminate()
    wait_until(lambda: pod.get("/v2/health/ready")[0] == 503, 5)
    assert pod.get("/v2/health/live")[0] == 200
    assert pod.process.wait(30) == 0


# -- custom resources


def list_custom() -> list[Object]:
    things = [thing for path in FOLDER.rglob("*.yaml") for thing in yaml.safe_load_all(path.read_text())]
    return [thing for thing in things if thing["kind"] in CUSTOM]


def list_keys(thing: Any) -> Iterator[str]:
    """Return the names of fields, without labels."""
    if isinstance(thing, dict):
        yield from (name for name in thing if not re.fullmatch(r"\d+|.*[./].*", name))
    for each in thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list) else ():
        yield from list_keys(each)


def test_fields_of_custom_resources_are_spelt_as_their_projects_spell_them():
    custom = list_custom()
    assert {each["kind"] for each in custom} == CUSTOM == {*FIELDS}
    for thing in custom:
        assert {*list_keys(thing["spec"])} <= {*FIELDS[thing["kind"]].split()}, thing["kind"]


def test_custom_resources_fit_their_definitions():
    folder = os.environ.get(CRDS_VARIABLE)
    if not folder:
        pytest.skip(f"set {CRDS_VARIABLE} to a folder with the definition of the Prometheus operator")
    known = {
        (f"{each['spec']['group']}/{version['name']}", each["spec"]["names"]["kind"]): version["schema"]
        for path in Path(folder).rglob("*.yaml")
        for each in yaml.safe_load_all(path.read_text())
        if each and each["kind"] == "CustomResourceDefinition"
        for version in each["spec"]["versions"]
    }
    for thing in list_custom():
        schema = close(known[thing["apiVersion"], thing["kind"]]["openAPIV3Schema"]["properties"]["spec"])
        errors = [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(thing["spec"])]
        assert errors == [], thing["kind"]


def close(schema: Any) -> Any:
    """Return a schema that takes no fields but its own, as Kubernetes would prune others."""
    if isinstance(schema, list):
        return [close(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: close(each) for name, each in schema.items()}
    is_open = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if schema.get("type") == "object" and "properties" in schema and not is_open:
        closed["additionalProperties"] = False
    return closed


# -- affinity


def read_sections(path: Path) -> dict[str, list[str]]:
    """Return the sections of haproxy's configuration without comments."""
    sections: dict[str, list[str]] = {}
    for line in (line.partition("#")[0].rstrip() for line in path.read_text().splitlines()):
        if line and not line[0].isspace() and not line.startswith("."):
            sections[line] = lines = []
        elif line.strip():
            lines.append(" ".join(line.split()))
    return sections


def test_haproxy_in_the_cluster_is_haproxy_before_it_but_for_how_servers_are_found():
    ours, plain = (read_sections(path / "haproxy" / "haproxy.cfg") for path in (FOLDER, FOLDER.parent))
    assert "parse-resolv-conf" in ours.pop("resolvers cluster")
    conditional = [".if version_atleast(3.0)", "default-server hash-key addr", ".endif"]
    assert [line for line in ours["defaults"] if line in conditional] == conditional
    ours["defaults"] = [line for line in ours["defaults"] if line not in conditional]
    # Servers from DNS cannot track each other's health by name: here each backend asks for itself, in the same way.
    checks = [{*find_checks(ours[f"backend {name}"])} for name in ("http", "grpc")]
    assert checks[0] == {*find_checks(plain["backend http"])}
    question = {
        "option httpchk",
        "http-check connect port 8000 proto h1",
        "http-check send meth GET uri /v2/health/ready",
    }
    default = {line.removesuffix(" proto h2") for line in checks[1] - question}
    assert checks[1] >= question
    assert default | {"option httpchk GET /v2/health/ready"} == checks[0]
    for sections in (ours, plain):
        for name, lines in sections.items():
            kept = [line for line in lines if not re.match(r"server(-template)? ", line)]
            kept = [line for line in kept if line not in find_checks(lines)]
            sections[name] = [re.sub(r"^bind \S*:", "bind :", line) for line in kept]
    assert ours == plain, "a change of deploy/haproxy/haproxy.cfg belongs into deploy/kubernetes/haproxy/ too"


def find_checks(lines: list[str]) -> list[str]:
    """Return the lines of a backend that configure health checks."""
    return [line for line in lines if line.startswith(("default-server", "option httpchk", "http-check"))]


def test_haproxy_reads_its_configuration_and_has_room_for_all_servers(monkeypatch):
    monkeypatch.setenv("NAMESPACE", "ours")
    path = FOLDER / "haproxy" / "haproxy.cfg"
    result = run_tool("haproxy", "-c", "-f", path)
    assert result.returncode == 0, result.stderr
    servers = [line.split() for lines in read_sections(path).values() for line in lines if "server-template" in line]
    overlay = build("overlays/cpu")
    deployment = find(overlay, "Deployment")["spec"]
    most = deployment["replicas"] + deployment["strategy"]["rollingUpdate"]["maxSurge"]
    assert find(overlay, "PodDisruptionBudget")["spec"]["maxUnavailable"] < deployment["replicas"]
    service = find(overlay, "Service", "kvcast-servers")
    ports = [str(each["port"]) for each in service["spec"]["ports"]]
    assert len(servers) == 2
    for (_, _, slots, address, *_), port in zip(servers, ports, strict=False):
        assert int(slots) >= most
        assert address == f'"{service["metadata"]["name"]}.${{NAMESPACE}}.svc.cluster.local:{port}"'
    proxied = {each["name"]: each["port"] for each in find(build("haproxy"), "Service")["spec"]["ports"]}
    assert proxied == {each["name"]: each["port"] for each in find(overlay, "Service", "kvcast")["spec"]["ports"]}
