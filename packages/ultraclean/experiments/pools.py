"""Which seed pool helps, and does cheap verification rank pools as training from scratch does?

    python packages/ultraclean/experiments/pools.py [--scale 3]

A default mix as a crawl is (mostly markup, posts and chatter), eight candidate pools, evaluations
on prose that nobody trains on. First `verify`: a base of 0.2M weights annealed on 30 % of the pool.
Then the same arms from random weights on ten times an anneal's tokens, the same 30 % of the pool
throughout, warm-up, constant and decaying rate. Kendall's tau compares the two orders of the
pools. An arm that is done is kept: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from shared import NOISE, PROSE, passages, sampled, save

from ultraclean import Recipe, make_base, proxy_model, verification, verify
from ultraclean.proxy_model import bits_per_byte, pack

RECIPE = Recipe(tokens=30_000, batch=16, length=64, seeds=3, eval_windows=60, lr=3e-3)
BASE = {"width": 64, "layers": 2, "vocab_size": 1500, "length": 64, "batch": 16, "lr": 3e-3}
BASE_TOKENS = 300_000


def texts() -> tuple[list[str], dict[str, list[str]], dict[str, list[str]]]:
    """(default mix, pools, evaluations); no document is in two of them."""
    halves = {
        name: (sampled(passages(name, "train"), 1200, 0)[::2],
               sampled(passages(name, "train"), 1200, 0)[1::2])
        for name in (*PROSE, *NOISE)
    }  # fmt: skip
    mix = [t for name in NOISE for t in halves[name][0]]
    mix += [t for name in PROSE for t in halves[name][0][: len(halves[name][0]) // 5]]
    pools = {name: halves[name][1] for name in halves}
    # Prose without its order: every word is right and nothing else.
    pools["sorted words"] = [" ".join(sorted(t.split())) for t in pools["wikipedia"]]
    judges = {name: passages(name, "test") for name in ("wikipedia", "news", "essays")}
    return mix, pools, judges


def base_of(folder: Path, mix: list[str], tokens: int = BASE_TOKENS) -> Path:
    """A nearly trained model of the default mix, made if it is not there."""
    if not (folder / "base" / "base.json").is_file():
        make_base(mix, folder / "base", tokens=tokens, **BASE)
    return folder / "base"


def from_scratch(
    folder: Path, base: Path, mix: list[str], pools: dict[str, list[str]],
    judges: dict[str, list[str]], scratch_seeds: int, recipe: Recipe,
) -> dict[str, list[float]]:  # fmt: skip
    """Arm -> mean bits per byte of each seed, trained on ten times an anneal's tokens."""
    _, tokenizer = proxy_model.load(base)
    config = transformers.AutoConfig.from_pretrained(base)
    default = pack(mix, tokenizer)
    packed = {name: pack(t, tokenizer) for name, t in pools.items()}
    judged = [pack(t, tokenizer, recipe.eval_windows * recipe.length * 4) for t in judges.values()]
    steps = 10 * recipe.steps
    taken = round(recipe.candidate * recipe.batch)
    found: dict[str, list[float]] = {}
    for seed, arm in itertools.product(range(scratch_seeds), [verification.CONTROL, *packed]):
        cell = folder / "scratch" / f"{arm}-{seed}.json"
        if not cell.is_file():
            began = time.perf_counter()
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(config)

            def batches(step: int, seed: int = seed, arm: str = arm) -> np.ndarray:
                draw = np.random.default_rng([1000 + seed, step])
                starts = draw.integers(0, len(default.tokens), recipe.batch)
                rows = [default.window(int(s), recipe.length) for s in starts]
                if arm in packed:
                    pool = packed[arm]
                    for i, start in enumerate(draw.integers(0, 1 << 40, taken)):
                        rows[i] = pool.window(int(start % len(pool.tokens)), recipe.length)
                return np.stack(rows)

            def rate(step: int) -> float:
                warm, cool = steps // 20, steps // 10
                return recipe.lr * min(1.0, (step + 1) / warm, max(0.02, (steps - step) / cool))

            proxy_model.train(model, batches, rate, steps)
            losses = [bits_per_byte(model, p, recipe.length, recipe.batch, recipe.eval_windows)
                      for p in judged]  # fmt: skip
            cell.parent.mkdir(parents=True, exist_ok=True)
            cell.write_text(json.dumps({"loss": statistics.mean(losses),
                                        "seconds": time.perf_counter() - began}))  # fmt: skip
            print(f"{arm} {seed}: {statistics.mean(losses):.4f}", flush=True)
        found.setdefault(arm, []).append(json.loads(cell.read_text())["loss"])
    return found


def kendall(a: list[float], b: list[float]) -> float:
    """Share of pairs in the same order minus the share in the other."""
    pairs = list(itertools.combinations(range(len(a)), 2))
    return float(sum(np.sign((a[i] - a[j]) * (b[i] - b[j])) for i, j in pairs) / len(pairs))


