from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitcpm import (
    TernaryConfig,
    inspect_checkpoint,
    load_packed_model,
    pack_model,
    quantise_model,
    unpack_model,
)
from bitcpm import quantise as quantise_matrix
from bitcpm.checkpoint import Checkpoint, write_shards


@pytest.mark.parametrize("codec", ("1.6bit", "2bit"))
def test_pack_and_unpack_restore_the_file(ternary_folder, tmp_path, codec):
    calls = []
    (ternary_folder / "optimizer.pt").write_bytes(b"pickle")
    (ternary_folder / "manifest.json").write_text("{}")
    report = pack_model(
        ternary_folder, tmp_path / "packed", codec=codec, progress=lambda *a: calls.append(a)
    )
    assert report.group_size == 32 and len(report.tensors) == 14
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(report.kept)
    assert calls[-1] == (21, 21)
    assert report.bytes_after == (tmp_path / "packed" / "model.safetensors").stat().st_size
    assert report.bytes_after < 0.6 * report.bytes_before
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "bitcpm",
        "version": 1,
        "group_size": 32,
        "codec": codec,
    }
    unpack_model(tmp_path / "packed", tmp_path / "back")
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    assert {file.name for file in (tmp_path / "back").iterdir()} == names
    before, after = (
        load_file(folder / "model.safetensors") for folder in (ternary_folder, tmp_path / "back")
    )
    assert before.keys() == after.keys()
    for name, w in before.items():
        assert w.dtype == after[name].dtype
        assert torch.equal(w.view(torch.int16), after[name].view(torch.int16))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (ternary_folder / "config.json").read_text()
    )


@pytest.mark.parametrize("arch", ("llama", "qwen3", "phi3", "mistral"))
def test_packed_model_computes_the_same(arch, tiny, tmp_path):
    from bitcpm import materialise, ternarize

    model = materialise(ternarize(tiny(arch), TernaryConfig(group_size=32)))
    model.save_pretrained(tmp_path / "model")
    pack_model(tmp_path / "model", tmp_path / "packed")
    x = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    loaded = load_packed_model(tmp_path / "packed")
    assert type(loaded) is type(model) and not loaded.training
    assert torch.equal(loaded(x).logits, model(x).logits)
    assert not hasattr(loaded.config, "quantization_config")
    assert load_packed_model(tmp_path / "packed", torch.bfloat16).dtype == torch.bfloat16


def test_packed_model_with_tied_head(tiny, tmp_path):
    from bitcpm import materialise, ternarize

    model = materialise(ternarize(tiny("llama", tie_word_embeddings=True)))
    model.save_pretrained(tmp_path / "model")
    report = pack_model(tmp_path / "model", tmp_path / "packed")
    # Rows of 48 and 80 are shorter than a group of 128: whole rows describe them as well.
    assert report.group_size == -1
    loaded = load_packed_model(tmp_path / "packed")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    x = torch.randint(0, 96, (1, 9))
    assert torch.equal(loaded(x).logits, model(x).logits)


