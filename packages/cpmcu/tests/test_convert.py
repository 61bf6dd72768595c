"""Conversion: hyper-parameters, tokenizer and tensors survive it, codes bit for bit."""

from __future__ import annotations

import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

import testbed
from cpmcu import Engine, gguf_vocab, tokenizer
from cpmcu._fields import Fields
from cpmcu.convert import convert
from cpmcu.gguf_file import GGUFFile
from cpmcu.loader import Source
from cpmcu.model_files import to_config
from cpmcu.quantise import quantise
from cpmcu.spec import from_config
from cpmcu.spec_gguf import gguf_name, halves, pairs, transformers_name
from cpmcu.tensors import Tensors

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]
ROPES = {
    "none": {},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "longrope": {"rope_type": "longrope", "rope_theta": 1e4, "attention_factor": 1.25,
                 "short_factor": [1.0 + 0.1 * i for i in range(8)],
                 "long_factor": [2.0 + 0.3 * i for i in range(8)],
                 "original_max_position_embeddings": 12},
}  # fmt: skip


def logits(path, **options):
    options = {"dtype": "float32", "backend": "reference"} | options
    return Engine.from_pretrained(path, **options).logits(IDS)


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3", "minicpm4"])
@pytest.mark.parametrize("tie", [False, True])
def test_there_and_back(tiny_folder, tmp_path, arch, tie):
    """GGUF in float32 gives the same logits, and so does the folder made of it."""
    _, folder = tiny_folder(arch, tie_word_embeddings=tie)
    convert(folder, tmp_path / "m.gguf", "F32")
    convert(tmp_path / "m.gguf", tmp_path / "m")
    wanted = logits(folder)
    for path in (tmp_path / "m.gguf", tmp_path / "m"):
        torch.testing.assert_close(logits(path), wanted, atol=2e-6, rtol=2e-6)
    with Tensors(Source(folder)) as first, Tensors(Source(tmp_path / "m")) as last:
        for name in first.spec.tensors():
            assert torch.equal(first.read(name), last.read(name)), name


