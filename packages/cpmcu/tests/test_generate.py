"""Generation: greedy against transformers, streams, stops, seeds, limits, prefix reuse."""

from __future__ import annotations

import pytest
import torch

import testbed
from cpmcu import Engine
from cpmcu.results import Stream


@pytest.mark.parametrize("arch", ["llama-gqa3", "qwen2", "qwen3", "mistral"])
def test_greedy_equals_transformers_token_for_token(tiny_folder, arch):
    model, folder = tiny_folder(arch)
    ids = torch.randint(256, (13,), generator=torch.Generator().manual_seed(3)).tolist()
    batch = torch.tensor([ids])
    wanted = model.generate(
        batch, attention_mask=torch.ones_like(batch), max_new_tokens=40, do_sample=False
    )
    got = Engine.from_pretrained(folder, dtype="float32").generate(token_ids=ids, max_new_tokens=40)
    assert got.token_ids == wanted[0, len(ids) :].tolist()
    assert got.finish_reason == "length" and got.text == ""


def test_smollm2_answers_as_transformers_does(smollm2):
    model, words = testbed.smollm2(torch.float32)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = words.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
    wanted = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :].tolist()
    got = smollm2.generate(messages=messages, max_new_tokens=24)
    assert smollm2.tokens[: ids.shape[1]] == ids[0].tolist()
    assert got.token_ids == wanted
    assert got.text == words.decode(wanted, skip_special_tokens=True)
    assert "Paris" in got.text and got.finish_reason == "stop"
    stats = got.stats
    assert stats.prompt_tokens == ids.shape[1] and stats.new_tokens == len(wanted)
    assert stats.decode_tokens_per_second == pytest.approx((len(wanted) - 1) / stats.decode_seconds)
    assert stats.peak_memory_bytes > 500e6


def test_stream_joins_to_the_text(smollm2):
    prompt = "Emoji: 🎉🎊 中文 and"
    stream = smollm2.generate(prompt, max_new_tokens=12, stream=True)
    assert isinstance(stream, Stream)
    with pytest.raises(RuntimeError, match="not ended"):
        _ = stream.result
    pieces = list(stream)
    assert len(pieces) > 3 and "".join(pieces) == stream.result.text
    assert stream.result.token_ids == smollm2.generate(prompt, max_new_tokens=12).token_ids


def test_a_closed_stream_leaves_a_usable_engine(smollm2):
    stream = smollm2.generate("One two three", max_new_tokens=50, stream=True)
    next(stream)
    stream.close()
    held = list(smollm2.tokens)
    again = smollm2.generate(token_ids=[*held, 5], max_new_tokens=3)
    smollm2.reset()
    assert again.stats.reused_tokens == len(held)
    assert smollm2.generate(token_ids=[*held, 5], max_new_tokens=3).token_ids == again.token_ids


def test_two_streams_on_one_engine_are_refused(smollm2):
    first = smollm2.generate("One two three", max_new_tokens=50, stream=True)
    next(first)
    smollm2.generate("Another text altogether", max_new_tokens=2)
    with pytest.raises(RuntimeError, match="used for something else"):
        list(first)


def test_stop_string_across_tokens_is_cut(smollm2):
    whole = smollm2.generate("Count: one, two, three,", max_new_tokens=12).text
    middle = whole[5:12]
    first = whole.index(middle)
    got = smollm2.generate("Count: one, two, three,", max_new_tokens=12, stop=["zzz", middle])
    assert got.text == whole[:first] and got.finish_reason == "stop"
    stream = smollm2.generate(
        "Count: one, two, three,", max_new_tokens=12, stop=middle, stream=True
    )
    assert "".join(stream) == whole[:first]


def test_same_seed_same_text_other_seed_other_text(smollm2):
    def text(seed):
        return smollm2.generate(
            "The weather", max_new_tokens=5, temperature=1.5, top_k=50, seed=seed
        ).text

    assert text(7) == text(7)
    assert len({text(seed) for seed in range(3)}) > 1
    assert len({text(None) for _ in range(3)}) > 1


