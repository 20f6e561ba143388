"""Marks for the compiler which results are too expensive to be recomputed.

torch's partitioner decides what a compiled block keeps for its backward pass. It knows that `mm`, `_scaled_mm` and
flash attention are expensive, but not that cuDNN's attention and `_int_mm` are, and recomputes those where it may.

Imported when something is compiled: torch's compiler takes seconds to import.
"""

from __future__ import annotations

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

import pixtune.engine.lora  # noqa: F401, which registers its operator
from pixtune.engine.attention import in_force

EXPENSIVE_OPERATORS = (
    torch.ops.pixtune.add_low_rank.default,  # before the products that it reads: a lost mark goes from it to them
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._int_mm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
)
RECOMPUTED = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)


class RecomputePolicy(CustomGraphPass):
    """Marks the results of the operators above, in the joint graph of forward and backward pass, as not to be
    recomputed. Those that the backward pass does not need are not kept."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for operator in EXPENSIVE_OPERATORS:
            for node in graph.find_nodes(op="call_function", target=operator):
                if "recompute" in node.meta:  # within `recompute`
                    continue
                # A result whose reader is recomputed is within `recompute` too, where torch 2.11 has lost its mark: it
                # leaves the mark out inside some autograd functions.
                recomputed = [user.meta for user in node.users if user.meta.get("recompute") in RECOMPUTED]
                results = list(node.users) if isinstance(node.meta.get("val"), tuple | list) else []
                for marked in (node, *results):
                    marked.meta["recompute"] = recomputed[0]["recompute"] if recomputed else CheckpointPolicy.MUST_SAVE
                if recomputed:
                    node.meta["ac_graph_id"] = recomputed[0]["ac_graph_id"]

    def uuid(self) -> object:
        """Returns a part of the key under which compiled graphs are kept on disk.

        torch 2.11 leaves out which attention kernels were allowed, and which came first, and would give a run the
        graphs of another that had others.
        """
        return get_hash_for_files((__file__,), str(in_force()))
