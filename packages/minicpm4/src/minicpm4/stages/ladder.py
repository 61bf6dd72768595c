"""The ladder of the stage `density`: training a rung, measuring a model, placing it by the law."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minicpm4.pipeline.stage import Workspace
    from minicpm4.stages.density import DensityStageConfig

HEAD_DIM = 32
# A size further from the ladder's models than this factor is not given: its exponent is fitted to
# models that span little more, and a small exponent turns a little loss into any size at all.
REACH = 10.0


def train_rung(
    config: DensityStageConfig,
    data: Path,
    tokenizer: Any,
    pairs: list[Any],
    width: int,
    steps: int,
    space: Workspace,
) -> dict[str, Any]:
    """Train one model of the ladder and measure it; a kill goes on from its checkpoint."""
    import torch

    from minicpm4.data import TokenData
    from minicpm4.modeling import MiniCPM4ForCausalLM
    from minicpm4.presets import preset
    from minicpm4.schedule import WSD
    from minicpm4.trainer import TrainConfig, train

    torch.manual_seed(space.seed)
    model = MiniCPM4ForCausalLM(
        preset(
            "nano", vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width,
            num_attention_heads=width // HEAD_DIM, num_key_value_heads=1,
            # The smallest width is the µP base, so that the ladder extrapolates upwards.
            dim_model_base=min(config.widths),
        )
    )  # fmt: skip
    settings = TrainConfig(
        batch_size=config.batch_size, length=config.length, eval_every=steps, eval_windows=8,
        bf16=False, seed=space.seed,
    )  # fmt: skip
    out = space.path / "ladder" / f"{width}-{steps}"
    train(
        model,
        TokenData(data / "train"),
        TokenData(data / "validation"),
        WSD(config.lr, steps, max(1, steps // 10), 0.2),
        steps,
        settings,
        out,
    )
    shutil.rmtree(out)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": steps * config.batch_size * config.length,
        **measured(model.eval(), tokenizer, pairs),
    }


def measured(model: Any, tokenizer: Any, pairs: list[Any]) -> dict[str, Any]:
    """Conditional loss of a model; per byte, so that tokenizers may differ."""
    import densing

    found = densing.measure_conditional_loss(model, tokenizer, pairs, batch_size=16)
    return {
        "model_parameters": sum(p.numel() for p in model.parameters()),
        "nats_per_byte": found.per_byte,
        "nats_per_token": found.per_token,
    }


def place(
    runs: list[dict[str, Any]],
    models: dict[str, dict[str, Any]],
    tokens: float,
    config: DensityStageConfig,
    seed: int,
) -> dict[str, Any]:
    """The ladder's law, and each model's effective size by it, with intervals."""
    import numpy as np

    import densing
    from densing.fitting import PowerLaw, bootstrap, fit, identify

    form = PowerLaw(irreducible=False)
    ladder = {
        "parameters": [r["parameters"] for r in runs],
        "tokens": [r["tokens"] for r in runs],
        "loss": [r["nats_per_byte"] for r in runs],
    }
    law = fit(form, ladder)
    draws = bootstrap(law, ladder, resamples=max(config.resamples, 1), seed=seed).constants
    sizes = law.ranges["parameters"]
    own = []
    for name, row in models.items():
        found = densing.effective_from_losses(
            [row["nats_per_byte"]], densing.LossLaw(*law.constants.values()), tokens, sizes
        )
        usable = draws[(draws > 0).all(axis=1)]
        each = np.array(
            [
                densing.effective_from_losses(
                    [row["nats_per_byte"]], densing.LossLaw(*map(float, d)), tokens
                ).parameters[0]
                for d in usable
            ]
        )
        low, high = np.quantile(each, [0.025, 0.975], method="inverted_cdf")
        size, real = float(found.parameters[0]), row["model_parameters"]
        beyond = _beyond(size, sizes)
        own.append(
            {
                "name": name,
                **row,
                "effective_parameters": None if beyond else size,
                "density": None if beyond else size / real,
                "interval": None if beyond else [_finite(low / real), _finite(high / real)],
                "beyond": beyond,
            }
        )
    return {
        "law": law.to_dict(),
        "flags": [f.message for f in identify(law, ladder)],
        "tokens": tokens,
        "reach": [sizes[0] / REACH, sizes[1] * REACH],
        "own": own,
    }


def _beyond(size: float, sizes: Sequence[float]) -> str | None:
    """On which side of the ladder's reach a size is; None within it."""
    if size > sizes[1] * REACH:
        return "above"
    return "below" if size < sizes[0] / REACH else None


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
