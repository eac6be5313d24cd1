"""A choice between two computations that stays a choice in an exported graph: an `If`, of which one side runs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def choose(
    condition: Tensor, if_true: Callable[..., Any], if_false: Callable[..., Any], *operands: tuple[Tensor, ...]
) -> Any:
    """Return `if_true(*operands)` or `if_false(*operands)`.

    Args:
        condition: BOOL, one element.
        if_true: returns a tensor or a tuple of tensors; must read nothing but its operands.
        if_false: the same, with results of the same shapes.
        operands: what both are given, in groups.
    """
    if torch.compiler.is_exporting():
        # Operands that are views of one tensor would be refused; the clones are gone from the ONNX graph.
        own = tuple(tuple(tensor.clone() for tensor in group) for group in operands)
        return torch.cond(condition, if_true, if_false, own)
    return if_true(*operands) if condition else if_false(*operands)