def error_of_kendall(
    cheap: list[float], errors: list[float], gains: list[list[float]], draws: int = 4000
) -> dict[str, float]:
    """How well Kendall's tau is known, and what it would be if both asked the same question.

    Args:
        cheap, errors: verified gains with their standard errors.
        gains: of each pool, by training from scratch with each seed.

    Returns:
        `error`: the tau's standard deviation when both gains are drawn again with their errors;
        `of_one_question` and `of_one_question_sd`: mean and deviation of the tau if verification
        measured what training from scratch did, each with its own noise; `by_chance_sd`: of so
        many pools in any order.
    """
    seeds = np.array(gains)
    dear, noise = seeds.mean(1), np.array(errors)
    # A seed moves all pools together, by its control; what is left is a run's own noise.
    rest = seeds - dear[:, None] - (seeds.mean(0) - seeds.mean())
    freedom = (seeds.shape[0] - 1) * (seeds.shape[1] - 1)
    scratch = float(np.sqrt((rest**2).sum() / freedom / seeds.shape[1]))
    draw = np.random.default_rng(0)

    def many(a: np.ndarray, b: np.ndarray, noisy: bool = True) -> np.ndarray:
        return np.array([
            kendall(a + noise * draw.normal(size=len(a)), b + scratch * draw.normal(size=len(b)))
            if noisy else kendall(a, draw.permutation(b)) for _ in range(draws)
        ])  # fmt: skip

    same = many(dear, dear)
    return {
        "error": float(many(np.array(cheap), dear).std()), "of_one_question": float(same.mean()),
        "of_one_question_sd": float(same.std()), "scratch_error": scratch,
        "by_chance_sd": float(many(dear, dear, noisy=False).std()),
    }  # fmt: skip


def main() -> None:
    """Print the tables, write results/pools.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/ultraclean-pools"))
    parser.add_argument("--scale", type=int, default=1, help="times all tokens")
    parser.add_argument("--scratch-seeds", type=int, default=2)
    options = parser.parse_args()
    scratch_seeds, scale = options.scratch_seeds, options.scale
    recipe = replace(RECIPE, tokens=scale * RECIPE.tokens)
    name = "pools" if scale == 1 else f"pools_x{scale}"
    folder = options.folder if scale == 1 else options.folder.with_name(f"ultraclean-{name}")
    mix, pools, judges = texts()
    base = base_of(folder, mix, scale * BASE_TOKENS)
    found = verify(base, pools, mix, judges, recipe, folder / "verify",
                   lambda done, of: print(f"arm {done} of {of}", flush=True))  # fmt: skip
    print(found.table())
    result = {"recipe": asdict(recipe), "base": {**BASE, "tokens": scale * BASE_TOKENS},
              **found.to_dict()}  # fmt: skip
    save(name, result)
    losses = from_scratch(folder, base, mix, pools, judges, scratch_seeds, recipe)
    control = losses[verification.CONTROL]
    gains = {arm: [c - x for c, x in zip(control, losses[arm], strict=True)] for arm in pools}
    cheap = [found.of(arm).gain for arm in pools]
    dear = [statistics.mean(gains[arm]) for arm in pools]
    per_seed = [kendall(cheap, [gains[arm][s] for arm in pools]) for s in range(scratch_seeds)]
    between = [kendall([gains[arm][a] for arm in pools], [gains[arm][b] for arm in pools])
               for a, b in itertools.combinations(range(scratch_seeds), 2)]  # fmt: skip
    spent = found.ledger
    scratch_tokens = (
        (len(pools) + 1) * scratch_seeds * 10 * recipe.steps * recipe.batch * (recipe.length)
    )
    result |= {
        "scratch_gains": gains, "kendall": kendall(cheap, dear), "kendall_by_seed": per_seed,
        "kendall_between_scratch_seeds": between,
        "kendall_error": error_of_kendall(
            cheap, [found.of(arm).error for arm in pools], [gains[arm] for arm in pools]
        ),
        "tokens_verification": spent["tokens_trained"], "tokens_scratch": scratch_tokens,
        "share": spent["tokens_trained"] / spent["arms"] / (10 * recipe.steps * recipe.batch
                                                          * recipe.length),
    }  # fmt: skip
    save(name, result)
    for arm, value in sorted(zip(pools, dear, strict=True), key=lambda pair: -pair[1]):
        print(f"{arm:14} verified {found.of(arm).gain:+.4f}, from scratch {value:+.4f}")
    print(
        f"Kendall's tau {result['kendall']:.3f} ({result['kendall_error']}), by seed {per_seed}; "
        f"between the seeds of training from scratch {between}; an arm costs "
        f"{result['share']:.1%} of one from scratch"
    )


if __name__ == "__main__":
    main()
