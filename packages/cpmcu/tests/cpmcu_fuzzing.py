"""Damaged model files by the thousand: each loads and runs, or is refused with a clear error.

    python packages/cpmcu/tests/cpmcu_fuzzing.py --count 40000      (make fuzz)

Files are tried in a child process, so that a crash or a hang of native code is an outcome like any
other: the file that did it is kept, and its seed printed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

LIMIT = 30.0  # seconds that one file may take
# What may be damaged, and how far into it structure reaches.
TARGETS = {
    "model.safetensors": ("plain", 2_500),
    "config.json": ("plain", 2_500),
    "tokenizer.json": ("plain", 4_000),
    "tokenizer_config.json": ("plain", 400),
    "generation_config.json": ("plain", 200),
    "model-00002-of-00003.safetensors": ("quantised", 3_000),
    "model.safetensors.index.json": ("quantised", 3_000),
    "quantised config.json": ("quantised", 2_500),
    "q4.gguf": ("gguf", 12_000),
    "q8.gguf": ("gguf", 12_000),
    "q4_1.gguf": ("gguf", 12_000),
}


def mutate(data: bytes, generator: random.Random, header: int) -> bytes:
    """A few random faults, most of them in the first `header` bytes, where all structure is."""
    data = bytearray(data)
    for _ in range(generator.choice([1, 1, 2, 5])):
        at = generator.randrange(min(header, len(data)) if generator.random() < 0.9 else len(data))
        match generator.randrange(7):
            case 0:
                data[at] ^= 1 << generator.randrange(8)
            case 1:
                data[at] = generator.choice([0, 1, 0x7F, 0x80, 0xFF, ord("-"), ord("9"), ord('"')])
            case 2:
                data[at : at + 8] = generator.choice([0, 1, 2**31, 2**63, 2**64 - 1]).to_bytes(
                    8, "little"
                )
            case 3:
                del data[at : at + generator.randrange(1, 40)]
            case 4:
                data[at:at] = generator.randbytes(generator.randrange(1, 40))
            case 5:
                del data[at + generator.randrange(200) :]
            case 6:  # a piece of itself elsewhere: valid structure in the wrong place
                piece = data[at : at + generator.randrange(1, 60)]
                to = generator.randrange(min(header, len(data)))
                data[to : to + len(piece)] = piece
        if not data:
            break
    return bytes(data)


HOSTILE = (
    None, True, -1, 0, 1, 3, 7, 64, 255, 2**31, 2**53, 2**63, 2**64, -(2**63), 0.5, -0.0, 1e308,
    "", "x", "F32", "U8", "F16", "../up", "a" * 5000, [], [0], [[]], {}, {"type": "x"}, [1, 2, 3],
)  # fmt: skip


def damage_json(data: bytes, generator: random.Random) -> bytes:
    """Valid JSON with a few values, or names, replaced, removed, or moved."""
    value = json.loads(data)
    for _ in range(generator.choice([1, 1, 1, 2, 4])):
        places = []  # containers and keys

        def walk(node, places=places):
            for key in node if isinstance(node, dict) else range(min(len(node), 50)):
                places.append((node, key))
                if isinstance(node[key], dict | list):
                    walk(node[key])

        walk(value)
        if not places:
            break
        node, key = generator.choice(places)
        other, another = generator.choice(places)
        match generator.randrange(5):
            case 0 | 1:
                node[key] = generator.choice(HOSTILE)
            case 2:
                del node[key]
            case 3:
                node[key] = json.loads(json.dumps(other[another]))
            case 4 if isinstance(node, dict):
                node[key + generator.choice("0.xé")] = node.pop(key)
    return json.dumps(value).encode()


def damage(data: bytes, name: str, generator: random.Random, header: int) -> bytes:
    """Random bytes, or half of the time hostile values in a valid structure."""
    if generator.random() < 0.5 or name.endswith(".gguf"):
        return mutate(data, generator, header)
    if name.endswith(".json"):
        return damage_json(data, generator)
    length = int.from_bytes(data[:8], "little")
    changed = damage_json(data[8 : 8 + length], generator)
    return len(changed).to_bytes(8, "little") + changed + data[8 + length :]


def survives(path: Path) -> bool:
    """Load and run; True if it worked, False if it was refused properly. Anything else raises."""
    from cpmcu import Engine

    try:
        engine = Engine.from_pretrained(path, dtype="float32", threads=1)
        engine.generate(token_ids=[1, 2, 3], max_new_tokens=2)
        if engine.tokenizer is not None:
            engine.generate("ab c", max_new_tokens=1)
            if engine.tokenizer.template is not None:
                engine.generate(messages=[{"role": "user", "content": "x"}], max_new_tokens=1)
    except (ValueError, FileNotFoundError) as error:
        assert str(error)
        return False
    return True


def make_models(folder: Path) -> None:
    """The undamaged ones: a folder, one of codes, and two GGUF files."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from cpmcu._fields import Fields
    from cpmcu.convert import convert
    from cpmcu.quantise import quantise
    from cpmcu.spec import from_config
    from cpmcu.tokenizer import byte_characters

    plain = folder / "plain"
    plain.mkdir(parents=True)
    config = {
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 264,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "bos_token_id": 257,
        "eos_token_id": 258, "tie_word_embeddings": True,
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "llama3", "factor": 8.0,
                            "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                            "original_max_position_embeddings": 128},
    }  # fmt: skip
    (plain / "config.json").write_text(json.dumps(config, indent=1))
    (plain / "generation_config.json").write_text(
        '{"eos_token_id": [258, 259], "bos_token_id": 257}'
    )
    generator = torch.Generator().manual_seed(0)
    spec = from_config(Fields(config, "config.json"))
    save_file(
        {
            f"model.{n}": torch.randn(s, generator=generator) * 0.1
            for n, s in spec.tensors().items()
        },
        plain / "model.safetensors",
    )
    vocabulary = {c: b for b, c in byte_characters().items()} | {"ab": 256}
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens(["<s>", "</s>", "<|end|>", "<pad>"])
    words.save(str(plain / "tokenizer.json"))
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    (plain / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": template})
    )
    quantise(plain, folder / "quantised", method="rtn", bits=4, group=32)
    (folder / "gguf").mkdir()
    for name, kind in (("q4", "Q4_0"), ("q8", "Q8_0"), ("q4_1", "Q4_1")):
        convert(plain, folder / f"gguf/{name}.gguf", kind)


