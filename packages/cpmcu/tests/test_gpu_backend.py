"""The GPU backend against the reference, in Triton's interpreter, and on a GPU if there is one."""

from __future__ import annotations

import subprocess
import sys

import gpu_checks
import pytest
import torch

from cpmcu import Engine, plan
from cpmcu.cuda_graph import Step

ARCHITECTURES = (
    *("llama", "llama-gqa3", "llama-mha", "llama-mqa", "qwen2", "qwen3", "mistral", "minicpm4"),
)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_floats_equal_the_reference(on_gpu, tiny_folder, arch):
    folder = tiny_folder(arch)[1]
    on_gpu(gpu_checks.logits_equal_the_reference, folder, "float32", "float32", 1e-5)
    on_gpu(gpu_checks.logits_equal_the_reference, folder, "bfloat16", "auto", 5e-2)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_codes_equal_the_reference(on_gpu, tiny_folder, arch, quant):
    dtype, limit = ("float16", 1e-2) if arch == "qwen3" else ("bfloat16", 5e-2)
    on_gpu(gpu_checks.logits_equal_the_reference, tiny_folder(arch)[1], dtype, quant, limit)


def test_sparse_attention_equals_the_reference(on_gpu, tiny_folder):
    pytest.importorskip("infllm2")
    folder = tiny_folder("llama-gqa3")[1]
    on_gpu(gpu_checks.sparse_equals_the_reference, folder, "float32", 1e-4)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_recorded_step_is_right_everywhere(on_gpu, tiny_folder, sparse):
    pytest.importorskip("infllm2")
    on_gpu(gpu_checks.a_recorded_step_is_right_everywhere, tiny_folder("llama-gqa3")[1], sparse)


def test_sessions_are_apart_and_go_on_from_disk(on_gpu, tiny_folder, tmp_path):
    pytest.importorskip("infllm2")
    folder = tiny_folder("llama")[1]
    on_gpu(gpu_checks.sessions_are_apart_and_go_on_from_disk, folder, tmp_path / "session")


def test_ternary_weights_equal_the_reference(on_gpu, ternary_folder, tmp_path):
    on_gpu(gpu_checks.ternary_equals_the_reference, ternary_folder("llama-gqa3", tmp_path, 32))


def test_selfcheck_passes(on_gpu):
    on_gpu(gpu_checks.selfcheck_passes)


def test_windows_and_long_ropes_equal_the_reference(on_gpu, tiny_folder):
    factors = {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    scaling = {"rope_type": "longrope", "original_max_position_embeddings": 7} | factors
    for arch, options in (
        ("mistral", {"sliding_window": 12}),
        ("llama", {"rope_scaling": scaling, "rope_theta": 10000.0}),
    ):
        folder = tiny_folder(arch, **options)[1]
        on_gpu(gpu_checks.logits_equal_the_reference, folder, "float32", "float32", 1e-5)


def test_without_a_gpu_it_is_refused_and_never_chosen(tiny_folder, monkeypatch):
    folder = tiny_folder("llama")[1]
    with pytest.raises(ValueError, match=r"finds no CUDA device.*TRITON_INTERPRET=1"):
        Engine.from_pretrained(folder, backend="gpu")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert Engine.from_pretrained(folder).backend != "gpu"
    with pytest.raises(ValueError, match="take kv='auto'"):
        Engine.from_pretrained(folder, backend="gpu", kv="int8")
    with pytest.raises(ValueError, match="in dtype float16 it has no bfloat16 weights"):
        Engine.from_pretrained(folder, backend="gpu", dtype="float16", quant="bfloat16")


def test_without_a_graph_tokens_run_in_plain_launches(caplog):
    """Recording fails here, for there is no CUDA: that is said once, and nothing is lost."""
    step = Step(lambda token, position: 100 * token + position, torch.device("cpu"), None)
    assert step.reason == "CUDA graphs need a CUDA device"
    step.reason = ""
    assert [int(step(token, 7)) for token in (1, 2, 3)] == [107, 207, 307]
    assert "could not be captured" in step.reason
    assert [r.message.count("without a CUDA graph") for r in caplog.records] == [1]


def test_importing_it_imports_no_triton():
    program = "import sys, cpmcu.backends; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_gpu_is_planned_for_that_is_not_here(tiny_folder, on_gpu):
    folder = tiny_folder("llama-gqa3")[1]
    with pytest.raises(ValueError, match="give memory_limit"):
        plan.make(folder, backend="gpu")
    given = {"memory_limit": 24 << 30, "bandwidth": 1e12, "context": 700}
    for quant in ("bfloat16", "int8", "int4"):
        made = plan.make(folder, backend="gpu", quant=quant, **given)
        assert (made.device, made.dtype) == ("gpu", "bfloat16")
        on_gpu(gpu_checks.takes_what_is_planned, folder, quant, made)
    with pytest.raises(ValueError, match="backend must be one of"):
        plan.make(folder, backend="tpu")
