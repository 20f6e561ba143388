"""Tells the compiler which results are too dear to be computed twice.

torch's partitioner decides what a compiled block keeps for its backward pass. It knows `mm`, `_scaled_mm` and flash
attention to be dear, but neither cuDNN's attention nor `_int_mm`, and computes those again where it may.

Imported when something is compiled: torch's compiler takes seconds to import.
"""

from __future__ import annotations

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

import pixtune.engine.lora  # noqa: F401, which registers its operator
from pixtune.engine.attention import in_force

DEAR_OPERATORS = (
    torch.ops.pixtune.add_low_rank.default,  # before the products that it reads: a lost mark goes from it to them
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._int_mm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
)


def is_computed_again(node: torch.fx.Node) -> bool:
    """Whether the backward pass shall compute it from what it comes from."""
    return node.meta.get("recompute") in (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


class KeepDearResults(CustomGraphPass):
    """Marks results of the operators above, in the joint graph of forward and backward pass, as not to be computed
    again. What the backward pass does not need is not kept."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for operator in DEAR_OPERATORS:
            for node in graph.find_nodes(op="call_function", target=operator):
                if "recompute" in node.meta:  # within `recompute`
                    continue
                # So is this, where torch 2.11 has lost the mark: it leaves it out inside of some autograd functions.
                again = [user.meta for user in node.users if is_computed_again(user)]
                results = list(node.users) if isinstance(node.meta.get("val"), tuple | list) else []
                for kept in (node, *results):
                    kept.meta["recompute"] = again[0]["recompute"] if again else CheckpointPolicy.MUST_SAVE
                if again:
                    node.meta["ac_graph_id"] = again[0]["ac_graph_id"]

    def uuid(self) -> object:
        """Part of the key under which compiled graphs are kept on disk. torch 2.11 leaves out which attention kernels
        were allowed, and which came first, and would give a run the graphs of another that had others."""
        return get_hash_for_files((__file__,), str(in_force()))
