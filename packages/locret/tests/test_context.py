from __future__ import annotations

import pytest
import torch

testbed = pytest.importorskip("testbed")
transformers = pytest.importorskip("transformers")

from locret import (  # noqa: E402
    SCORERS,
    HeadsAndKeyDiff,
    LocretCache,
    LocretConfig,
    RetainingHeads,
    chunked_prefill,
    generate,
    locret,
    prefill,
)
from locret.interface import exchanged  # noqa: E402
from locret.scorers import Trained  # noqa: E402

SMALL = LocretConfig(budget=16, chunk=8, stabilisers=4, local=5, sinks=2)


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 250, (rows, length), generator=generator)


@pytest.fixture(scope="module")
def model():
    return testbed.tiny("llama-gqa3")


@pytest.fixture(scope="module")
def heads(model):
    torch.manual_seed(0)
    return RetainingHeads.for_model(model, hidden=8)


@torch.no_grad()
@pytest.mark.parametrize("arch", testbed.tiny_archs())
@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_with_room_for_all_it_is_the_model(arch: str, positions: str) -> None:
    model = testbed.tiny(arch)
    ids, heads = tokens(2, 37), RetainingHeads.for_model(model, hidden=4, input="qkv")
    dense = model(ids).logits
    for chunk in (1, 7, 16, 64):
        config = LocretConfig(budget=40, chunk=chunk, stabilisers=3, local=4, positions=positions)
        with locret(model, heads, config):
            out = model(input_ids=ids)
        assert (out.logits - dense).abs().max() < 1e-4
        with locret(model, heads, config):
            last = model(input_ids=ids, logits_to_keep=2).logits
        assert (last - dense[:, -2:]).abs().max() < 1e-4
    assert torch.equal(model(ids).logits, dense)  # and all is undone


@torch.no_grad()
def test_it_keeps_and_sees_what_the_reference_does(model, heads) -> None:
    """Layer 0's inputs do not depend on evictions: its output and choice are the reference's."""
    ids = tokens(1, 61)
    seen: dict = {}

    def attend(call):
        if call.layer == 0:
            seen["call"] = call
        return torch.nn.functional.scaled_dot_product_attention(
            call.q, call.k, call.v, is_causal=True, enable_gqa=True
        )

    with exchanged(model, attend):
        model(input_ids=ids, use_cache=False)
    call = seen["call"]
    config = LocretConfig(budget=16, chunk=8, stabilisers=4, local=0, sinks=2, positions="original")
    scores = heads.layers[0](call.hidden)
    expected = chunked_prefill(call.q, call.k, call.v, scores, config)
    outs: list[torch.Tensor] = []
    first = model.model.layers[0].self_attn.o_proj
    handle = first.register_forward_pre_hook(lambda m, args: outs.append(args[0]))
    cache = prefill(model, heads, ids, config)
    handle.remove()
    assert (torch.cat(outs, 1) - expected.out.transpose(1, 2).flatten(2)).abs().max() < 1e-5
    for head in range(2):
        assert cache.kept()[0][0, head].tolist() == expected.kept[0][head].tolist()
    assert cache.peak == expected.peak == 24


@torch.no_grad()
@pytest.mark.parametrize("scorer", ["heads", "both", *SCORERS])
@pytest.mark.parametrize("positions", ["contiguous", "original"])
def test_rows_give_what_they_give_alone(model, heads, scorer: str, positions: str) -> None:
    config = LocretConfig(budget=16, chunk=8, stabilisers=4, local=5, sinks=2, positions=positions)
    kind = {"heads": heads, "both": HeadsAndKeyDiff(heads)}.get(scorer, scorer)
    ids, mask = tokens(3, 60), torch.ones(3, 60, dtype=torch.long)
    mask[1, :23] = 0  # left
    mask[2, :57] = 0  # shorter than anything
    options = {"max_new_tokens": 30, "do_sample": False}
    found = generate(model, kind, ids, config, attention_mask=mask, **options)
    again = generate(model, kind, ids, config, attention_mask=mask, **options)
    assert torch.equal(found, again)
    for row, start in enumerate((0, 23, 57)):
        alone = generate(model, kind, ids[row : row + 1, start:], config, **options)
        assert torch.equal(found[row : row + 1], alone)


@torch.no_grad()
def test_right_padding_changes_neither_logits_nor_choice(model, heads) -> None:
    ids, mask = tokens(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[1, 31:] = 0
    with locret(model, heads, SMALL):
        both = model(input_ids=ids, attention_mask=mask, past_key_values=LocretCache(SMALL))
        alone = model(input_ids=ids[1:, :31], past_key_values=LocretCache(SMALL))
    assert (both.logits[1, :31] - alone.logits[0]).abs().max() < 1e-4
    assert not both.logits[1, 31:].any()
    for padded, single in zip(
        both.past_key_values.kept(), alone.past_key_values.kept(), strict=True
    ):
        for head in range(2):
            row = padded[1, head]
            assert row[row >= 0].tolist() == single[0, head].tolist()


@torch.no_grad()
@pytest.mark.parametrize("scorer", ["heads", "both", *SCORERS])
def test_no_head_ever_holds_more_than_budget_and_chunk(model, heads, scorer: str) -> None:
    kind, ids = {"heads": heads, "both": HeadsAndKeyDiff(heads)}.get(scorer, scorer), tokens(1, 100)
    cache = LocretCache(SMALL)
    with locret(model, kind, SMALL):
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache,
                       max_new_tokens=120, do_sample=False)  # fmt: skip
    assert cache.peak == 24 and all(
        layer.entries.planes["key"][0].shape[2] == 24 for layer in cache.layers
    )
    assert cache.kv_bytes() <= 2 * 2 * 24 * (16 + 16) * 4
    for positions in cache.kept():
        for head in positions[0]:
            kept = head.tolist()
            assert kept == sorted(set(kept)) and kept[:2] == [0, 1]  # order, and the sinks
            assert kept[-1] == 218  # the last token is read by nobody


