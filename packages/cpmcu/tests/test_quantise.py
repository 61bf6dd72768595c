"""Whole models: every method, resuming, seeds, and what is refused."""

from __future__ import annotations

import json
import random

import pytest
import torch

from cpmcu import Engine
from cpmcu import quantise as module
from cpmcu.calibration import Windows, read_text
from cpmcu.codes import nearest
from cpmcu.gptq import Hessian, gptq
from cpmcu.loader import Source
from cpmcu.quantise import Options, quantise
from cpmcu.tensors import Tensors

SMALL = {"samples": 12, "length": 48, "bits": 4, "group": 32}


@pytest.fixture(scope="module")
def model(tiny_folder):
    """A tiny model with a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from cpmcu.tokenizer import byte_characters

    _, folder = tiny_folder("qwen3")
    words = Tokenizer(models.BPE(vocab={c: b for b, c in byte_characters().items()}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def calib(tmp_path_factory):
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "calib.txt"
    words = (generator.choice(["salt", "sea", "stone", "tree"]) for _ in range(900))
    path.write_text(" ".join(words))
    return path


def files(folder):
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


def test_layer_by_layer_equals_the_whole_model(model, calib, tmp_path):
    """Hessians of transformers' own activations, quantised in its own modules one by one."""
    import transformers

    quantise(model, tmp_path / "m", calib=calib, method="p-gptq", prefix="drop", sinks=False,
             **SMALL)  # fmt: skip
    options = Options(method="p-gptq", **SMALL)
    ids = Windows.draw(Source(model), calib, options).ids
    whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    whole.model.embed_tokens.weight.data = whole.model.embed_tokens.weight.data.clone()
    with Tensors(Source(tmp_path / "m")) as made, torch.no_grad():
        for i, layer in enumerate(whole.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            for together in (
                {"self_attn.q_proj": attention.q_proj, "self_attn.k_proj": attention.k_proj,
                 "self_attn.v_proj": attention.v_proj},
                {"self_attn.o_proj": attention.o_proj},
                {"mlp.gate_proj": mlp.gate_proj, "mlp.up_proj": mlp.up_proj},
                {"mlp.down_proj": mlp.down_proj},
            ):  # fmt: skip
                seen = []
                first = next(iter(together.values()))
                hook = first.register_forward_pre_hook(lambda _, x, to=seen: to.append(x[0]))
                whole(ids)
                hook.remove()
                hessian = Hessian(first.in_features, skip=4)
                hessian.add(seen[0])
                for name, linear in together.items():
                    wanted = gptq(linear.weight.data, hessian.matrix, 4, 32)
                    got = made.codes(f"layers.{i}.{name}.weight")
                    # Sums in another order move a weight across a boundary now and then.
                    same = (got.codes == wanted.codes).float().mean()
                    assert same > 0.995, (i, name, float(same))
                    linear.weight.data = got.dequantise()
        name = "embed_tokens.weight"
        embedding = whole.model.embed_tokens.weight.data
        assert torch.equal(made.read(name), nearest(embedding, 8, 32).dequantise())


@pytest.mark.parametrize("act_order", [False, True])
def test_methods_in_order_of_their_error(model, calib, tmp_path, act_order):
    errors = {}
    for method in ("rtn", "gptq", "p-gptq"):
        report = quantise(model, tmp_path / method, calib=calib, method=method,
                          act_order=act_order, **SMALL)  # fmt: skip
        assert len(report.errors) == 2 and set(report.errors[0]) == set(module.PARTS)
        engine = Engine.from_pretrained(tmp_path / method, dtype="float32", backend="reference")
        plain = Engine.from_pretrained(model, dtype="float32", backend="reference")
        ids = Windows.draw(Source(model), calib, Options(**SMALL | {"seed": 9})).ids[0].tolist()
        errors[method] = float((engine.logits(ids) - plain.logits(ids)).norm())
    assert max(errors["gptq"], errors["p-gptq"]) < 0.8 * errors["rtn"]


def test_the_same_seed_gives_the_same_bits_and_another_others(model, calib, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        quantise(model, tmp_path / name, calib=calib, seed=seed, **SMALL)
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert a == b != c


class Killed(BaseException):
    """Not an Exception: nothing may catch it."""


@pytest.mark.parametrize("after", [1, 5, 6, 8])
def test_a_killed_run_goes_on_and_ends_the_same(model, calib, tmp_path, after):
    def kill(done, total):
        if done >= after:
            raise Killed

    with pytest.raises(Killed):
        quantise(model, tmp_path / "m", calib=calib, progress=kill, **SMALL)
    with pytest.raises(FileNotFoundError, match="no config.json"):
        Source(tmp_path / "m")  # not a model before it is whole
    seen = []
    quantise(model, tmp_path / "m", calib=calib, progress=lambda d, t: seen.append(d), **SMALL)
    assert len(seen) == (9 if after < 6 else 5)  # a finished layer is not done again
    quantise(model, tmp_path / "once", calib=calib, **SMALL)
    assert files(tmp_path / "m") == files(tmp_path / "once")
    assert not (tmp_path / "m/work").exists()


def test_a_finished_folder_is_left_alone_and_another_never_overwritten(model, calib, tmp_path):
    first = quantise(model, tmp_path / "m", calib=calib, **SMALL)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "m").iterdir()}
    again = quantise(model, tmp_path / "m", calib=calib, **SMALL)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "m").iterdir()}
    assert again.to_dict() == first.to_dict()
    with pytest.raises(FileExistsError, match="another model, text or options"):
        quantise(model, tmp_path / "m", calib=calib, **SMALL | {"bits": 8})
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="no quantisation that was begun"):
        quantise(model, tmp_path / "other", calib=calib, **SMALL)


def test_folder_has_tokenizer_and_metadata(model, calib, tmp_path):
    quantise(model, tmp_path / "m", calib=calib, **SMALL)
    config = json.loads((tmp_path / "m/config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == ("cpmcu", 4, 32)
    assert config["algorithm"]["name"] == "p-gptq"
    assert config["algorithm"]["calibration_tokens"] == 12 * 48
    engine = Engine.from_pretrained(tmp_path / "m")
    assert engine.generate("salt", max_new_tokens=2).stats.new_tokens == 2


def test_jsonl_is_calibration_text(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert read_text(path) == "one\n\ntwo"
    path.write_text('{"txt": "one"}\n')
    with pytest.raises(ValueError, match="JSON lines with a field 'text'"):
        read_text(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "awq"}, "method must be one of rtn, gptq, p-gptq"),
        ({"bits": 3}, "bits must be one of"),
        ({"group": 128}, "do not divide 64 columns"),
        ({"samples": 0}, "samples must be in 1"),
        ({"length": 5000}, "fewer than one window"),
        ({"skip": 48}, "skip must be in 0..47"),
        ({"damp": 0}, "damp must be above 0"),
        ({"prefix": "keep"}, "prefix must be 'level' or 'drop'"),
        ({"calib": None}, "needs calibration text"),
    ],
)
def test_options_out_of_range(model, calib, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        quantise(model, tmp_path / "m", **{"calib": calib} | SMALL | options)
    assert not (tmp_path / "m").exists()


def test_missing_text_and_tokenizer(model, tiny_folder, tmp_path, calib):
    with pytest.raises(FileNotFoundError, match="expected calibration text"):
        quantise(model, tmp_path / "m", calib=tmp_path / "none.txt", **SMALL)
    _, bare = tiny_folder("llama")
    with pytest.raises(ValueError, match="has no tokenizer"):
        quantise(bare, tmp_path / "m", calib=calib, **SMALL)
