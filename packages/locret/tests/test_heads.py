from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

testbed = pytest.importorskip("testbed")
pytest.importorskip("transformers")

from locret import HeadsConfig, RetainingHeads  # noqa: E402


@pytest.mark.parametrize("arch", testbed.tiny_archs())
@pytest.mark.parametrize("input", ["qkv", "hidden"])
def test_heads_of_any_shape_come_back_from_a_folder(arch: str, input: str, tmp_path: Path) -> None:
    model = testbed.tiny(arch)
    heads = RetainingHeads.for_model(model, hidden=16, input=input)
    heads.save(tmp_path, note="x")
    again = RetainingHeads.load(tmp_path)
    assert again.config == heads.config
    for name, value in heads.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)
    assert json.loads((tmp_path / "heads.json").read_text())["note"] == "x"
    again.check(model)


def test_the_released_state_dict_loads_unchanged() -> None:
    model = testbed.tiny("llama-gqa3")  # 6 and 2 heads of 16
    released = {"model.embed_tokens.weight": torch.zeros(1)}
    for i in range(2):
        released[f"model.layers.{i}.self_attn.fc1.weight"] = torch.randn(24, 160).bfloat16()
        released[f"model.layers.{i}.self_attn.fc2.weight"] = torch.randn(2, 24).bfloat16()
    heads = RetainingHeads.from_official(released, model)
    assert heads.config.hidden == 24 and heads.config.input == "qkv" and not heads.config.bias
    x = torch.randn(1, 7, 160)
    w1, w2 = (released[f"model.layers.1.self_attn.fc{n}.weight"].float() for n in (1, 2))
    expected = torch.nn.functional.silu(x @ w1.T) @ w2.T
    assert torch.allclose(heads.layers[1](x), expected.transpose(1, 2), atol=1e-4)
    with pytest.raises(ValueError, match="fc1.weight is .24, 160., expected .24, 128."):
        RetainingHeads.from_official(released, testbed.tiny("llama"))
    with pytest.raises(ValueError, match=r"expected keys like .*fc1.weight, got a"):
        RetainingHeads.from_official({"a": torch.zeros(1)}, model)


def test_heads_of_another_model_are_refused() -> None:
    heads = RetainingHeads.for_model(testbed.tiny("llama"))
    with pytest.raises(ValueError, match="model with heads 4, this one has 6"):
        heads.check(testbed.tiny("llama-gqa3"))


def test_broken_folders_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="locret train"):
        RetainingHeads.load(tmp_path)
    heads = RetainingHeads.for_model(testbed.tiny("llama"), hidden=4)
    heads.save(tmp_path)
    stored = json.loads((tmp_path / "heads.json").read_text())
    stored["config"]["hidden"] = 8
    (tmp_path / "heads.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="fc1.bias is .4,., expected .8,."):
        RetainingHeads.load(tmp_path)
    (tmp_path / "heads.json").write_text("{}")
    with pytest.raises(ValueError, match="not a description of heads"):
        RetainingHeads.load(tmp_path)


def test_sizes_are_checked() -> None:
    sizes = {"layers": 1, "heads": 3, "kv_heads": 2, "head_dim": 4, "hidden_size": 8}
    with pytest.raises(ValueError, match="heads 3 is not a multiple of kv_heads 2"):
        HeadsConfig(**sizes)
    with pytest.raises(ValueError, match='input must be "qkv" or "hidden"'):
        HeadsConfig(**{**sizes, "heads": 4}, input="x")
    with pytest.raises(ValueError, match="layers must be at least 1"):
        HeadsConfig(**{**sizes, "heads": 4, "layers": 0})
