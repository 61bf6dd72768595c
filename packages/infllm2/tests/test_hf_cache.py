"""SparseCache inside transformers: the same tokens and logits as with its own cache."""

from __future__ import annotations

import pytest
import torch

from infllm2 import InfLLMv2Config, sparse

testbed = pytest.importorskip("testbed")
transformers = pytest.importorskip("transformers")

from infllm2.cache import SparseCache  # noqa: E402 - needs transformers


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 250, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("arch", ["llama-gqa3", "qwen2", "qwen3", "mistral", "phi3", "minicpm4"])
@torch.no_grad()
def test_generate_equals_transformers_own_cache(arch: str, small: InfLLMv2Config) -> None:
    model, prompt = testbed.tiny(arch), ids(2, 200)
    settings = {"max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    with sparse(model, small):
        expected = model.generate(prompt, **settings)
        cache = SparseCache(small)
        got = model.generate(prompt, past_key_values=cache, **settings)
    assert torch.equal(got, expected)
    assert cache.get_seq_length() == 239
    keys = cache.layers[-1].store._kernels[None, 0]
    assert keys.length == 239 and keys.fine.shape[2] >= (239 - 8) // 4 + 1


@torch.no_grad()
def test_left_padded_rows(small: InfLLMv2Config) -> None:
    model, prompt = testbed.tiny("llama-gqa3"), ids(3, 180)
    mask = torch.ones_like(prompt)
    mask[1, :37], mask[2, :5] = 0, 0
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with sparse(model, small):
        got = model.generate(
            prompt, attention_mask=mask, past_key_values=SparseCache(small), **settings
        )
        for row, start in enumerate((0, 37, 5)):
            alone = model.generate(prompt[row : row + 1, start:], **settings)
            assert torch.equal(got[row, 180:], alone[0, 180 - start :])


@torch.no_grad()
def test_rejected_tokens_leave_no_trace(small: InfLLMv2Config) -> None:
    model, prompt, draft = testbed.tiny("llama-gqa3"), ids(1, 200), ids(1, 30, seed=1)
    with sparse(model, small):
        expected = model(torch.cat([prompt, draft[:, :3], prompt[:, :9]], 1)).logits[:, -9:]
        cache = SparseCache(small)
        model(prompt, past_key_values=cache)
        model(draft, past_key_values=cache)
        cache.crop(-27)
        got = model(prompt[:, :9], past_key_values=cache).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="minus the number of tokens"):
        cache.crop(3)


@torch.no_grad()
def test_beam_search_and_assisted_generation(small: InfLLMv2Config) -> None:
    model, prompt = testbed.tiny("llama-gqa3"), ids(2, 150)
    beams = {"num_beams": 3, "max_new_tokens": 10, "do_sample": False}
    with sparse(model, small):
        expected = model.generate(prompt, **beams)
        assert torch.equal(
            model.generate(prompt, past_key_values=SparseCache(small), **beams), expected
        )
        plain = model.generate(prompt[:1], max_new_tokens=20, do_sample=False)
        guessed = model.generate(
            prompt[:1], max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=4,
            past_key_values=SparseCache(small),
        )  # fmt: skip
    assert torch.equal(guessed, plain)


@torch.no_grad()
def test_rows_are_repeated_and_selected(small: InfLLMv2Config) -> None:
    model, prompt = testbed.tiny("llama-gqa3"), ids(2, 150)
    with sparse(model, small):
        cache = SparseCache(small)
        model(prompt, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        got = model(prompt[:, :5], past_key_values=cache).logits
        expected = model(torch.cat([prompt[[1, 0]], prompt[:, :5]], 1)).logits[:, -5:]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0


def test_a_cache_of_other_sizes_is_refused(small: InfLLMv2Config) -> None:
    model = testbed.tiny("llama-gqa3")
    with sparse(model, small), pytest.raises(ValueError, match="make it from the same"):
        model(ids(1, 100), past_key_values=SparseCache(InfLLMv2Config()))
    with pytest.raises(ValueError, match="config must be an InfLLMv2Config, got int"):
        SparseCache(3)
