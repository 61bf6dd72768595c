"""Stage `verify`: does the text that `clean` kept help a language model? Ultra-FineWeb's check.

The tool is `ultraclean` (arXiv 2505.05427, efficient verification): a small model, nearly trained
on the raw pool, is annealed on 30 % kept text and 70 % raw pool, and on the raw pool alone, with
several seeds. Both are measured on passages of good sources that neither saw.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from minicpm4.pipeline.stage import Estimate, Stage, StageConfig, Workspace, needs
from minicpm4.pipeline.text import in_share


class VerifyConfig(StageConfig):
    """Keys of the stage `verify` in a pipeline's YAML."""

    width: int = Field(default=128, ge=32, description="of the small model")
    layers: int = Field(default=2, ge=1)
    vocab_size: int = Field(default=2048, ge=300)
    base_tokens: int = Field(default=400_000, ge=1000, description="the base is trained on")
    tokens: int = Field(default=60_000, ge=500, description="each arm is annealed on")
    seeds: int = Field(default=3, ge=2, description="runs of each arm")
    candidate: float = Field(default=0.3, gt=0, le=1, description="share of kept text in the mix")
    length: int = Field(default=128, ge=16, description="tokens in a window")
    lr: float = Field(default=3e-3, gt=0)
    held_out: float = Field(default=0.1, gt=0, lt=0.5, description="documents only measured on")


def run(config: VerifyConfig, inputs: dict[str, Path], space: Workspace) -> None:
    """Train the base, anneal the arms, compare."""
    with needs("ultraclean", "verify"):
        import ultraclean
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(space.threads)
    kept, rejected = _read(inputs["kept"]), _read(inputs["rejected"])
    pool = sorted(kept + rejected, key=lambda row: row["id"])

    def held_out(row: dict[str, Any]) -> bool:
        return in_share(row["id"], config.held_out, "verify")

    evaluation = [row["text"] for row in pool if held_out(row) and row["from_good"]]
    mix = [row["text"] for row in pool if not held_out(row)]
    candidate = [row["text"] for row in kept if not held_out(row)]
    if not evaluation or not candidate:
        raise ValueError("too little text was kept to verify: lower clean.threshold")
    base = space.path / "base"
    if not (base / "base.json").exists():
        space.progress("training the base on the raw pool", 0.0)
        steps = max(1, config.base_tokens // (16 * config.length))
        ultraclean.make_base(
            mix,
            base,
            width=config.width,
            layers=config.layers,
            vocab_size=config.vocab_size,
            tokens=config.base_tokens,
            length=config.length,
            lr=config.lr,
            seed=space.seed,
            progress=lambda step: space.progress("training the base", 0.5 * step / steps),
        )
    recipe = ultraclean.Recipe(
        candidate=config.candidate,
        tokens=config.tokens,
        length=config.length,
        lr=config.lr,
        seeds=config.seeds,
    )
    found = ultraclean.verify(
        base,
        {"kept": candidate},
        mix,
        {"good text": evaluation},
        recipe,
        space.path / "arms",
        lambda done, of: space.progress(f"arm {done} of {of}", 0.5 + 0.5 * done / of),
    )
    gain = found.of("kept")
    space.write_metrics(
        {
            "gain": gain.gain,
            "error": gain.error,
            "needed": gain.needed,
            "verdict": gain.verdict,
            "losses": found.losses,
            "ledger": found.ledger,
            "texts": {"pool": len(mix), "kept": len(candidate), "held out": len(evaluation)},
            "settings": config.model_dump(exclude={"inputs"}),
        }
    )


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def estimate(config: VerifyConfig, inputs: dict[str, Path]) -> Estimate:
    """FLOPs of the base and of the arms, on matrices too small for much of a core's speed."""
    weights = config.vocab_size * config.width + 13 * config.layers * config.width**2
    tokens = config.base_tokens + 2 * config.seeds * config.tokens
    return Estimate(
        seconds=20 + 6 * weights * tokens / 10e9,
        memory_bytes=1_500_000_000,
        disk_bytes=10 * weights + 10_000_000,
    )


STAGE = Stage(
    name="verify",
    summary="anneal a small model on the kept text against a control: does it help?",
    config=VerifyConfig,
    run=run,
    estimate=estimate,
    inputs={"kept": "clean.kept", "rejected": "clean.rejected"},
    outputs={"metrics": "metrics.json"},
    sources=("ultraclean", "minicpm4.stages.verify", "minicpm4.pipeline.text"),
)
