"""The plan against what the engine really allocates."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import testbed
from cpmcu import Engine, plan, weight_sizes
from cpmcu.loader import Source


@pytest.mark.parametrize("arch", ["llama-gqa3", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tie", [False, True])
def test_bytes_are_those_the_engine_takes(tiny_folder, arch, dtype, tie):
    _, folder = tiny_folder(arch, tie_word_embeddings=tie)
    made = plan.make(folder, dtype=dtype, context=700, bandwidth=1e9)
    engine = Engine.from_pretrained(folder, dtype=dtype, max_context=700, backend="reference")
    engine.prefill([1] * 700)
    assert made.weight_bytes == engine._decoder.weights.nbytes
    assert made.kv_bytes == engine._cache.nbytes
    assert made.total_bytes == made.weight_bytes + made.kv_bytes + made.activation_bytes


@pytest.mark.parametrize("quant", ["float32", "bfloat16", "int8", "int4"])
def test_packed_weights_take_what_is_planned(smollm2_folder, quant):
    made = plan.make(smollm2_folder, quant=quant, context=700, bandwidth=1e9)
    engine = Engine.from_pretrained(smollm2_folder, quant=quant, max_context=700, backend="cpu")
    # The vectors are float32 in memory.
    assert engine._decoder.weights.nbytes == pytest.approx(made.weight_bytes, rel=2e-3)


def test_largest_context_is_the_largest(tiny_folder):
    spec = Source(tiny_folder("llama")[1]).spec
    size, _ = weight_sizes.of_spec(spec, "float32")
    for backend in ("reference", "cpu"):
        for limit in (10_000, 600_000, 1_000_000, 3_000_000, 6_000_000, 10**9):
            best = plan.largest_context(spec, torch.float32, limit, "float32", backend, size)
            if best:
                total = plan.total_bytes(spec, torch.float32, best, "float32", backend, size)
                assert total <= limit
            if best < spec.max_context:
                total = plan.total_bytes(spec, torch.float32, best + 1, "float32", backend, size)
                assert total > limit


def test_decode_bound_is_bandwidth_over_bytes_read(tiny_folder):
    _, tied = tiny_folder("llama", tie_word_embeddings=True)
    _, untied = tiny_folder("llama", tie_word_embeddings=False)
    for folder in (tied, untied):
        made = plan.make(folder, dtype="float32", context=100, bandwidth=1e9)
        embedding = 256 * 64 * 4 if folder == untied else 0
        read = made.weight_bytes - embedding + made.kv_bytes
        assert made.decode_bound == pytest.approx(1e9 / read)


def test_8b_is_planned_from_its_config_alone(tmp_path):
    """MiniCPM4-8B: the header of an empty file suffices, nothing of 16 GB is read."""
    config = {
        "model_type": "minicpm",
        "vocab_size": 73448,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **{"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    made = plan.make(tmp_path, dtype="bfloat16", memory_limit=24 * 2**30, bandwidth=35e9)
    assert made.kv_bytes_per_token == 32 * 2**10 and made.kv_bytes == 4 * 2**30
    assert made.parameters == pytest.approx(8.19e9, rel=0.01)
    assert 1.5 < made.decode_bound < 2.5


def test_activation_bytes_bound_the_measured_peak():
    """SmolLM2's prefill of 1,024 tokens in a fresh process stays within the planned total."""
    code = (
        "import sys, torch, cpmcu\n"
        "from cpmcu.results import peak_memory\n"
        "engine = cpmcu.Engine.from_pretrained(sys.argv[1], dtype='float32', max_context=1024)\n"
        "engine.prefill([5])\n"
        "before = peak_memory()\n"
        "engine.prefill([7] * 1023)\n"
        "print(peak_memory() - before)"
    )
    path = testbed.smollm2_gguf()
    run = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, check=True
    )
    made = plan.make(path, dtype="float32", context=1024, bandwidth=1e9)
    # 30 MB: PyTorch's thread-local work space, and one layer held twice while the cache grows
    assert int(run.stdout) < made.kv_bytes + made.activation_bytes + 30e6


@pytest.mark.parametrize("quant", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama-gqa3", "qwen3"])
def test_the_native_backend_lays_out_what_was_planned(tiny_folder, name, quant):
    _, folder = tiny_folder(name)
    dtype = "float32" if quant == "float32" else "bfloat16"
    made = plan.make(folder, dtype=dtype, quant=quant, context=700, bandwidth=1e9)
    engine = Engine.from_pretrained(folder, dtype=dtype, quant=quant, max_context=700)
    assert engine.backend == "cpu"
    tables = 2 * 700 * engine.spec.head_dim * 4 + engine.spec.vocab * 4
    assert made.activation_bytes == engine._decoder.activation_bytes + tables


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 5000}, r"context must be in 1\.\.4096 \(the model's limit\), got 5000"),
        ({"context": 0}, "context must be in"),
        ({"memory_limit": 0}, "memory_limit must be positive"),
        ({"bandwidth": -1.0}, "bandwidth must be positive"),
        ({"dtype": "int4"}, "dtype must be"),
    ],
)
def test_bad_arguments(tiny_folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        plan.make(tiny_folder("llama")[1], **{"bandwidth": 1e9} | arguments)


def test_bandwidth_is_measured():
    assert 1e8 < plan.measure_bandwidth(16, 0.05) < 1e13