@torch.no_grad()
def test_many_questions_of_one_context(model, heads) -> None:
    context, questions = tokens(1, 80), [tokens(1, n, seed=n) for n in (1, 5, 8, 30)]
    cache = prefill(model, heads, context, SMALL)
    held = [p.clone() for p in cache.kept()]
    options = {"max_new_tokens": 12, "do_sample": False}
    answers = [generate(model, heads, q, SMALL, cache=cache, **options) for q in questions]
    again = [generate(model, heads, q, SMALL, cache=cache, **options) for q in reversed(questions)]
    for first, second in zip(answers, reversed(again), strict=True):
        assert first.shape == (1, 12) and torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(held, cache.kept(), strict=True))


@torch.no_grad()
def test_renumbered_keys_are_keys_at_their_new_places(model, heads) -> None:
    """Layer 0: what stays, rotated again from the projections, at places 0, 1, 2 …"""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    ids = tokens(1, 61)
    config = LocretConfig(budget=16, chunk=8, stabilisers=4, local=0)
    cache = prefill(model, heads, ids, config)
    layer, block = cache.layers[0], model.model.layers[0]
    x = block.input_layernorm(model.model.embed_tokens(ids))
    k = block.self_attn.k_proj(x).view(1, 61, 2, 16).transpose(1, 2)
    cos, sin = model.model.rotary_emb(x, torch.arange(16)[None])
    for head in range(2):
        mine = k[:, head : head + 1, layer.positions[0, head, :16].long()]
        expected, _ = apply_rotary_pos_emb(mine, mine, cos, sin)
        assert (layer.all("key")[0, head, :16] - expected[0, 0]).abs().max() < 1e-4


@torch.no_grad()
def test_saved_heads_choose_the_same(model, heads, tmp_path) -> None:
    heads.save(tmp_path)
    ids = tokens(1, 70)
    first = prefill(model, heads, ids, SMALL).kept()
    second = prefill(model, RetainingHeads.load(tmp_path), ids, SMALL).kept()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@torch.no_grad()
def test_one_token_is_a_context(model, heads) -> None:
    found = generate(model, heads, tokens(1, 1), SMALL, max_new_tokens=40, do_sample=False)
    assert found.shape == (1, 40)


@torch.no_grad()
def test_progress_tells_of_the_text_and_not_of_new_tokens(model, heads) -> None:
    config = LocretConfig(budget=16, chunk=8, stabilisers=4)
    read, answered, seen = [], [], tokens(1, 30)
    cache = prefill(model, heads, seen, config, progress=read.append)
    assert read == sorted(read) and len(read) >= 30 // 8 and read[-1] == 1.0
    options = {"max_new_tokens": 5, "do_sample": False, "progress": answered.append}
    generate(model, heads, seen[:, :4], config, cache=cache, **options)
    assert answered == []
    generate(model, heads, seen, config, **options)
    assert answered == read


@torch.no_grad()
def test_with_room_generate_is_transformers(model, heads) -> None:
    ids = tokens(1, 30)
    config = LocretConfig(budget=100, chunk=8, stabilisers=4)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(generate(model, heads, ids, config, **options), expected[:, 30:])


def test_errors_say_what_to_do(model, heads) -> None:
    ids = tokens(1, 30)
    with pytest.raises(ValueError, match="model with heads 6, this one has 4"):
        generate(testbed.tiny("llama"), heads, ids, SMALL)
    with pytest.raises(ValueError, match="one of snapkv, h2o, .*got 'best'"):
        generate(model, "best", ids, SMALL)
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, heads, ids[:, :0], SMALL)
    with locret(model, heads, SMALL):
        with pytest.raises(ValueError, match="input_ids is empty"):
            model(input_ids=ids[:, :0])
        with pytest.raises(ValueError, match="must be a LocretCache, got DynamicCache"):
            model(input_ids=ids, past_key_values=transformers.DynamicCache())
        with pytest.raises(ValueError, match="hides every token"):
            model(input_ids=ids, attention_mask=torch.zeros_like(ids))
        with pytest.raises(ValueError, match=r"attention_mask must be \[1, 30\]"):
            model(input_ids=ids, attention_mask=torch.ones(1, 3))
        with pytest.raises(ValueError, match="call the model with input_ids"):
            model(inputs_embeds=torch.zeros(1, 3, 96))
        cache = model(input_ids=ids).past_key_values
        with pytest.raises(ValueError, match="holds 1 rows, the input has 2"):
            model(input_ids=tokens(2, 3), past_key_values=cache)
    with pytest.raises(ValueError, match="inside `with locret"):
        model(input_ids=ids, past_key_values=LocretCache(SMALL))
    with pytest.raises(ValueError, match="cannot go back"):
        cache.crop(3)
    with pytest.raises(ValueError, match="beams"):
        cache.reorder_cache(torch.zeros(1))
    with pytest.raises(ValueError, match="config must be a LocretConfig"):
        LocretCache(None)
    window = testbed.tiny("mistral", sliding_window=8)
    with pytest.raises(ValueError, match="sliding windows and custom masks are not supported"):
        generate(window, "keynorm", ids, SMALL)
    with pytest.raises(ValueError, match='positions must be one of "contiguous", "original"'):
        LocretConfig(positions="x")
    bad = RetainingHeads.for_model(model, hidden=0)
    bad.layers[1].fc2.bias.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="score is NaN"):
        generate(model, Trained(bad), ids, SMALL)
