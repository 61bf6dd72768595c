"""Ids and text against transformers; streams of bytes that are no characters yet."""

from __future__ import annotations

import json
import random

import pytest
import torch

import testbed
from cpmcu import tokenizer
from cpmcu.gguf_file import GGUFFile
from cpmcu.template import ChatTemplate
from cpmcu.tokenizer_gguf import from_gguf

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  leading and trailing  ",
    "In 2024, 1234567 people's lives — don't you'll we've; naïve café\n\n\ttabs\r\n",
    "端侧设备上的大模型,效率很高。12月3日",
    "Emoji 🎉👩‍👩‍👧‍👦🇫🇷 and ﷽",
    "code: for(int i=0;i<10;i++){ x+=1; } <|im_start|>user\nhi<|im_end|>",
]


@pytest.fixture(scope="module")
def words(smollm2_folder):
    return tokenizer.from_folder(smollm2_folder)


@pytest.fixture(scope="module")
def gguf_words():
    return from_gguf(GGUFFile(testbed.smollm2_gguf()))


@pytest.fixture(scope="module")
def oracle():
    return testbed.smollm2(torch.float32)[1]


def test_smollm_isolates_every_numeric_character(gguf_words):
    """Also ½ and Roman numerals, before the space could join them."""
    pieces = gguf_words.backend.pre_tokenizer.pre_tokenize_str("a ½ Ⅷ 12")
    assert [span for _, span in pieces] == [
        *((0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 8))
    ]


@pytest.mark.parametrize("text", TEXTS)
def test_folder_and_gguf_encode_as_transformers_does(words, gguf_words, oracle, text):
    ids = oracle(text).input_ids
    assert words.encode(text) == ids
    assert gguf_words.encode(text) == ids
    assert words.decode(ids, skip_special=False) == text
    assert gguf_words.decode(ids, skip_special=False) == text


def test_decode_equals_tokenizers_on_random_ids(words, gguf_words, oracle):
    """Random ids make invalid UTF-8 of every kind."""
    generator = random.Random(0)
    for _ in range(200):
        ids = [generator.randrange(words.size) for _ in range(generator.randrange(1, 12))]
        wanted = words.backend.decode(ids, skip_special_tokens=True)
        assert words.decode(ids) == gguf_words.decode(ids) == wanted


def test_stream_never_splits_a_character(words):
    text = "a🎉b端c👩‍👩‍👧d"
    byte_id = {words.token_bytes(i): i for i in range(words.size) if len(words.token_bytes(i)) == 1}
    stream = words.stream()
    pieces = [stream.feed(byte_id[bytes([byte])]) for byte in text.encode()]
    assert "".join(pieces) + stream.flush() == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces[1:5] == ["", "", "", "🎉"]


