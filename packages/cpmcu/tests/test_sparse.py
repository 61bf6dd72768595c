"""Sparse attention in the engine: native code against infllm2's PyTorch, sessions on disk."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpmcu import Engine, SparseAttention
from cpmcu import cpu_library as c

infllm2 = pytest.importorskip("infllm2")
native = pytest.mark.skipif(c.kernels()[0] is None, reason="the CPU kernels were not built")

SMALL = SparseAttention(
    kernel_size=8, kernel_stride=4, block_size=16, init_blocks=1, window_size=32, topk=3,
    dense_len=100,
)  # fmt: skip
IDS = torch.randint(256, (700,), generator=torch.Generator().manual_seed(3)).tolist()


def config_of(sizes, **overrides):
    names = SparseAttention.__slots__
    return {name: getattr(sizes, name) for name in names} | overrides


def engine(folder, backend, **options):
    options = {"dtype": "float32", "sparse": SMALL} | options
    return Engine.from_pretrained(folder, backend=backend, **options)


@pytest.mark.parametrize("arch", ["llama", "llama-gqa3", "llama-mqa", "llama-mha", "qwen3"])
@native
def test_native_equals_the_reference(tiny_folder, arch):
    _, folder = tiny_folder(arch)
    ours, plain = engine(folder, "cpu"), engine(folder, "reference")
    wanted = plain.logits(IDS)
    scale = wanted.abs().max()
    # A block chosen otherwise would change logits by a hundred times this.
    assert (ours.logits(IDS) - wanted).abs().max() < 1e-4 * scale
    assert (engine(folder, "cpu", sparse="off").logits(IDS) - wanted)[
        200:
    ].abs().max() > 1e-2 * scale
    ours.reset()
    got = [ours.prefill(IDS[:37]), ours.prefill(IDS[37:150]), ours.prefill(IDS[150:600])]
    got += [ours.decode(token) for token in IDS[600:]]
    rows = [36, 149, 599, *range(600, 700)]
    assert (torch.stack(got) - wanted[rows]).abs().max() < 1e-4 * scale


def test_reference_equals_transformers(tiny_folder):
    """Below the budget and beyond it: `infllm2.sparse` on the model itself."""
    model, folder = tiny_folder("llama-gqa3")
    sizes = config_of(SMALL, dense_len=-1)
    with torch.no_grad(), infllm2.sparse(model, infllm2.InfLLMv2Config(**sizes)):
        wanted = model(torch.tensor([IDS[:400]])).logits[0]
    got = engine(folder, "reference", sparse=SparseAttention(**sizes)).logits(IDS[:400])
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


@native
@pytest.mark.parametrize("quant", ["bfloat16", "int8"])
def test_same_bits_for_any_threads_chunks_and_after_a_rollback(tiny_folder, quant):
    _, folder = tiny_folder("llama-gqa3")
    runs = []
    for threads in (1, 2):
        made = engine(folder, "cpu", dtype="bfloat16", quant=quant, threads=threads)
        whole = made.logits(IDS[:500])
        made.rollback(130)
        made.prefill([7] * 300)  # other kernels, and a cache that has grown
        made.rollback(123)
        parts = [made.prefill(IDS[123:333]), made.prefill(IDS[333:500]), made.decode(IDS[500])]
        assert torch.equal(torch.stack(parts[:2]), whole[[332, 499]])
        runs.append((whole, torch.stack(parts)))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


@native
def test_what_config_json_says_is_used(tiny_folder, tmp_path):
    _, folder = tiny_folder("llama")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"sparse_config": config_of(SMALL, use_nope=False)}))
    auto = Engine.from_pretrained(tmp_path, dtype="float32")
    assert auto.spec.sparse == SMALL
    assert torch.equal(auto.logits(IDS), engine(folder, "cpu").logits(IDS))
    assert Engine.from_pretrained(tmp_path, sparse="off").spec.sparse is None
    assert Engine.from_pretrained(folder).spec.sparse is None
    assert Engine.from_pretrained(folder, sparse="on").spec.sparse == SparseAttention()
    for wrong, complaint in (
        ({"use_nope": True}, "use_nope.*does not implement"),
        ({"block_size": 20}, "window_size must be a positive multiple of block_size=20, got 32"),
        ({"topk": 0}, "topk must be at least 1"),
        ({"kernel_size": "8"}, "kernel_size.*must be an integer"),
    ):
        sizes = config_of(SMALL) | wrong
        path.write_text(json.dumps(config | {"sparse_config": sizes}))
        with pytest.raises(ValueError, match=complaint):
            Engine.from_pretrained(tmp_path)


@pytest.mark.parametrize("sparse", [SMALL, "off"])
def test_sessions_are_apart_and_go_on_from_disk(tiny_folder, tmp_path, sparse):
    _, folder = tiny_folder("qwen3")
    made = Engine.from_pretrained(folder, dtype="bfloat16", sparse=sparse)
    wanted = made.logits(IDS[:300])[-1]
    made.reset()
    other = made.session()
    made.prefill(IDS[:200])
    other.prefill(IDS[100:400])
    made.save(tmp_path / "session")
    assert torch.equal(made.prefill(IDS[200:300]), wanted)
    other.restore(tmp_path / "session")
    assert other.tokens == IDS[:200]
    assert torch.equal(other.prefill(IDS[200:300]), wanted)
    assert (
        other.generate(token_ids=IDS[:300], max_new_tokens=9).token_ids
        == made.generate(token_ids=IDS[:300], max_new_tokens=9).token_ids
    )


def test_files_that_are_no_session_of_this_model_are_refused(tiny_folder, tmp_path):
    _, folder = tiny_folder("qwen3")
    made = Engine.from_pretrained(folder, dtype="bfloat16")
    with pytest.raises(ValueError, match="nothing to save"):
        made.save(tmp_path / "x")
    made.prefill(IDS[:20])
    path = tmp_path / "session"
    made.save(path)
    whole, facts = path.read_bytes(), {"format": "cpmcu session 1", "model": "other"}
    with pytest.raises(FileNotFoundError, match="no such file"):
        made.restore(tmp_path / "nothing")
    with pytest.raises(ValueError, match="above max_context=10"):
        Engine.from_pretrained(folder, dtype="bfloat16", max_context=10).restore(path)
    with pytest.raises(ValueError, match="another model, dtype"):
        Engine.from_pretrained(folder, dtype="float32").restore(path)
    tensors = load_file(path)
    for metadata, complaint in ((facts, "another model"), (None, "not a saved session")):
        save_file(tensors, path, metadata)
        with pytest.raises(ValueError, match=complaint):
            made.restore(path)
    for cut in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="damaged"):
            made.restore(path)
        assert made.tokens == []
    path.write_bytes(whole)
    made.restore(path)
    assert made.tokens == IDS[:20]
