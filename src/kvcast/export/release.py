"""What an export is known by: `release`, a hash of what decides a score, and `kv_id`, of what user KV depends on.

Neither holds what is only said of a model: its name, its workload, how many candidates a request may have.
"""

import hashlib
import inspect
import json
import sys
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor

from kvcast.export.template import GraphTemplate, list_weights
from kvcast.networks import attention, interface, masks
from kvcast.networks.interface import RankingNetwork
from kvcast.protocol.manifest import CONTRACT_VERSION


def fingerprint_release(network: RankingNetwork) -> str:
    """Return the SHA-256 (hex) over contract version, network settings, schema, KV layout, code, and every weight.

    The code is in it because two networks with the same weights can compute different things: by the versions that the
    family and its bases declare, or by their text.
    """
    tensors = {
        **dict(network.named_parameters(remove_duplicate=False)),
        **dict(network.named_buffers(remove_duplicate=False)),
    }
    schema = msgspec.to_builtins(network.config.schema)
    return _digest([_list_settings(network), schema], tensors)


def fingerprint_kv(network: RankingNetwork, encoder: GraphTemplate) -> str:
    """Return the same over what the user's side is made of: two releases that share it read each other's user KV.

    Of the schema it is the history's fields; of the weights, those that the traced encoder reads. The steps of the
    trace are in it too, so that code that looks at anything else of the configuration cannot mix KV.
    """
    fields, weights = msgspec.to_builtins(network.config.schema.history_fields), list_weights(network)
    return _digest(
        ["user KV", _list_settings(network), fields, encoder.steps], {name: weights[name] for name in encoder.reads}
    )


def hash_steps(program: torch.export.ExportedProgram) -> str:
    """Return the SHA-256 (hex) of a traced program's steps, and of the constants in it."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    steps = [
        f"{node.target} {node.args} {node.kwargs}"
        for graph in graphs
        for node in graph.nodes
        if node.op != "placeholder" and (node.users or node.op == "output")
    ]
    buffers = {*program.graph_signature.buffers}
    constants = {name: each for name, each in list_tensors_read(program).items() if name in program.constants}
    return _digest(steps, {name: each for name, each in constants.items() if name not in buffers})


def list_tensors_read(program: torch.export.ExportedProgram) -> dict[str, Tensor]:
    """Return the weights, buffers and constants that a traced program uses, by their names in it."""
    tensors = {**program.state_dict, **program.constants}
    used = {node.name for node in program.graph.nodes if node.users}
    specs = [spec for spec in program.graph_signature.input_specs if spec.target is not None]
    return {str(spec.target): tensors[str(spec.target)] for spec in specs if spec.arg.name in used}


def _digest(settings: list[Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(f"kvcast contract {CONTRACT_VERSION}\n{json.dumps(settings, sort_keys=True)}\n".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().numpy().data)
    return digest.hexdigest()


def _list_settings(network: RankingNetwork) -> dict[str, Any]:
    """Return what both sides depend on."""
    return {
        "network": network.config.list_settings()["network"],
        "limits.history": network.config.limits.history,
        "kv_layout": msgspec.to_builtins(network.kv_layout),
        "code": _list_versions(type(network)) or _list_sources(network),
    }


def _list_versions(family: type[RankingNetwork]) -> list[Any]:
    """Return the versions that a family and its bases declare, each its own; none where one of them declares none."""
    classes = [each for each in family.__mro__ if issubclass(each, RankingNetwork) and each is not RankingNetwork]
    versions = [vars(each).get("version") for each in classes]
    return [] if None in versions else versions


def _list_sources(network: RankingNetwork) -> list[str]:
    """Return the text of the family's own file first, then of others that its bases and parts are written in."""
    classes = [each for part in network.modules() for each in type(part).__mro__]
    names = dict.fromkeys([type(network).__module__, *sorted({each.__module__ for each in classes})])
    known = {attention.__name__, interface.__name__, masks.__name__}
    libraries = {"abc", "builtins", "torch", "typing"}
    own, *others = [
        inspect.getsource(sys.modules[name])
        for name in names
        if name not in known and name.partition(".")[0] not in libraries
    ]
    shared = [inspect.getsource(attention), inspect.getsource(masks)]
    return [own, *sorted(others), *shared]  # by their text: where a module lies decides no score
