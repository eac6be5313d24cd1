"""`python -m tests.manifests`: what lies in deploy/kubernetes is what Kubernetes takes, without a cluster and kubectl.

Each object is held against the schemas of the newest Kubernetes and of the oldest that is supported beside it; unknown
fields are errors. Each file is named by a kustomization, and each name is a file. Custom resources have no schema here,
and what kustomize makes of overlays is not looked at: tests/deploy/test_kubernetes.py does both, as far as it can.
"""

import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

FOLDER = Path(__file__).parents[1] / "deploy" / "kubernetes"
KUSTOMIZATION = "kustomization.yaml"
VERSIONS = ("1.37.0", "1.35.0")
# What an operator of somebody else's reads: not in Kubernetes' schemas.
CUSTOM = {"PodMonitor"}
# Files of kustomizations: objects, folders, patches, files that are put into ConfigMaps.
OBJECTS, FOLDERS, PATCHES = "resources", "bases", "patchesStrategicMerge"
# Not for kustomize.
OTHERS = {"README.md"}

Object = dict[str, Any]


class StrictLoader(yaml.SafeLoader):
    """Refuses what says one thing twice, where YAML's readers silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping.

        Raises:
            yaml.YAMLError: a key is there twice.
        """
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{', '.join(twice)}: is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_objects(path: Path) -> list[Object]:
    """Return the objects of a file.

    Raises:
        yaml.YAMLError: it is not YAML, or says something twice.
    """
    return [each for each in yaml.load_all(path.read_text(), StrictLoader) if each]


@functools.cache
def read_definitions(version: str) -> Registry[Any]:
    """Return what the schemas of a version refer to."""
    contents = schema_contents(f"kubernetes-json-schema/v{version}-local-strict/_definitions.json", version)
    return Resource.from_contents(contents) @ Registry()


def find_errors(thing: Object, version: str, *, is_patch: bool = False) -> list[str]:
    """Return what a version of Kubernetes would refuse in an object; of a patch, but for what it leaves out."""
    group, _, name = thing["apiVersion"].rpartition("/")
    prefix = f"{group.partition('.')[0]}-" if group else ""
    file = f"kubernetes-json-schema/v{version}-local-strict/{thing['kind'].lower()}-{prefix}{name}.json"
    try:
        schema = schema_contents(file, version)
    except FileNotFoundError:
        return [f"there is no {thing['kind']} of {thing['apiVersion']}"]
    validator = jsonschema.Draft202012Validator(schema, registry=read_definitions(version))
    return [
        f"{'.'.join(map(str, error.path))}: {error.message}"
        for error in validator.iter_errors(thing)
        if not (is_patch and error.validator == "required")
    ]


def list_kustomizations(folder: Path) -> dict[Path, Object]:
    """Return the kustomizations by their folders."""
    return {path.parent: read_objects(path)[0] for path in sorted(folder.rglob(KUSTOMIZATION))}


def list_files(kustomization: Object) -> list[str]:
    """Return the files that a kustomization names."""
    generated = [file for each in kustomization.get("configMapGenerator", []) for file in each["files"]]
    return [*kustomization.get(OBJECTS, []), *kustomization.get(PATCHES, []), *generated]


def check_files(folder: Path) -> Iterator[str]:
    """Say which files are missing, and which nobody reads."""
    named = {folder / name for name in OTHERS}
    for place, kustomization in list_kustomizations(folder).items():
        named |= {place / KUSTOMIZATION, *(place / name for name in list_files(kustomization))}
        for base in kustomization.get(FOLDERS, []):
            if not (place / base / KUSTOMIZATION).is_file():
                yield f"{place.relative_to(folder)}: there is no kustomization in {base}"
    there = {path for path in folder.rglob("*") if path.is_file()}
    yield from (f"{path.relative_to(folder)}: there is no such file" for path in sorted(named - there))
    yield from (f"{path.relative_to(folder)}: no kustomization names it" for path in sorted(there - named))


def check_objects(folder: Path) -> Iterator[str]:
    """Say what Kubernetes would refuse."""
    for place, kustomization in list_kustomizations(folder).items():
        for name in filter(lambda name: name.endswith(".yaml"), list_files(kustomization)):
            for thing in read_objects(place / name):
                for version in VERSIONS if thing["kind"] not in CUSTOM else ():
                    is_patch = name in kustomization.get(PATCHES, [])
                    for error in find_errors(thing, version, is_patch=is_patch):
                        yield f"{(place / name).relative_to(folder)}: {thing['kind']}: {error} (Kubernetes {version})"


def main(folder: Path = FOLDER) -> int:
    """Say what is wrong; return the exit status."""
    try:
        errors = list(check_files(folder)) or list(check_objects(folder))
    except yaml.YAMLError as refusal:
        errors = [str(refusal)]
    for error in errors:
        print(f"manifests: {error}", file=sys.stderr)
    if errors:
        return 1
    objects = [
        thing
        for place, kustomization in list_kustomizations(folder).items()
        for name in kustomization.get(OBJECTS, [])
        for thing in read_objects(place / name)
    ]
    custom = [thing["kind"] for thing in objects if thing["kind"] in CUSTOM]
    print(f"manifests: {len(objects)} objects, {len(custom)} of them custom resources, without a schema here")
    return 0


if __name__ == "__main__":
    sys.exit(main())
