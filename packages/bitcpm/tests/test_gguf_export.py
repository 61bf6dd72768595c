from __future__ import annotations

import pytest
import torch
from bitcpm_models import build

from bitcpm import TernaryConfig, load_packed_model, materialise, pack_model, ternarize
from bitcpm.gguf_export import export_gguf, gguf_name

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate", reason="transformers reads GGUF files with it")
TEXT = torch.arange(1, 25).reshape(2, 12)


@pytest.fixture
def packed_folder(tmp_path):
    def make(arch: str, group_size: int = -1, **changes):
        sizes = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4) | changes
        if arch == "qwen3":
            sizes["head_dim"] = 128  # the only one that transformers knows in GGUF files
        model = build(arch, num_key_value_heads=2, **sizes)
        # fp16 weights: what fp16 scales of ggml hold exactly.
        model = materialise(ternarize(model.half(), TernaryConfig(group_size=group_size)))
        model.save_pretrained(tmp_path / "model")
        pack_model(tmp_path / "model", tmp_path / "packed")
        return tmp_path / "packed"

    return make


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0", "Q4_0"])
def test_transformers_reads_the_same_model_back(packed_folder, tmp_path, arch, kind):
    from transformers import AutoModelForCausalLM

    folder = packed_folder(arch)
    report = export_gguf(folder, tmp_path / "model.gguf", kind)
    assert report.ternary == 14 and report.error == 0 and report.bytes > 0
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    with torch.no_grad():
        wanted = load_packed_model(folder, torch.float32)(TEXT).logits
        assert torch.allclose(read(TEXT).logits, wanted, atol=1e-5)
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert tensors["blk.1.ffn_up.weight"].tensor_type == gguf.GGMLQuantizationType[kind]


def test_what_does_not_fit_is_refused(packed_folder, tmp_path):
    folder = packed_folder("llama", 64)
    with pytest.raises(ValueError, match="cannot hold groups of 64"):
        export_gguf(folder, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
    assert export_gguf(folder, tmp_path / "model.gguf", allow_error=True).error > 0.05
    assert export_gguf(folder, tmp_path / "model.gguf", "Q4_0").error == 0
    with pytest.raises(ValueError, match="kind must be one of"):
        export_gguf(folder, tmp_path / "model.gguf", "F16")
    with pytest.raises(ValueError, match="no name for the tensor model.other"):
        gguf_name("model.other")


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothere is not a folder"):
        export_gguf(tmp_path / "nothere", tmp_path / "model.gguf")


def test_an_unknown_architecture_is_refused(ternary_folder, tmp_path):
    import json

    pack_model(ternary_folder, tmp_path / "packed")
    config = json.loads((tmp_path / "packed/config.json").read_text()) | {"model_type": "bert"}
    (tmp_path / "packed/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'bert' model; export knows llama, mistral, qwen3"):
        export_gguf(tmp_path / "packed", tmp_path / "model.gguf")
