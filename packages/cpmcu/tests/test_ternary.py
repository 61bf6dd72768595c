"""Ternary weights in the native engine: bitcpm's kernels on the engine's threads."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from cpmcu import Engine, cpu_ternary
from cpmcu import cpu_library as c

bitcpm = pytest.importorskip("bitcpm")
pytestmark = pytest.mark.skipif(
    c.kernels()[0] is None or not cpu_ternary.is_supported()[0], reason="kernels were not built"
)
IDS = torch.randint(256, (90,), generator=torch.Generator().manual_seed(2)).tolist()


@pytest.mark.parametrize(("arch", "group"), [("llama-gqa3", 32), ("qwen2", -1), ("qwen3", 64)])
@pytest.mark.parametrize("mode", ["exact", "int8-group"])
def test_equals_the_same_weights_in_float(ternary_folder, tmp_path, monkeypatch, arch, group, mode):
    folder = ternary_folder(arch, tmp_path, group)
    monkeypatch.setattr(cpu_ternary, "MODE", mode)
    # The head has 8 bits: compare the hidden states before it, through a head that holds exactly.
    wanted = Engine.from_pretrained(folder, dtype="float32", quant="float32")
    got = Engine.from_pretrained(folder, dtype="float32", quant="ternary", threads=2)
    for engine in (wanted, got):
        engine.reset()
        hidden = [engine.prefill(IDS[:50]), *(engine.decode(i) for i in IDS[50:])]
        engine.rows = torch.stack(hidden)
    difference = (wanted.rows - got.rows).abs().max() / wanted.rows.abs().max()
    # What the 8-bit embedding and head do to the same model.
    assert difference < {"exact": 3e-2, "int8-group": 5e-2}[mode]
    assert got._decoder.weights.layers[0].down.matrix.shape[0] == got.spec.hidden
    alone = Engine.from_pretrained(folder, dtype="float32", quant="ternary", threads=1)
    assert torch.equal(alone.logits(IDS), got.logits(IDS))


def test_packed_folders_stay_packed(ternary_folder, tmp_path):
    dense, packed = tmp_path / "dense", tmp_path / "packed"
    dense.mkdir()
    ternary_folder("llama-gqa3", dense, 32)
    bitcpm.pack_model(dense, packed)
    auto = Engine.from_pretrained(packed)
    assert auto.quant == "ternary"
    again = Engine.from_pretrained(dense, quant="ternary")
    assert torch.equal(auto.logits(IDS), again.logits(IDS))
    assert Engine.from_pretrained(packed, backend="reference").quant != "ternary"
    text = auto.generate(token_ids=IDS, max_new_tokens=5)
    assert len(text.token_ids) == 5


def test_a_matrix_that_is_not_ternary_has_8_bits(ternary_folder, tmp_path):
    folder = ternary_folder("llama-gqa3", tmp_path, 32)
    state = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    name = "model.layers.1.mlp.down_proj.weight"
    state[name] = (0.1 * torch.randn(state[name].shape)).bfloat16()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    wanted = Engine.from_pretrained(folder, dtype="float32", quant="float32").logits(IDS)
    engine = Engine.from_pretrained(folder, dtype="float32", quant="ternary")
    first, second = engine._decoder.weights.layers
    assert hasattr(first.down, "matrix") and not hasattr(second.down, "matrix")
    assert (engine.logits(IDS) - wanted).abs().max() < 5e-2 * wanted.abs().max()


def test_a_model_that_is_not_ternary_is_refused(tiny_folder, monkeypatch):
    _, folder = tiny_folder("llama-gqa3")
    with pytest.raises(ValueError, match="no matrix is: quantise the model with bitcpm"):
        Engine.from_pretrained(folder, quant="ternary")
    with pytest.raises(ValueError, match="it has no ternary weights"):
        Engine.from_pretrained(folder, quant="ternary", backend="reference")
    monkeypatch.setattr(cpu_ternary, "is_supported", lambda: (False, "pip install minicpm4-bitcpm"))
    with pytest.raises(ValueError, match="pip install minicpm4-bitcpm"):
        Engine.from_pretrained(folder, quant="ternary", backend="cpu")
