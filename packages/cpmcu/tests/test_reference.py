"""Logits against transformers, for every architecture and every option that has arithmetic."""

from __future__ import annotations

import json

import pytest
import torch

import testbed
from cpmcu import Engine

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.3 * i for i in range(8)],
    "original_max_position_embeddings": 32,
    "factor": 4.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = [
    ("llama", {}),
    ("llama-gqa3", {}),
    ("llama-mha", {}),
    ("llama-mqa", {}),
    ("llama", {"tie_word_embeddings": True, "head_dim": 32}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": LONGROPE, "max_position_embeddings": 256}),
    ("mistral", {}),
    ("mistral", {"sliding_window": 9}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("minicpm4", {}),
    ("minicpm4", {"tie_word_embeddings": False}),
]


def ids_of(n, vocab=256, seed=0):
    return torch.randint(vocab, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def load(folder, backend, dtype="float32"):
    try:
        return Engine.from_pretrained(folder, dtype=dtype, backend=backend)
    except ValueError as error:
        if backend == "cpu" and "not built" in str(error):
            pytest.skip(str(error))
        raise


BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])


@torch.inference_mode()
def oracle(model, ids):
    return model(torch.tensor([ids])).logits[0].float()


@BACKENDS
@pytest.mark.parametrize(("arch", "config"), CASES)
def test_logits_equal_transformers(tiny_folder, arch, config, backend):
    model, folder = tiny_folder(arch, **config)
    engine = load(folder, backend)
    for n in (1, 2, 31, 75):
        ids = ids_of(n, model.config.vocab_size)
        ours, theirs = engine.logits(ids), oracle(model, ids)
        assert ours.shape == theirs.shape
        scale = max(1.0, float(theirs.abs().max()))
        assert float((ours - theirs).abs().max()) < 1e-5 * scale


@BACKENDS
@pytest.mark.parametrize(("arch", "config"), CASES)
def test_chunks_and_single_steps_equal_one_pass(tiny_folder, arch, config, backend):
    if config.get("rope_parameters") is LONGROPE:
        config = config | {"max_position_embeddings": 32}  # one list of factors throughout
    model, folder = tiny_folder(arch, **config)
    engine = load(folder, backend)
    ids = ids_of(30, model.config.vocab_size)
    whole = engine.logits(ids)
    engine.reset()
    got = {6: engine.prefill(ids[:7]), 18: engine.prefill(ids[7:19])}
    got |= {i: engine.decode(ids[i]) for i in range(19, 30)}
    assert engine.tokens == ids
    for position, logits in got.items():
        torch.testing.assert_close(logits, whole[position], atol=2e-5, rtol=1e-5)


@BACKENDS
def test_chunked_prefill_crosses_the_chunk_size_and_growing_cache(tiny_folder, backend):
    model, folder = tiny_folder("llama-gqa3")
    engine = load(folder, backend)
    ids = ids_of(1100)  # three chunks of 512, several doublings of the cache
    torch.testing.assert_close(engine.logits(ids), oracle(model, ids), atol=2e-5, rtol=1e-5)


@BACKENDS
def test_longrope_takes_its_list_by_the_length_of_the_whole_prompt(tiny_folder, backend):
    """Past the trained length all keys are rotated by the long list, also those of early chunks."""
    config = {"rope_parameters": LONGROPE, "max_position_embeddings": 1024}
    model, folder = tiny_folder("llama", **config)
    engine = load(folder, backend)
    ids = ids_of(600)
    engine.reset()
    last = engine.prefill(ids)
    torch.testing.assert_close(last, oracle(model, ids)[-1], atol=2e-5, rtol=1e-5)
    # and a short prompt, whose cache holds other angles, is not reused by a long one
    engine.reset()
    engine.prefill(ids[:20])
    assert engine.reusable(ids[:25]) == 20
    assert engine.reusable(ids) == 0


@BACKENDS
def test_bfloat16_is_as_close_to_fp32_as_transformers_bfloat16(tiny_folder, backend):
    model, folder = tiny_folder("llama-gqa3")
    ids = ids_of(64)
    truth = oracle(model, ids)
    engine = load(folder, backend, "bfloat16")
    theirs = type(model).from_pretrained(folder, dtype=torch.bfloat16)
    our_error = (engine.logits(ids) - truth).square().mean().sqrt()
    their_error = (oracle(theirs, ids) - truth).square().mean().sqrt()
    assert float(our_error) < 1.5 * float(their_error)


@BACKENDS
def test_mup_scales_equal_a_plain_rederivation(tiny_folder, tmp_path, backend):
    """MiniCPM's three multipliers, folded into the weights of a plain Llama."""
    from safetensors.torch import load_file, save_file

    _, folder = tiny_folder("llama", tie_word_embeddings=False)
    embed, depth, base = 7.0, 1.3, 16
    layers, hidden = 2, 64
    state = load_file(folder / "model.safetensors")
    folded = {name: tensor.clone() for name, tensor in state.items()}
    folded["model.embed_tokens.weight"] *= embed
    for i in range(layers):
        folded[f"model.layers.{i}.self_attn.o_proj.weight"] *= depth / layers**0.5
        folded[f"model.layers.{i}.mlp.down_proj.weight"] *= depth / layers**0.5
    folded["lm_head.weight"] *= base / hidden
    config = json.loads((folder / "config.json").read_text())
    outputs = []
    for name, weights, extra in (
        ("scaled", state, {"scale_emb": embed, "scale_depth": depth, "dim_model_base": base}),
        ("folded", folded, None),
    ):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
        settings = config | ({"model_type": "minicpm"} | extra if extra else {})
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
        engine = load(tmp_path / name, backend)
        outputs.append(engine.logits(ids_of(20)))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)


@BACKENDS
def test_smollm2_logits_equal_transformers(smollm2_folder, backend):
    smollm2 = load(smollm2_folder, backend)
    model, words = testbed.smollm2(torch.float32)
    ids = words(
        "The MiniCPM4 family of models runs on end-side devices: 这是一个测试。 🎉"
    ).input_ids
    ids += words("A longer English sentence follows, to reach further positions. " * 8).input_ids
    assert float((smollm2.logits(ids) - oracle(model, ids)).abs().max()) < 1e-4