def test_a_character_cut_off_at_the_end_becomes_a_replacement(words):
    byte_id = {words.token_bytes(i): i for i in range(words.size) if len(words.token_bytes(i)) == 1}
    stream = words.stream()
    assert [stream.feed(byte_id[bytes([b])]) for b in "🎉".encode()[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"


def test_special_tokens_are_skipped_and_do_not_reset_a_character(words):
    byte_id = {words.token_bytes(i): i for i in range(words.size) if len(words.token_bytes(i)) == 1}
    first, *rest = (byte_id[bytes([b])] for b in "端".encode())
    assert words.decode([first, 1, *rest]) == "端"


def test_chat_template_equals_transformers(words, gguf_words, oracle):
    for messages in (
        [{"role": "user", "content": "Hi 🎉"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "A?"},
            {"role": "assistant", "content": "B."},
            {"role": "user", "content": "C?"},
        ],
    ):
        text = oracle.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert words.template.render(messages) == text
        assert words.chat(messages) == gguf_words.chat(messages) == oracle(text).input_ids


def test_llama3_and_qwen2_splits_equal_transformers_patterns():
    """The two regular expressions, on text that each of their parts decides."""
    from tokenizers import Regex, pre_tokenizers
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    from cpmcu.tokenizer_gguf import _SPLITS

    for text in TEXTS[1:]:
        ours, theirs = (
            pre_tokenizers.Split(Regex(p), "isolated").pre_tokenize_str(text)
            for p in (_SPLITS["qwen2"], PRETOKENIZE_REGEX)
        )
        assert ours == theirs
    numbers = pre_tokenizers.Split(Regex(_SPLITS["llama-bpe"]), "isolated")
    assert [piece for piece, _ in numbers.pre_tokenize_str("x1234 YOU'LL")] == [
        *("x", "123", "4", " YOU", "'LL")
    ]


def write_gguf(path, **fields):
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    for name, value in fields.items():
        key = name.replace("__", ".")
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


SPM = {
    "tokenizer__ggml__model": "llama",
    "tokenizer__ggml__tokens": ["<unk>", "<s>", "</s>"]
    + [f"<0x{b:02X}>" for b in range(256)]
    + ["▁", "a", "b", "c", "▁a", "ab", "▁ab", "abc", "bc", "▁▁"],
    "tokenizer__ggml__scores": [0.0] * 259
    + [-9.0, -9.0, -9.0, -9.0, -1.0, -2.0, -1.5, -4.0, -3.0, -5.0],
    "tokenizer__ggml__token_type": [2, 3, 3] + [6] * 256 + [1] * 10,
    "tokenizer__ggml__bos_token_id": 1,
    "tokenizer__ggml__eos_token_id": 2,
}


def greedy_sentencepiece(text, tokens, scores):
    """SentencePiece's BPE by definition: join the best-scored pair, leftmost first."""
    symbols = list(text)
    score = dict(zip(tokens, scores, strict=True))
    while True:
        pairs = [
            (-score[a + b], i)
            for i, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False))
            if a + b in score
        ]
        if not pairs:
            return symbols
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def test_sentencepiece_gguf(tmp_path):
    words = from_gguf(write_gguf(tmp_path / "spm.gguf", **SPM))
    tokens, scores = SPM["tokenizer__ggml__tokens"], SPM["tokenizer__ggml__scores"]
    generator = random.Random(1)
    for _ in range(100):
        text = "".join(generator.choice("abc ") for _ in range(generator.randrange(1, 12)))
        symbols = greedy_sentencepiece("▁" + text.replace(" ", "▁"), tokens, scores)
        ids = words.encode(text)
        assert ids == [1, *(tokens.index(s) for s in symbols)]
        assert words.decode(ids) == " " + text
    assert words.decode(words.encode("a端")) == " a端"
    assert words.encode("端", special=False)[-3:] == [3 + b for b in "端".encode()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer__ggml__model": "bert"}, "'tokenizer.ggml.model' is 'bert', supported are"),
        ({"tokenizer__ggml__scores": [0.0]}, "'tokenizer.ggml.scores' must have 269 entries"),
        ({"tokenizer__ggml__token_type": [1]}, "'tokenizer.ggml.token_type' must have 269"),
        ({"tokenizer__ggml__tokens": ["a", "a"]}, "'tokenizer.ggml.tokens' has duplicates"),
        ({"tokenizer__ggml__bos_token_id": 999}, "'tokenizer.ggml.bos_token_id' must be in"),
        (
            {"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__pre": "tekken"},
            "'tokenizer.ggml.pre'",
        ),
        ({"tokenizer__ggml__model": "gpt2"}, "'tokenizer.ggml.merges' must be a list of strings"),
        (
            {"tokenizer__ggml__model": "gpt2", "tokenizer__ggml__merges": ["a z"]},
            "'tokenizer.ggml.merges' has 'a z', which the tokens lack",
        ),
    ],
)
def test_wrong_gguf_metadata_names_the_field(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        from_gguf(write_gguf(tmp_path / "bad.gguf", **SPM | change))


def test_broken_tokenizer_json(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a valid tokenizer"):
        tokenizer.from_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="needs it to read and write text"):
        tokenizer.from_folder(tmp_path / "none")


def test_unknown_decoder_is_refused(tmp_path):
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="field 'decoder'"):
        tokenizer.from_folder(tmp_path)


def test_template_from_tokenizer_config(smollm2_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((smollm2_folder / "tokenizer.json").read_bytes())
    settings = {"chat_template": [{"name": "default", "template": "{{ eos_token }}!"}]}
    settings["eos_token"] = {"content": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    words = tokenizer.from_folder(tmp_path)
    assert words.template.render([{"role": "user", "content": ""}]) == "<|im_end|>!"
    assert words.eos == (2,)


@pytest.mark.parametrize(
    "hostile",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('no system role') }}",
        "{{ messages[0].content + 3 }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_hostile_templates_are_stopped(hostile):
    template = ChatTemplate(hostile, "here", {})
    with pytest.raises(ValueError, match="here: the chat template refuses"):
        template.render([{"role": "user", "content": "x"}])


def test_template_syntax_error():
    with pytest.raises(ValueError, match="here: the chat template is not valid Jinja"):
        ChatTemplate("{% if %}", "here", {})


def test_an_absurd_token_id_takes_no_memory(smollm2_folder, tmp_path):
    """Found by fuzzing: one id of four billion was a table of 32 GB."""
    description = json.loads((smollm2_folder / "tokenizer.json").read_text())
    token = next(iter(description["model"]["vocab"]))
    description["model"]["vocab"][token] = 2**32 - 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="token id 4294967295 is above"):
        tokenizer.from_folder(tmp_path)