def examples(models: Path, work: Path, target: str, seeds: range):
    """Yield (seed, path to load, the damaged file) for each seed."""
    kind, header = TARGETS[target]
    name = target.split()[-1]
    folder = work / kind
    if not folder.exists():
        shutil.copytree(models / kind, folder)
    file = folder / name
    original = (models / kind / name).read_bytes()
    for seed in seeds:
        generator = random.Random(f"{target} {seed}")
        file.unlink(missing_ok=True)  # a new inode: an earlier engine may still map the old one
        file.write_bytes(damage(original, name, generator, header))
        yield seed, file if kind == "gguf" else folder, file
    file.unlink(missing_ok=True)
    file.write_bytes(original)


def attempt(models: Path, work: Path, target: str, seeds: range, pipe) -> None:
    """In the child: tell of every file before it is tried, and how it ended."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import logging

    logging.disable(logging.CRITICAL)
    for seed, path, _ in examples(models, work, target, seeds):
        pipe.send((seed, "begun", ""))
        try:
            pipe.send((seed, "works" if survives(path) else "refused", ""))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is a finding
            pipe.send((seed, "wrong error", f"{type(error).__name__}: {error}"))


def fuzz(count: int, first: int, keep: Path) -> int:
    """Try `count` files of each target's share; the number of findings."""
    findings, tally = [], Counter()
    share = -(-count // len(TARGETS))
    with tempfile.TemporaryDirectory() as scratch:
        models = Path(scratch) / "models"
        make_models(models)
        for target in TARGETS:
            seeds, start = range(first, first + share), time.perf_counter()
            while seeds:
                work = Path(tempfile.mkdtemp(dir=scratch))
                ours, theirs = multiprocessing.Pipe()
                child = multiprocessing.get_context("fork").Process(
                    target=attempt, args=(models, work, target, seeds, theirs)
                )
                child.start()
                theirs.close()
                seed, state, detail = seeds[0], "begun", ""
                while True:
                    try:
                        if not ours.poll(LIMIT):
                            state, detail = "hang", f"no end in {LIMIT:.0f} s"
                            break
                        seed, state, detail = ours.recv()
                    except EOFError:
                        if state == "begun":
                            child.join()
                            state, detail = "crash", f"exit code {child.exitcode}"
                        break
                    if state == "begun":
                        continue
                    tally[state] += 1
                    if state == "wrong error":
                        findings.append((target, seed, detail))
                if state in ("crash", "hang"):
                    child.kill()
                    tally[state] += 1
                    findings.append((target, seed, f"{state}: {detail}"))
                child.join()
                for known in (f for f in findings if f[:2] == (target, seed)):
                    keep.mkdir(parents=True, exist_ok=True)
                    for _, _, file in examples(models, work, target, range(seed, seed + 1)):
                        shutil.copyfile(file, keep / f"{known[1]}-{file.name}")
                seeds = range(seed + 1, seeds.stop)
                shutil.rmtree(work, ignore_errors=True)
            seconds = time.perf_counter() - start
            print(f"{target}: {share} files, {seconds:.0f} s; so far {dict(tally)}", flush=True)
    for target, seed, detail in findings:
        print(f"FOUND {target}, seed {seed}: {detail[:300]}")
    return len(findings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=40_000, help="files in all")
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"), help="for what was found")
    given = parser.parse_args()
    sys.exit(1 if fuzz(given.count, given.first, given.keep) else 0)
