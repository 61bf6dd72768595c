"""The GPU backend against the reference, in Triton's interpreter, and on a GPU if there is one."""

from __future__ import annotations

import gpu_checks
import pytest
import torch

from cpmcu import Engine, gpu_device

ARCHITECTURES = (
    *("llama", "llama-gqa3", "llama-mha", "llama-mqa", "qwen2", "qwen3", "mistral", "minicpm4"),
)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_floats_equal_the_reference(on_gpu, tiny_folder, arch):
    folder = tiny_folder(arch)[1]
    on_gpu(gpu_checks.logits_equal_the_reference, folder, "float32", "float32", 1e-5)
    on_gpu(gpu_checks.logits_equal_the_reference, folder, "bfloat16", "auto", 5e-2)


@pytest.mark.parametrize(
    ("arch", "dtype", "quant"),
    [
        ("llama-gqa3", "bfloat16", "int8"),
        ("qwen2", "bfloat16", "int4"),
        ("qwen3", "float16", "int4"),
        ("minicpm4", "bfloat16", "int4"),
    ],
)
def test_codes_equal_the_reference(on_gpu, tiny_folder, arch, dtype, quant):
    limit = 1e-2 if dtype == "float16" else 5e-2
    on_gpu(gpu_checks.logits_equal_the_reference, tiny_folder(arch)[1], dtype, quant, limit)


def test_sparse_attention_equals_the_reference(on_gpu, tiny_folder):
    pytest.importorskip("infllm2")
    folder = tiny_folder("llama-gqa3")[1]
    on_gpu(gpu_checks.sparse_equals_the_reference, folder, "float32", 1e-4)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_step_reads_static_tensors(on_gpu, tiny_folder, sparse):
    pytest.importorskip("infllm2")
    on_gpu(gpu_checks.a_step_reads_static_tensors, tiny_folder("llama-gqa3")[1], sparse)


def test_sessions_are_apart_and_go_on_from_disk(on_gpu, tiny_folder, tmp_path):
    pytest.importorskip("infllm2")
    folder = tiny_folder("llama")[1]
    on_gpu(gpu_checks.sessions_are_apart_and_go_on_from_disk, folder, tmp_path / "session")


def test_without_a_gpu_it_is_refused_and_never_chosen(tiny_folder):
    if gpu_device.present():
        pytest.skip("here is one")
    folder = tiny_folder("llama")[1]
    with pytest.raises(ValueError, match=r"finds no CUDA device.*TRITON_INTERPRET=1"):
        Engine.from_pretrained(folder, backend="gpu")
    assert Engine.from_pretrained(folder).backend != "gpu"


def test_importing_it_touches_no_gpu():
    assert not torch.cuda.is_initialized()
