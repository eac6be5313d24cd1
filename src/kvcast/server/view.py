"""The repository as Triton sees it: a private folder of links to artefacts, and configurations that name versions.

The operator's repository is only read. Versions in the view are numbers of releases, so that two releases can be
loaded side by side, and an ensemble names the versions of its steps, so that it never mixes them.
"""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from kvcast.protocol.decoding import read_file
from kvcast.protocol.tensors import MODELS, ModelSpec
from kvcast.server.installation import ServerError

CONFIG_FILE = "config.pbtxt"
# Triton expects a version of an ensemble too.
ENSEMBLE_VERSION = "1"
# If a parameter has changed, Triton loads a model again in the background, without refusing requests.
LOADED_PARAMETER = "KVCAST_LOADED"


class View:
    """The folder that Triton gets as its model repository."""

    def __init__(
        self, repository: Path, folder: Path, models: Iterable[ModelSpec], parameters: Mapping[str, str] | None = None
    ) -> None:
        """Create the folder with the models' configurations, without any version.

        parameters: values instead of those in the configurations, for each model that has such a parameter.
        """
        self.folder, self.models = folder, list(models)
        self._repository = repository.resolve()
        self._parameters = dict(parameters or {})
        self._check_parameters()
        self._loads: dict[str, int] = {}
        for model in self.models:
            (folder / model.name).mkdir(parents=True)
            if model.steps:
                (folder / model.name / ENSEMBLE_VERSION).mkdir()
                self.pin(model.name, {})
            else:
                self.renew(model.name)

    def link(self, model: str, artefacts: Mapping[int, Path]) -> None:
        """Link exactly these versions of a model."""
        for link in (self.folder / model).iterdir():
            if link.is_symlink() and int(link.name) not in artefacts:
                link.unlink()
        for version, artefact in artefacts.items():
            link = self.folder / model / str(version)
            if not link.is_symlink():
                link.symlink_to(artefact.resolve())

    def renew(self, model: str) -> None:
        """Change a model's configuration so that the next load starts new processes."""
        self._loads[model] = self._loads.get(model, 0) + 1
        config = self._read(model)
        config.version_policy.all.SetInParent()  # all that are linked
        config.parameters[LOADED_PARAMETER].string_value = str(self._loads[model])
        self._write(model, config)

    def pin(self, ensemble: str, versions: Mapping[str, int], name: str | None = None) -> None:
        """Set the versions of an ensemble's steps, under its own name or, for a trial, under another."""
        config = self._read(ensemble)
        for step in config.ensemble_scheduling.step:
            step.model_version = versions.get(step.model_name, step.model_version)
        if name is not None:
            (self.folder / name / ENSEMBLE_VERSION).mkdir(parents=True)
            config.name = name
        self._write(name or ensemble, config)

    def remove(self, name: str) -> None:
        """Remove a model."""
        shutil.rmtree(self.folder / name)

    def _check_parameters(self) -> None:
        """Check that each parameter is one of some model's."""
        known = dict.fromkeys(name for model in self.models for name in sorted(self._read(model.name).parameters))
        unknown = [name for name in self._parameters if name not in known]
        if unknown:
            raise ServerError(f"parameter {unknown[0]}: expected one of {', '.join(known)}")

    def _read(self, model: str) -> ModelConfig:
        """Return a model's configuration with the parameters replaced."""
        path = self._repository / model / CONFIG_FILE
        try:
            config = text_format.Parse(read_file(path, "run `make export` again", ServerError), ModelConfig())
        except text_format.ParseError as error:
            raise ServerError(f"{path}:{error}: expected the fields of tritonclient's ModelConfig") from error
        for name in config.parameters.keys() & self._parameters:
            config.parameters[name].string_value = self._parameters[name]
        return config

    def _write(self, model: str, config: ModelConfig) -> None:
        # Written outside the view, then moved: Triton never reads half of it.
        new = self.folder.parent / f"{model}.{CONFIG_FILE}"
        new.write_text(text_format.MessageToString(config))
        new.replace(self.folder / model / CONFIG_FILE)


def find_models(names: Iterable[str]) -> list[ModelSpec]:
    """Return the models that are needed to serve those named: the steps of ensembles too.

    Raises:
        ServerError: there is no such model, or none was named.
    """
    known = {model.name: model for model in MODELS}
    names = list(names)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ServerError(f"models: expected some of {', '.join(known)}, got {' '.join(unknown) or 'none'}")
    needed = [known[each] for name in names for each in (name, *known[name].steps)]
    return list(dict.fromkeys(needed))
