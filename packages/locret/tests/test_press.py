"""Needs a python with kvpress and this package, which KVPRESS_PYTHON names: see the README."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

testbed = pytest.importorskip("testbed")
pytest.importorskip("transformers")

from locret import LocretConfig, RetainingHeads, prefill  # noqa: E402

PEER = os.environ.get("KVPRESS_PYTHON")
SOURCE = Path(__file__).parents[1] / "src"
needs_kvpress = pytest.mark.skipif(
    PEER is None, reason="KVPRESS_PYTHON names no python with kvpress and minicpm4-locret"
)

COMMON = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from locret.press import LocretPress
model_path, folder = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
press = LocretPress(0.75, folder)
"""
SCORES = """
ids, found, right = load_file(folder + "/ids.safetensors")["ids"], {}, press.score
def score(module, *args):
    found[f"score{module.layer_idx}"] = out = right(module, *args)
    return out.clone()
press.score = score
cache = DynamicCache()
with torch.no_grad(), press(model):
    model(ids, past_key_values=cache)
for i, layer in enumerate(cache.layers):
    found[f"value{i}"] = layer.values.contiguous()
save_file({k: v.contiguous() for k, v in found.items()}, folder + "/found.safetensors")
"""
PIPELINE = """
from kvpress import AdaKVPress, KVPressTextGenerationPipeline
tokenizer = AutoTokenizer.from_pretrained(model_path)
pipe = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
ask = lambda p: pipe("Ann likes tea. " * 60 + "Bob likes coffee. ", max_new_tokens=8,
                     questions=["What does Bob like?", "Who is Ann?"], press=p)["answers"]
press.compression_ratio = 0.0
dense = ask(None)
assert ask(press) == dense, (ask(press), dense)
press.compression_ratio = 0.5
print(json.dumps([ask(press), ask(AdaKVPress(press))]))
"""


def kvpress(code: str, model: Path, folder: Path) -> str:
    # This source, whatever was installed there.
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = [PEER, "-c", COMMON + code, str(model), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@needs_kvpress
@torch.no_grad()
@pytest.mark.parametrize("arch", ["smollm2", "qwen3", "phi3"])
@pytest.mark.parametrize("input", ["hidden", "qkv"])
def test_the_press_scores_and_keeps_as_we_do(arch: str, input: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    if arch == "smollm2":
        model, path = testbed.smollm2()[0], testbed.smollm2_path()
    else:
        model, path = testbed.tiny(arch), tmp_path / "model"
        model.save_pretrained(path)
    torch.manual_seed(0)
    heads = RetainingHeads.for_model(model, hidden=16, input=input)
    heads.save(tmp_path)
    vocabulary = model.config.vocab_size
    ids = torch.randint(5, vocabulary, (2, 64), generator=torch.Generator().manual_seed(0))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    kvpress(SCORES, path, tmp_path)
    found = load_file(tmp_path / "found.safetensors")
    whole = prefill(model, heads, ids, LocretConfig(budget=64, chunk=64, stabilisers=0, local=0))
    for i, layer in enumerate(whole.layers):
        scores = found[f"score{i}"]
        assert (scores - layer.scores).abs().max() < 1e-3 * max(1, layer.scores.std())
        # 16 of 64 are left, ours; they come from topk in the order of their scores.
        best = layer.scores.topk(16, -1).indices
        rows = layer.all("value").gather(
            2, best[..., None].expand(-1, -1, -1, layer.all("value").shape[-1])
        )
        same = (found[f"value{i}"] - rows).abs().amax(-1) < 1e-3
        assert same.float().mean() > 0.99  # but where two scores are nearly one


@needs_kvpress
def test_it_runs_in_the_pipeline_and_in_a_wrapper(tmp_path: Path) -> None:
    torch.manual_seed(0)
    RetainingHeads.for_model(testbed.smollm2()[0], hidden=0).save(tmp_path)
    answers = json.loads(kvpress(PIPELINE, testbed.smollm2_path(), tmp_path).splitlines()[-1])
    assert [len(a) for a in answers] == [2, 2] and all(isinstance(x, str) for x in answers[0])


@needs_kvpress
def test_heads_are_asked_for(tmp_path: Path) -> None:
    RetainingHeads.for_model(testbed.tiny("llama"), hidden=0).save(tmp_path)
    other = testbed.tiny("llama-gqa3")
    other.save_pretrained(tmp_path / "model")
    code = """
try:
    LocretPress(0.5)
except ValueError as error:
    print(error)
try:
    with press(model): pass
except ValueError as error:
    print(error)
"""
    out = kvpress(code, tmp_path / "model", tmp_path)
    assert "needs heads=" in out and "are for a model with heads" in out


@pytest.mark.skipif(importlib.util.find_spec("kvpress") is not None, reason="kvpress is here")
def test_without_kvpress_the_import_says_what_is_missing() -> None:
    with pytest.raises(ImportError, match="needs kvpress >= 0.5"):
        importlib.import_module("locret.press")
