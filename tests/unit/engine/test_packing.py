"""A block's frozen tensors in one piece of memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pixtune.engine.packing import ALIGNMENT_BYTES, close_gaps, lay_out_frozen, packed_bytes
from pixtune.engine.quantize import NF4, QuantizedLinear

CPU = torch.device("cpu")


class Block(nn.Module):
    """Tensors of several formats, one of them trained, one empty, one twice."""

    transposed: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Linear(48, 5, dtype=torch.bfloat16).requires_grad_(False)
        self.quantized = QuantizedLinear(48, 32, NF4, torch.int8, tensor_cores=False)
        self.quantized.set_weight(torch.randn(32, 48))
        self.gain = nn.Parameter(torch.ones(7))
        self.register_buffer("nothing", torch.empty(0))
        self.register_buffer("slice", torch.randn(9, 12)[:, :4])
        self.register_buffer("transposed", torch.randn(6, 3).t())
        self.second = self.plain


def test_a_block_becomes_one_piece_of_the_same_values() -> None:
    blocks = [Block(), Block()]
    before = [{name: tensor.clone() for name, tensor in block.state_dict().items()} for block in blocks]
    trained = [block.gain.data_ptr() for block in blocks]
    close_gaps(blocks, CPU)
    for block, values, gain in zip(blocks, before, trained, strict=True):
        assert all(tensor.equal(values[name]) for name, tensor in block.state_dict().items())
        frozen = [packed.tensor for packed in lay_out_frozen(block)]
        assert len({tensor.untyped_storage().data_ptr() for tensor in frozen}) == 1
        assert all((t.data_ptr() - frozen[0].data_ptr()) % ALIGNMENT_BYTES == 0 for t in frozen)
        assert block.gain.data_ptr() == gain and block.second is block.plain
        assert block.transposed.stride() == (1, 3)
    assert frozen[0].untyped_storage().nbytes() == packed_bytes(lay_out_frozen(block)) < 6000