def test_chat_reuses_the_shared_prefix(smollm2):
    messages = [{"role": "user", "content": "Name a colour."}]
    answer = smollm2.generate(messages=messages, max_new_tokens=8)
    assert answer.stats.reused_tokens == 0
    messages += [
        {"role": "assistant", "content": answer.text},
        {"role": "user", "content": "More."},
    ]
    second = smollm2.generate(messages=messages, max_new_tokens=8)
    assert second.stats.reused_tokens >= answer.stats.prompt_tokens - 1
    smollm2.reset()
    fresh = smollm2.generate(messages=messages, max_new_tokens=8)
    assert fresh.stats.reused_tokens == 0 and fresh.token_ids == second.token_ids


def test_a_repeated_prompt_computes_one_token(smollm2):
    first = smollm2.generate("The same words", max_new_tokens=4)
    again = smollm2.generate("The same words", max_new_tokens=4)
    assert again.stats.reused_tokens == again.stats.prompt_tokens - 1
    assert again.token_ids == first.token_ids


def test_rollback(smollm2):
    ids = smollm2.tokenizer.encode("Keys and values of a forgotten branch must not be seen.")
    straight = smollm2.logits(ids)
    smollm2.reset()
    smollm2.prefill(ids[:4])
    smollm2.prefill([11, 12, 13, 14])
    smollm2.rollback(6)
    smollm2.decode(15)
    smollm2.rollback(4)
    assert smollm2.tokens == ids[:4]
    torch.testing.assert_close(smollm2.prefill(ids[4:]), straight[-1], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match=r"0\.\.\d+ \(tokens held\), got -1"):
        smollm2.rollback(-1)


def test_context_overflow_names_the_numbers_and_the_fix(tiny_folder):
    _, folder = tiny_folder("llama")
    engine = Engine.from_pretrained(folder, dtype="float32", max_context=16)
    with pytest.raises(
        ValueError, match=r"17 tokens, above max_context=16 .*4096.*raise max_context"
    ):
        engine.generate(token_ids=[3] * 17)
    engine.prefill([3] * 10)
    with pytest.raises(ValueError, match=r"17 tokens, above max_context=16"):
        engine.prefill([3] * 7)
    assert len(engine.tokens) == 10  # a refusal changes nothing


def test_generation_ends_when_the_context_is_full(tiny_folder):
    _, folder = tiny_folder("llama")
    engine = Engine.from_pretrained(folder, dtype="float32", max_context=16)
    got = engine.generate(token_ids=[3] * 12, max_new_tokens=100)
    # 12 in the cache give the first token; feeding 4 more fills it, each giving another.
    assert len(got.token_ids) == 5 and got.finish_reason == "length"


def test_no_new_tokens(smollm2):
    got = smollm2.generate("Hello", max_new_tokens=0)
    assert (got.text, got.token_ids, got.finish_reason) == ("", [], "length")
    assert got.stats.decode_tokens_per_second == 0.0


