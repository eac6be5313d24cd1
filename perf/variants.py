"""A model repository as it would be with other parameters: links to the artefacts, `config.pbtxt` rewritten.

It knows the parameters' spelling in `config.pbtxt`; it does not know what they do.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from kvcast.contract.manifest import RELEASES_FILE
from kvcast.contract.tensors import RANKER_RESIDENT, USER_ENCODER
from kvcast.perf.analyzer import PerfError

CACHE_MODELS = (USER_ENCODER.name, RANKER_RESIDENT.name)


def make_variant(repository: Path, folder: Path, parameters: Mapping[str, Mapping[str, str]]) -> Path:
    """Make a repository in `folder` with the artefacts of another and, for some models, other parameters.

    Args:
        repository: an exported repository; it is not changed.
        folder: where the new one goes.
        parameters: model → parameter → value.

    Raises:
        PerfError: a model has no such parameter.
    """
    for config in sorted(repository.resolve().glob("*/config.pbtxt")):
        model = folder / config.parent.name
        model.mkdir(parents=True)
        for version in config.parent.glob("[0-9]*"):
            (model / version.name).symlink_to(version)
        text = config.read_text()
        for name, value in parameters.get(model.name, {}).items():
            entry = re.compile(rf'(key: "{re.escape(name)}" value {{ string_value: ")[^"]*"')
            if not entry.search(text):
                raise PerfError(f"{config}: expected a parameter {name}, as the config.pbtxt of this version has")
            text = entry.sub(rf'\g<1>{value}"', text)
        (model / config.name).write_text(text)
    if (repository / RELEASES_FILE).exists():
        (folder / RELEASES_FILE).symlink_to((repository / RELEASES_FILE).resolve())
    return folder


def set_cache(megabytes: float) -> dict[str, dict[str, str]]:
    """Return the parameters that give every cache this budget; 0 turns it off."""
    return {model: {"user_kv_cache_megabytes": f"{megabytes:g}"} for model in CACHE_MODELS}
