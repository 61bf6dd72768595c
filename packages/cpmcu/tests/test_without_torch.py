"""The CPU backend in a process that cannot import PyTorch: the same text as in one that can.

What runs there is `cpmcu_without_torch.py`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import testbed
from cpmcu import Engine, cpu_library, cpu_ternary
from cpmcu.convert import convert
from cpmcu.quantise import quantise
from cpmcu.tokenizer import byte_characters

pytestmark = pytest.mark.skipif(cpu_library.kernels()[0] is None, reason="no kernels")
PROGRAM = Path(__file__).parent / "cpmcu_without_torch.py"
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
SPARSE = {"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "init_blocks": 1,
          "window_size": 32, "topk": 2, "dense_len": 64}  # fmt: skip


def without_torch(*jobs):
    """Each job, (model, options), in one process that refuses PyTorch."""
    command = [sys.executable, str(PROGRAM), json.dumps([(str(m), o) for m, o in jobs])]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory):
    """A tiny model with a tokenizer of bytes and a chat template."""
    out = tmp_path_factory.mktemp("words")
    for file in tiny_folder("llama", rope_theta=9000.0)[1].iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    vocabulary = {c: i for i, c in enumerate(byte_characters().values())}
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.save(str(out / "tokenizer.json"))
    (out / "chat_template.jinja").write_text(TEMPLATE)
    return out


def wanted(path, options):
    """What the program does, in this process, where PyTorch is."""
    sys.path.insert(0, str(PROGRAM.parent))
    import cpmcu_without_torch

    return json.loads(json.dumps(cpmcu_without_torch.answer(str(path), options)))


def test_text_is_the_same_without_it(folder, tiny_folder, ternary_folder, to_gguf, tmp_path):
    jobs = [
        (folder, {"dtype": kind, "quant": quant, **more})
        for kind, quant, more in (
            ("float32", "float32", {}), ("bfloat16", "bfloat16", {}), ("bfloat16", "int8", {}),
            ("float32", "int4", {"kv": "int8"}), ("bfloat16", "int4", {"sparse": SPARSE}),
        )
    ]  # fmt: skip
    for bits in (4, 8):
        quantise(folder, tmp_path / f"int{bits}", method="rtn", bits=bits, group=64)
        jobs.append((tmp_path / f"int{bits}", {}))
        jobs.append((tmp_path / f"int{bits}", {"quant": "float32", "dtype": "float32"}))
    model, _ = tiny_folder("llama", rope_theta=9000.0)
    for kind in ("F32", "F16", "BF16", "Q4_0", "Q8_0", "Q4_1"):
        file = to_gguf(model, tmp_path / f"{kind}.gguf", "llama", kind=GGMLQuantizationType[kind])
        jobs.append((file, {}))
    if cpu_ternary.is_supported()[0]:
        import bitcpm

        dense = tmp_path / "dense"
        dense.mkdir()
        ternary_folder("qwen2", dense, 32)
        bitcpm.pack_model(dense, tmp_path / "packed")
        convert(dense, tmp_path / "ternary.gguf", "BF16")
        jobs.append((tmp_path / "ternary.gguf", {"quant": "ternary"}))
        jobs += [(dense, {"quant": "ternary"}), (tmp_path / "packed", {}),
                 (tmp_path / "packed", {"quant": "int8"})]  # fmt: skip
    for job, got in zip(jobs, without_torch(*jobs), strict=True):
        assert got == wanted(*job), job


def test_smollm2_talks(smollm2_folder):
    jobs = [(testbed.smollm2_gguf(), {"quant": "int8"}), (smollm2_folder, {"quant": "int4"})]
    answers = without_torch(*jobs)
    assert [got == wanted(*job) for job, got in zip(jobs, answers, strict=True)] == [True, True]
    assert all(got["score"] < 0 and got["chat"] for got in answers)


def test_what_needs_it_names_the_extra(folder, tmp_path):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from cpmcu import Engine, plan\n"
        "from cpmcu.quantise import quantise\n"
    )
    asked = {
        f"Engine.from_pretrained({str(folder)!r}, backend='reference')": "backend 'reference': ",
        f"Engine.from_pretrained({str(folder)!r}).prefill([1])": "",
        f"Engine.from_pretrained({str(folder)!r}).dtype": "",
    }
    for expression, start in asked.items():
        program = code.replace("from cpmcu.quantise import quantise\n", "") + expression
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        last = run.stderr.strip().splitlines()[-1]
        assert last.startswith(f"ImportError: {start}this needs PyTorch, which is not installed")
        assert "minicpm4-cpmcu[torch]" in last
    for arguments in (("quantize", folder, "-o", tmp_path / "q", "--method", "rtn"), ("selfcheck",),
                      ("convert", folder, "-o", tmp_path / "c.gguf")):  # fmt: skip
        command = "import sys; sys.modules['torch'] = None; from cpmcu.cli import main; main()"
        run = subprocess.run([sys.executable, "-c", command, *map(str, arguments)],
                             capture_output=True, text=True)  # fmt: skip
        assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
        assert "minicpm4-cpmcu[torch]" in run.stderr
    shown = subprocess.check_output(
        [sys.executable, "-c", command, "generate", str(folder), "--prompt", "ab", "-n", "3",
         "--json"], text=True,
    )  # fmt: skip
    assert len(json.loads(shown)["token_ids"]) == 3


def test_importing_brings_none_of_the_heavy_ones():
    code = (
        "import sys, cpmcu; from cpmcu import Engine, Session, Stream, Plan, Tokenizer\n"
        "import cpmcu.engine, cpmcu.cpu_backend, cpmcu.cli\n"
        "heavy = {'torch', 'transformers', 'triton', 'gguf', 'jinja2', 'tokenizers', 'psutil'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_a_seed_draws_the_same_for_any_backend_and_threads(folder, monkeypatch):
    monkeypatch.setattr("cpmcu.threads.cores", lambda: 8)
    texts = {
        tuple(
            Engine.from_pretrained(folder, dtype="float32", **options)
            .generate("ab", max_new_tokens=12, temperature=0.9, top_p=0.9, seed=-3)
            .token_ids
        )
        for options in ({"threads": 1}, {"threads": 3}, {"backend": "reference"})
    }
    assert len(texts) == 1
    engine = Engine.from_pretrained(folder, dtype="float32")
    drawn = [engine.generate("ab", max_new_tokens=12, temperature=0.9, seed=s) for s in (3, -3)]
    assert drawn[0].token_ids != drawn[1].token_ids
    assert torch.is_tensor(engine.logits([1, 2]))
