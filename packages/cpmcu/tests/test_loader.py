"""Every way a model on disk can be stored, be incomplete, or lie."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import testbed
from cpmcu import Engine, plan, tensors, weight_sizes
from cpmcu.loader import Source

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A private copy of a tiny Llama."""
    return shutil.copytree(tiny_folder("llama-gqa3")[1], tmp_path / "model")


def rewrite(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


def configure(folder, **fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))


def test_shards_equal_one_file(tiny_folder, tmp_path):
    model, single = tiny_folder("llama-gqa3")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert len(Source(tmp_path).files) > 2
    whole, sharded = (Engine.from_pretrained(p, dtype="float32") for p in (single, tmp_path))
    assert torch.equal(whole.logits(IDS), sharded.logits(IDS))


def test_missing_shard_is_named(tiny_folder, tmp_path):
    tiny_folder("llama-gqa3")[0].save_pretrained(tmp_path, max_shard_size="100KB")
    victim = sorted(tmp_path.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(FileNotFoundError, match=f"{victim.name}: shard named by .* is missing"):
        Source(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../../etc/passwd"}}, "must name files beside it"),
        ({"weight_map": {"a": 3}}, "field 'a' must be a string"),
        ({"weight_map": []}, "field 'weight_map' must be a mapping"),
        ({}, "field 'weight_map' is missing"),
        ([], "expected a JSON object, got list"),
    ],
)
def test_hostile_index(folder, index, message):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        Source(folder)


def test_folder_without_weights_names_what_it_expects(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match=r"model: no weights; expected model\.safetensors"):
        Engine.from_pretrained(folder)


def test_nothing_at_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such model; expected a folder or a .gguf"):
        Engine.from_pretrained(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="no config.json; a model folder holds it"):
        Engine.from_pretrained(tmp_path)


def test_dtypes_are_converted(folder):
    wanted = Engine.from_pretrained(folder, dtype="float32").logits(IDS)
    original = load_file(folder / "model.safetensors")
    for dtype, tolerance in ((torch.float64, 0), (torch.float16, 0.02), (torch.bfloat16, 0.2)):
        stored = {name: tensor.to(dtype) for name, tensor in original.items()}
        save_file(stored, folder / "model.safetensors")
        engine = Engine.from_pretrained(folder, dtype="float32")
        assert engine.dtype == torch.float32
        assert float((engine.logits(IDS) - wanted).abs().max()) <= tolerance


def test_dtype_auto_follows_the_processor(folder):
    from cpmcu import cpu_library
    from cpmcu.plan import native_bf16

    kinds = {True: torch.bfloat16, False: torch.float32}
    quick = native_bf16() or cpu_library.vectors()
    assert Engine.from_pretrained(folder).dtype == kinds[quick]
    assert Engine.from_pretrained(folder, backend="reference").dtype == kinds[native_bf16()]
    for wrong in ("int8", "nonsense", torch.float64):
        with pytest.raises(ValueError, match="dtype must be 'auto', 'float32', 'bfloat16' or"):
            Engine.from_pretrained(folder, dtype=wrong)
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match="float16"):
            Engine.from_pretrained(folder, dtype="float16", backend=backend)


def test_missing_tensor(folder):
    rewrite(folder, lambda state: state.pop("model.layers.1.mlp.up_proj.weight"))
    message = r"'layers.1.mlp.up_proj.weight' is missing \(1 of 21 in all\)"
    with pytest.raises(ValueError, match=message):
        Engine.from_pretrained(folder)


def test_surplus_tensor_is_refused_because_the_result_would_be_wrong(folder):
    rewrite(folder, lambda s: s.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(96)}))
    with pytest.raises(ValueError, match="q_proj.bias' has no place in a llama model"):
        Engine.from_pretrained(folder)


def test_stored_rope_buffers_and_tied_copies_are_ignored(folder):
    before = Engine.from_pretrained(folder, dtype="float32").logits(IDS)
    rewrite(
        folder, lambda s: s.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    )
    assert torch.equal(Engine.from_pretrained(folder, dtype="float32").logits(IDS), before)


def test_wrong_shape(folder):
    rewrite(folder, lambda s: s.update({"model.norm.weight": torch.ones(95)}))
    with pytest.raises(ValueError, match=r"'norm.weight' has shape \(95,\), expected \(96,\)"):
        Engine.from_pretrained(folder)


