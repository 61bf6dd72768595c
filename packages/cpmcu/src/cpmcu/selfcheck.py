"""Does the engine compute right on this machine? A random model, against its invariants."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from cpmcu import plan
from cpmcu._torch import torch
from cpmcu.backends import BACKENDS, module
from cpmcu.engine import Engine
from cpmcu.rope import Rope
from cpmcu.rounding import rounded
from cpmcu.spec import ModelSpec
from cpmcu.weights import allocate

if TYPE_CHECKING:
    from torch import Tensor

# Largest difference allowed between two ways to compute the same logits, relative to their scale.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2, "int8": 5e-2, "int4": 5e-2}


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One line: a backend in a dtype, whether it runs, its error and the limit of that error."""

    backend: str
    dtype: str
    available: bool
    reason: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether its error is within the tolerance; a backend that cannot run here has none."""
        return not self.available or self.error <= self.tolerance

    @property
    def verdict(self) -> str:
        """In a word or two."""
        return ("ok" if self.passed else "FAILED") if self.available else "cannot run here"

    def to_dict(self) -> dict[str, object]:
        """The check as JSON values."""
        return asdict(self) | {"passed": self.passed}


def tiny_engine(
    dtype: torch.dtype,
    *,
    seed: int = 0,
    quant: str = "auto",
    backend: str = "reference",
    rounded_to: str | None = None,
) -> Engine:
    """A random 3-layer model with an odd group of query heads, all options that have arithmetic."""
    spec = ModelSpec(
        architecture="qwen3",
        hidden=64,
        layers=3,
        heads=6,
        kv_heads=2,
        head_dim=16,
        ffn=96,
        vocab=97,
        rms_eps=1e-6,
        rope=Rope(),
        max_context=512,
        qk_norm=True,
        qkv_bias=True,
        embed_scale=3.0,
        residual_scale=0.7,
        logit_scale=0.5,
    )
    weights, generator = allocate(spec, dtype), torch.Generator().manual_seed(seed)
    for name, slot in weights.slots.items():
        values = torch.randn(slot.shape, generator=generator) / slot.shape[-1] ** 0.5
        if values.dim() == 2 and rounded_to is not None:
            outer = rounded_to == "int4" and name.startswith(("embed", "lm_head"))
            kind = "int8" if outer else rounded_to
            # They are made from bfloat16.
            values = rounded(values.bfloat16() if "int" in kind else values, kind)
        slot.copy_(values + 1.0 if name.endswith("norm.weight") else values)
    return Engine(spec, weights, quant=quant, backend=backend)


def run() -> list[Check]:
    """Check every backend in every dtype: whole prefill against odd chunks and single steps."""
    checks = []
    for backend in BACKENDS:
        for quant, tolerance in TOLERANCE.items():
            dtype = torch.float32 if quant == "float32" else torch.bfloat16
            if backend == "reference" and quant in ("int8", "int4"):
                continue
            plain = tiny_engine(dtype)
            supported, reason = module(backend).is_supported(plain.spec, dtype)
            on_cpu = backend != "gpu" and dtype == torch.bfloat16
            if on_cpu and supported and not plan.native_bf16():
                reason = "emulated on this processor"
            error = float("nan")
            if supported:
                error = _error(tiny_engine(dtype, quant=quant, backend=backend), quant)
            checks.append(
                Check(
                    backend=backend,
                    dtype=quant,
                    available=supported,
                    reason=reason,
                    error=error,
                    tolerance=tolerance,
                )
            )
    return checks


def _error(engine: Engine, quant: str) -> float:
    ids = torch.randint(
        engine.spec.vocab, (41,), generator=torch.Generator().manual_seed(1)
    ).tolist()
    # In fp32, the whole prompt at once, weights that are the same numbers: the plainest path
    # through the code. What remains of a difference is the arithmetic.
    whole = tiny_engine(torch.float32, rounded_to=quant).logits(ids)
    engine.reset()
    chunked = [engine.prefill(ids[:7]), engine.prefill(ids[7:24])]
    stepwise = [engine.decode(token) for token in ids[24:]]
    got: list[Tensor] = [*chunked, *stepwise]
    wanted = [whole[6], whole[23], *whole[24:]]
    difference = max(float((a - b).abs().max()) for a, b in zip(got, wanted, strict=True))
    return difference / float(whole.abs().max())