@pytest.mark.parametrize("kind", list(ROPES))
def test_rotary_scaling_survives(tiny_folder, tmp_path, kind):
    rope = {"rope_parameters": ROPES[kind]} if ROPES[kind] else {}
    _, folder = tiny_folder("llama", **rope)
    convert(folder, tmp_path / "m.gguf", "F32")
    convert(tmp_path / "m.gguf", tmp_path / "m")
    for path in (tmp_path / "m.gguf", tmp_path / "m"):
        torch.testing.assert_close(logits(path), logits(folder), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_codes_pass_bit_for_bit(tiny_folder, tmp_path, bits, group):
    _, folder = tiny_folder("llama")  # its rows are interleaved in GGUF
    quantise(folder, tmp_path / "q", method="rtn", bits=bits, group=group)
    made = convert(tmp_path / "q", tmp_path / "q.gguf")
    assert not made.errors and made.kinds[{4: "Q4_0", 8: "Q8_0"}[bits]] >= 14
    back = convert(tmp_path / "q.gguf", tmp_path / "back")
    assert not back.errors
    with Tensors(Source(tmp_path / "q")) as first, Tensors(Source(tmp_path / "back")) as last:
        for name, shape in first.spec.tensors().items():
            assert torch.equal(first.read(name), last.read(name)), name
            if len(shape) == 2:
                assert torch.equal(first.codes(name).codes, last.codes(name).codes), name
    assert Engine.from_pretrained(tmp_path / "q.gguf").quant == f"int{bits}"


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_what_is_rounded_is_said(tiny_folder, tmp_path, kind):
    """The stated error is that of gguf's own reader and dequantiser."""
    from gguf.quants import dequantize

    _, folder = tiny_folder("qwen2")
    made = convert(folder, tmp_path / "m.gguf", kind)
    name = "layers.1.mlp.down_proj.weight"
    reader = GGUFReader(tmp_path / "m.gguf")
    tensor = next(t for t in reader.tensors if t.name == gguf_name(name))
    assert tensor.tensor_type.name == kind
    held = dequantize(tensor.data, tensor.tensor_type)
    with Tensors(Source(folder)) as tensors:
        weight = tensors.read(name).numpy()
    error = float(np.linalg.norm(held - weight) / np.linalg.norm(weight))
    assert made.errors[gguf_name(name)] == pytest.approx(error, rel=1e-3) and error > 0
    fields = {key: field.contents() for key, field in reader.fields.items()}
    numbers = {"F16": 1, "BF16": 32, "Q8_0": 7, "Q4_0": 2, "Q4_1": 3}
    assert fields["general.file_type"] == numbers[kind]
    assert fields["general.architecture"] == "qwen2"


def test_ternary_weights_become_tq2_0(tmp_path, tiny_folder):
    bitcpm = pytest.importorskip("bitcpm")
    _, made = tiny_folder("llama", hidden_size=256, intermediate_size=256, head_dim=64)
    folder = shutil.copytree(made, tmp_path / "t")
    state = load_file(folder / "model.safetensors")
    for name in [name for name in state if "proj" in name]:
        state[name] = state[name].sign() * 0.0625
    save_file(state, folder / "model.safetensors")
    bitcpm.pack_model(folder, tmp_path / "p")
    made = convert(tmp_path / "p", tmp_path / "m.gguf")
    assert made.kinds["TQ2_0"] == 14
    with Tensors(Source(tmp_path / "p")) as first, Tensors(Source(tmp_path / "m.gguf")) as last:
        for name in first.spec.tensors():
            if "proj" in name:
                assert torch.equal(first.read(name).float(), last.read(name)), name


def test_rows_change_places_and_back():
    order = torch.arange(24)[pairs(24, 3)]
    assert order[:8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(order[halves(24, 3)], torch.arange(24))


def test_names_there_and_back(tiny_folder):
    for arch in ("qwen2", "qwen3"):
        for name in Source(tiny_folder(arch)[1]).spec.tensors():
            assert transformers_name(gguf_name(name)) == name


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen2", "qwen3", "minicpm4"])
@pytest.mark.parametrize("kind", list(ROPES))
def test_config_there_and_back(tiny_folder, arch, kind):
    rope = {"rope_parameters": ROPES[kind]} if ROPES[kind] and arch == "llama" else {}
    spec = Source(tiny_folder(arch, **rope)[1]).spec
    assert from_config(Fields(to_config(spec), "config.json")) == spec


TEXTS = [
    "Hello, world! It's 12345 o'clock.", "  leading and trailing  ", "tabs\tand\n\nnew lines\r\n",
    "über naïve 日本語 🙂 ½", "<|im_start|>user\nHi<|im_end|>\n", "", "a", "____ x=y+1; 3.14",
]  # fmt: skip


def test_the_tokenizer_of_a_real_model_survives(tmp_path):
    folder = testbed.smollm2_path()
    made = dict((key, value) for key, value, _ in gguf_vocab.entries(Source(folder)))
    original = GGUFFile(testbed.smollm2_gguf()).metadata
    for name in ("model", "pre", "tokens", "merges", "bos_token_id", "eos_token_id"):
        assert made[f"tokenizer.ggml.{name}"] == original[f"tokenizer.ggml.{name}"], name
    assert made["tokenizer.chat_template"] == original["tokenizer.chat_template"]
    kinds = "tokenizer.ggml.token_type"
    assert made[kinds] == original[kinds]


@pytest.mark.parametrize("family", ["smollm2", "sentencepiece"])
def test_texts_have_the_same_ids_in_both(tiny_folder, tmp_path, family):
    _, folder = tiny_folder("llama", vocab_size=49152 if family == "smollm2" else 512)
    words = folder / "tokenizer.json"
    if family == "smollm2":
        words.write_bytes((testbed.smollm2_path() / "tokenizer.json").read_bytes())
    else:
        words.write_text(sentencepiece().to_str())
    convert(folder, tmp_path / "m.gguf", "F16")
    convert(tmp_path / "m.gguf", tmp_path / "back")
    texts = TEXTS if family == "smollm2" else [*TEXTS, "the theory of the other thing"]
    wanted, *others = (
        [words.encode(text) for text in texts]
        for words in map(
            tokenizer.load, map(Source, (folder, tmp_path / "m.gguf", tmp_path / "back"))
        )
    )
    assert others == [wanted, wanted]


def sentencepiece():
    """A small BPE with byte fallback, as Llama 2's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokens += list("▁abcdefghijklmnopqrstuvwxyz")
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "th"), ("i", "n"), ("in", "g"),
              ("o", "r"), ("e", "r"), ("▁", "o"), ("▁o", "th"), ("▁oth", "er")]  # fmt: skip
    tokens += [a + b for a, b in merges]
    vocab = {t: i for i, t in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True,
                                   byte_fallback=True))  # fmt: skip
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return backend


def test_refusals(tiny_folder, tmp_path):
    _, folder = tiny_folder("llama")
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="remove it or take another name"):
        convert(folder, tmp_path / "there")
    for name, kind in (("m.gguf", "Q3_K"), ("m", "TQ2_0")):
        with pytest.raises(ValueError, match="must be one of"):
            convert(folder, tmp_path / name, kind)
    with pytest.raises(ValueError, match="whole blocks of 256"):
        convert(folder, tmp_path / "m.gguf", "TQ2_0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"]  # nothing half-written


PEER = os.environ.get("LLAMA_CPP_PYTHON")
ASK = """
import json, sys, llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=256, verbose=False, n_threads=1, seed=0)
out = model.create_chat_completion(json.loads(sys.argv[2]), temperature=0, max_tokens=12)
print(json.dumps(out["choices"][0]["message"]["content"]))
"""


@pytest.mark.skipif(PEER is None, reason="LLAMA_CPP_PYTHON names no python with llama-cpp-python")
@pytest.mark.parametrize("kind", ["BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_llama_cpp_says_the_same(tmp_path, kind):
    """Or else what we say is what the file's weights say, without rounded activations."""
    import json

    convert(testbed.smollm2_path(), tmp_path / "m.gguf", kind)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    command = [PEER, "-c", ASK, str(tmp_path / "m.gguf"), json.dumps(messages)]
    theirs = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    engine = Engine.from_pretrained(tmp_path / "m.gguf", max_context=256)
    ours = engine.generate(messages=messages, max_new_tokens=12)
    if ours.text.strip() != theirs.strip():
        assert kind != "BF16"
        exact = Engine.from_pretrained(tmp_path / "m.gguf", max_context=256, quant="float32",
                                       dtype="float32")  # fmt: skip
        assert ours.text == exact.generate(messages=messages, max_new_tokens=12).text