def test_wrong_dtype(folder):
    rewrite(folder, lambda s: s.update({"model.norm.weight": torch.ones(96, dtype=torch.int32)}))
    with pytest.raises(ValueError, match="'model.norm.weight' has dtype I32, expected one of"):
        Engine.from_pretrained(folder)


def test_config_of_another_size_is_refused_before_memory_is_taken(folder, monkeypatch):
    configure(folder, hidden_size=2**20 * 96, intermediate_size=2**30)
    for name in ("read", "codes"):
        monkeypatch.setattr(tensors.Tensors, name, lambda *_: pytest.fail("took memory"))
    with pytest.raises(ValueError, match="has shape"):
        Engine.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 5_000, -1])
def test_truncated_safetensors(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors: not a valid safetensors file"):
        Engine.from_pretrained(folder)


@pytest.mark.parametrize("header", [2**63, 2**40, 2**64 - 1, 100_000_001])
def test_hostile_header_size(folder, header):
    file = folder / "model.safetensors"
    file.write_bytes(header.to_bytes(8, "little") + file.read_bytes()[8:])
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        Engine.from_pretrained(folder)


def test_unknown_quantisation_is_named(folder):
    configure(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="quantization_config: field 'quant_method' is 'gptq'"):
        Engine.from_pretrained(folder)


def test_memory_limit(folder):
    full = Engine.from_pretrained(folder, dtype="float32")
    size, _ = weight_sizes.of_spec(full.spec, "float32")
    limit = plan.total_bytes(full.spec, torch.float32, 1000, "float32", full.backend, size)
    small = Engine.from_pretrained(folder, dtype="float32", memory_limit=limit)
    assert small.max_context == 1000 < full.max_context == 4096
    with pytest.raises(ValueError, match=r"memory_limit=1000 is too small: 1 tokens .* raise it"):
        Engine.from_pretrained(folder, memory_limit=1000)
    with pytest.raises(ValueError, match=f"lower max_context to {small.max_context}"):
        Engine.from_pretrained(folder, dtype="float32", max_context=4096, memory_limit=limit)
    with pytest.raises(ValueError, match=r"max_context must be in 1\.\.4096 .* got 4097"):
        Engine.from_pretrained(folder, max_context=4097)


def test_progress_reaches_the_end(folder):
    calls = []
    Engine.from_pretrained(folder, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 4) for i in range(1, 5)]  # embedding, two layers, the rest


def test_layers_are_read_as_they_are_taken(folder, monkeypatch):
    """Two layouts of the model are never held whole."""
    read = []
    actual = tensors.read_layer

    def counting(spec, index, *how):
        read.append(index)
        return actual(spec, index, *how)

    monkeypatch.setattr(tensors, "read_layer", counting)
    layers = iter(tensors.load(Source(folder), torch.float32).layers)
    assert read == []
    first = next(layers)
    assert read == [0] and first.down.dtype == torch.float32
    assert len(list(layers)) == 1 and read == [0, 1]


def test_gguf_and_folder_of_smollm2_have_the_same_logits(smollm2):
    """Q4_1 and Q8_0 expand to the same numbers, and the interleaved heads come back in order."""
    engine = Engine.from_pretrained(testbed.smollm2_gguf(), dtype="float32", quant="float32")
    for field in ("hidden", "layers", "heads", "kv_heads", "ffn", "vocab", "max_context", "bos"):
        assert getattr(engine.spec, field) == getattr(smollm2.spec, field)
    difference = (engine.logits(IDS) - smollm2.logits(IDS)).abs().max()
    assert float(difference) < 1e-4


def test_packed_ternary_folder(folder, tmp_path):
    bitcpm = pytest.importorskip("bitcpm")

    # Ternary matrices with one scale per row of 96 are exactly representable.
    def ternary(state):
        for name, tensor in state.items():
            if "proj" in name:
                state[name] = tensor.sign() * 0.0625

    rewrite(folder, ternary)
    wanted = Engine.from_pretrained(folder, dtype="float32")
    packed = tmp_path / "packed"
    bitcpm.pack_model(folder, packed)
    engine = Engine.from_pretrained(packed, dtype="float32", quant="float32")
    assert Source(packed).kind == "ternary"
    assert torch.equal(engine.logits(IDS), wanted.logits(IDS))


def test_packed_ternary_without_bitcpm_says_what_to_install(folder, monkeypatch):
    configure(folder, quantization_config={"quant_method": "bitcpm"})
    monkeypatch.setitem(sys.modules, "bitcpm", None)
    with pytest.raises(ImportError, match="pip install minicpm4-bitcpm"):
        Engine.from_pretrained(folder)