def test_a_packed_folder_without_a_weight_is_refused(ternary_folder, tmp_path):
    pack_model(ternary_folder, tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    config["num_hidden_layers"] = 3
    config.pop("layer_types", None)
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"missing keys for llama: \['model.layers.2"):
        load_packed_model(tmp_path / "packed")
    (tmp_path / "packed" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        load_packed_model(tmp_path / "packed")


def test_inspect_finds_everything(ternary_folder, tmp_path):
    report = inspect_checkpoint(ternary_folder)
    assert report.group_size == 32 and not report.packed
    assert len(report.of_kind("ternary")) == 14 and not report.of_kind("damaged")
    stored = load_file(ternary_folder / "model.safetensors")
    for tensor in report.tensors:
        w = stored[tensor.name]
        assert tensor.shape == tuple(w.shape) and tensor.dtype == "BF16"
        if tensor.kind == "ternary":
            assert tensor.zero_share == pytest.approx((w == 0).float().mean().item())
            assert tensor.scale_max == w.abs().max().item()
            assert tensor.off_grid_values == 0
    pack_model(ternary_folder, tmp_path / "packed")
    packed = inspect_checkpoint(tmp_path / "packed")
    assert packed.packed and packed.group_size == 32
    keys = ("name", "shape", "dtype", "kind", "zero_share", "scale_min", "scale_max")
    for ours, theirs in zip(packed.tensors, report.tensors, strict=True):
        assert all(getattr(ours, key) == getattr(theirs, key) for key in keys)
    json.dumps(packed.to_dict())


def test_damage_is_found_and_not_packed(ternary_folder, tmp_path):
    file = ternary_folder / "model.safetensors"
    stored = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    row = stored[name][7]
    column = int((row[:32] != 0).nonzero()[3])
    row[column] *= 0.5
    save_file(stored, file, {"format": "pt"})
    report = inspect_checkpoint(ternary_folder)
    (damaged,) = report.of_kind("damaged")
    assert (damaged.name, damaged.off_grid_values, damaged.group_size) == (name, 1, 32)
    with pytest.raises(ValueError, match=f"{name} is not ternary.*row 7, group 0"):
        pack_model(ternary_folder, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_pack_refusals(ternary_folder, tmp_path, tiny):
    with pytest.raises(ValueError, match="is not ternary in groups of 48"):
        pack_model(ternary_folder, tmp_path / "p", TernaryConfig(group_size=48))
    with pytest.raises(ValueError, match="only the ternary grid"):
        pack_model(ternary_folder, tmp_path / "p", TernaryConfig(grid="five-level"))
    with pytest.raises(ValueError, match="group_size must be >= 8 or -1"):
        pack_model(ternary_folder, tmp_path / "p", TernaryConfig(group_size=2))
    with pytest.raises(ValueError, match="codec must be one of"):
        pack_model(ternary_folder, tmp_path / "p", codec="4bit")
    for target in (ternary_folder, ternary_folder / "inside", ternary_folder.parent):
        with pytest.raises(ValueError, match="overlaps"):
            pack_model(ternary_folder, target)
    tiny("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="has no ternary tensor: finish QAT"):
        pack_model(tmp_path / "dense", tmp_path / "p")
    with pytest.raises(FileNotFoundError, match="expected a model folder"):
        pack_model(tmp_path / "nothing", tmp_path / "p")
    pack_model(ternary_folder, tmp_path / "packed")
    with pytest.raises(ValueError, match="is packed already"):
        pack_model(tmp_path / "packed", tmp_path / "p")
    with pytest.raises(ValueError, match="not a packed model"):
        unpack_model(ternary_folder, tmp_path / "p")
    config = json.loads((ternary_folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (ternary_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has quantization_config.*gptq"):
        pack_model(ternary_folder, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_pickled_weights_are_not_read(tmp_path):
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="but pytorch_model.bin: convert it"):
        inspect_checkpoint(tmp_path)


def test_shards_are_read_and_written(ternary_folder, tmp_path):
    stored = load_file(ternary_folder / "model.safetensors")
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shards(shards, sorted(stored), lambda n: stored[n].nbytes, stored.get, max_bytes=20_000)
    files = sorted(shards.glob("*.safetensors"))
    assert len(files) > 1
    assert all(sum(t.nbytes for t in load_file(f).values()) <= 20_000 for f in files)
    with Checkpoint(shards) as checkpoint:
        assert checkpoint.names() == sorted(stored)
        assert all(torch.equal(checkpoint.tensor(n), stored[n]) for n in stored)
    (shards / "config.json").write_bytes((ternary_folder / "config.json").read_bytes())
    pack_model(shards, tmp_path / "packed")
    unpack_model(tmp_path / "packed", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[n], stored[n]) for n in stored)


@pytest.mark.parametrize("name", ("../secret.safetensors", "/etc/passwd", "model.bin", 3))
def test_an_index_cannot_reach_outside_its_folder(tmp_path, name):
    index = {"weight_map": {"w": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="no safetensors file beside it"):
        inspect_checkpoint(tmp_path)


def test_quantise_model_measures_its_error(tiny, tmp_path):
    model = tiny("llama-gqa3")
    model.save_pretrained(tmp_path / "dense")
    config = TernaryConfig(group_size=32)
    report = quantise_model(tmp_path / "dense", tmp_path / "out", config)
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("dense", "out"))
    lost = power = 0.0
    for name, w in before.items():
        if name in report.tensors:
            codes, _ = quantise_matrix(w, config)
            assert torch.equal(after[name].sign().to(torch.int8), codes)
            error = (w - after[name]).norm() / w.norm()
            assert report.tensors[name] == pytest.approx(error.item(), rel=1e-5)
            lost += (w - after[name]).square().sum().item()
            power += w.square().sum().item()
        else:
            assert torch.equal(after[name], w)
    assert len(report.tensors) == 14
    assert report.error == pytest.approx((lost / power) ** 0.5, rel=1e-5)
    # Gaussian weights: E|w| = 0.798, and rounding to {-s, 0, s} there loses about half the norm.
    assert 0.4 < report.error < 0.6
    assert pack_model(tmp_path / "out", tmp_path / "packed").group_size == 32
    with pytest.raises(ValueError, match="is ternary already"):
        quantise_model(tmp_path / "out", tmp_path / "again", config)
    assert not (tmp_path / "again").exists()


def test_quantise_model_keeps_what_is_in_no_layer(tiny, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "dense")
    config = TernaryConfig(skip=("layers.0",))
    report = quantise_model(tmp_path / "dense", tmp_path / "out", config)
    assert len(report.tensors) == 7 and all("layers.1." in name for name in report.tensors)
    with pytest.raises(ValueError, match="no decoder matrix outside skip"):
        quantise_model(tmp_path / "dense", tmp_path / "out", TernaryConfig(skip=("layers",)))
