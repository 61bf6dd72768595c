"""The reference, offered as a backend."""

from __future__ import annotations

from torch import Tensor

from infllm2 import reference
from infllm2.backends import DTYPES, Inputs
from infllm2.config import InfLLMv2Config


class ReferenceBackend:
    """Runs `infllm2.reference`: any shape, any device, autograd; memory grows with T·S."""

    def is_supported(self, inputs: Inputs) -> tuple[bool, str]:
        """Whether it can run on such inputs, and if not, why."""
        if inputs.dtype not in DTYPES:
            return False, f"dtype must be one of {DTYPES}, got {inputs.dtype}"
        if inputs.device == "meta":
            return False, "the tensors are on meta, where there are no values to choose by"
        return True, ""

    def select(
        self, q: Tensor, fine: Tensor, coarse: Tensor, length: int, config: InfLLMv2Config
    ) -> Tensor:
        """See `infllm2.select_blocks`."""
        return reference.select_blocks(q, fine, coarse, length, config)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, block_size: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """See `infllm2.block_sparse_attention`."""
        return reference.block_sparse_attention(q, k, v, blocks, block_size=block_size, scale=scale)


BACKEND = ReferenceBackend()