def test_empty_prompt_starts_from_bos(smollm2, tiny_folder):
    assert smollm2.generate("", max_new_tokens=1).stats.prompt_tokens == 1
    assert smollm2.tokens[0] == smollm2.spec.bos
    _, folder = tiny_folder("llama", bos_token_id=None)
    with pytest.raises(ValueError, match="no tokens, and the model has no BOS"):
        Engine.from_pretrained(folder).generate(token_ids=[])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of prompt, messages, token_ids; got none"),
        ({"prompt": "a", "token_ids": [1]}, "exactly one"),
        ({"prompt": "a", "max_new_tokens": -1}, "max_new_tokens must be >= 0, got -1"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature must be a finite number"),
        ({"prompt": "a", "top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"prompt": "a", "top_k": -2}, "top_k must be an integer >= 0"),
        ({"prompt": "a", "min_p": 1.5}, r"min_p must be in \[0, 1\]"),
        ({"prompt": "a", "repetition_penalty": 0.0}, "repetition_penalty must be"),
        ({"prompt": "a", "stop": [""]}, "stop must be non-empty strings"),
        ({"prompt": "a", "seed": 2**70}, "seed must fit in 64 bits"),
        ({"prompt": "a\udcff"}, "not valid Unicode"),
        ({"token_ids": [0, 99999]}, "token id 99999 is outside the model's vocabulary of 49152"),
        ({"token_ids": [-1]}, "token id -1 is outside"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] must be a mapping with 'role'"),
        ({"messages": ["x"]}, r"messages\[0\]"),
    ],
)
def test_bad_arguments(smollm2, arguments, message):
    with pytest.raises(ValueError, match=message):
        smollm2.generate(**arguments)


def test_damaged_weights_are_reported_not_sampled(tiny_folder):
    _, folder = tiny_folder("llama")
    engine = Engine.from_pretrained(folder, dtype="float32")
    engine._decoder.weights.norm[0] = float("nan")
    with pytest.raises(ValueError, match="logits at position 2 are not finite"):
        engine.generate(token_ids=[1, 2, 3])


def test_interrupt_inside_a_chunk_keeps_the_sequence(tiny_folder, monkeypatch):
    _, folder = tiny_folder("llama")
    engine = Engine.from_pretrained(folder, dtype="float32", backend="reference")
    engine.prefill([1, 2, 3])
    norm = engine._decoder._norm

    def interrupted(x, weight):
        # After the last layer: the cache already counts the new tokens.
        if weight is engine._decoder.weights.norm:
            raise KeyboardInterrupt
        return norm(x, weight)

    monkeypatch.setattr(engine._decoder, "_norm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.prefill([4, 5])
    monkeypatch.undo()
    assert engine.tokens == [1, 2, 3] and engine._cache.length == 3
    after = engine.prefill([4, 5])
    torch.testing.assert_close(after, engine.logits([1, 2, 3, 4, 5])[-1], atol=1e-5, rtol=1e-5)


def test_interrupt_after_native_code_keeps_the_sequence(tiny_folder, monkeypatch):
    """Ctrl-C waits for the chunk that runs, and is then raised."""
    _, folder = tiny_folder("llama")
    engine = Engine.from_pretrained(folder, dtype="float32", backend="cpu")
    engine.prefill([1, 2, 3])
    run = engine._decoder.pool.run

    def interrupted(records):
        run(records)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine._decoder.pool, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.prefill([4, 5])
    monkeypatch.undo()
    assert engine.tokens == [1, 2, 3] and engine._cache.length == 3
    after = engine.prefill([4, 5])
    assert torch.equal(after, engine.logits([1, 2, 3, 4, 5])[-1])


def test_score_equals_cross_entropy(smollm2):
    model, words = testbed.smollm2(torch.float32)
    texts = ["Water boils at 100 degrees.", "", "Degrees 中文 boils 🎉.", "word " * 200]
    for text, score in zip(texts, smollm2.score(texts), strict=True):
        ids = words(text).input_ids
        assert (score.tokens, score.bytes) == (len(ids), len(text.encode()))
        if ids:
            batch = torch.tensor([[smollm2.spec.bos, *ids]])
            with torch.inference_mode():
                loss = model(batch, labels=batch).loss
            assert score.log_likelihood == pytest.approx(-float(loss) * len(ids), rel=1e-4)


def test_threads(tiny_folder, caplog):
    _, folder = tiny_folder("llama")
    before = torch.get_num_threads()
    engine = Engine.from_pretrained(folder, threads=100_000)
    assert 1 <= engine.threads < 100_000 and "lowered to" in caplog.text
    engine.prefill([1, 2])
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        Engine.from_pretrained(folder, threads=0)


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [
        ("sparse", "yes", "'auto', 'on', 'off'"),
        ("backend", "triton", "'auto', 'gpu', 'cpu', 'reference'"),
    ],
)
def test_unknown_options_are_refused(tiny_folder, option, value, known):
    _, folder = tiny_folder("llama")
    with pytest.raises(ValueError, match=f"{option} must be .*{known}.*, got '{value}'"):
        Engine.from_pretrained(folder, **{option: value})


def test_two_engines_in_two_threads(tiny_folder):
    from concurrent.futures import ThreadPoolExecutor

    _, folder = tiny_folder("llama-gqa3")
    engines = [Engine.from_pretrained(folder, dtype="float32") for _ in range(2)]
    prompts = [[5, 6, 7], [9, 8, 7, 6]]
    alone = [
        e.generate(token_ids=p, max_new_tokens=30).token_ids
        for e, p in zip(engines, prompts, strict=True)
    ]
    for engine in engines:
        engine.reset()
    with ThreadPoolExecutor(2) as pool:
        work = [
            pool.submit(e.generate, token_ids=p, max_new_tokens=30)
            for e, p in zip(engines, prompts, strict=True)
        ]
    assert [w.result().token_ids for w in work] == alone
