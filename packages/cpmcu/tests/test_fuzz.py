"""Damaged files: every mutation loads or ends in ValueError or FileNotFoundError, fast."""

from __future__ import annotations

import random
import shutil

import pytest

from cpmcu import Engine

EXAMPLES = 250


def mutate(data, generator, header):
    """A few random faults, most of them in the first `header` bytes, where all structure is."""
    data = bytearray(data)
    for _ in range(generator.choice([1, 1, 2, 5])):
        at = generator.randrange(min(header, len(data)) if generator.random() < 0.9 else len(data))
        match generator.randrange(6):
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
        if not data:
            break
    return bytes(data)


def survives(path):
    """Load and run; True if it worked, False if it was refused properly. Anything else raises."""
    try:
        engine = Engine.from_pretrained(path, dtype="float32", max_context=None)
        engine.generate(token_ids=[1, 2, 3], max_new_tokens=2)
    except (ValueError, FileNotFoundError) as error:
        assert str(error)
        return False
    return True


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_mutated_folder(tiny_folder, tmp_path, name):
    folder = shutil.copytree(tiny_folder("llama")[1], tmp_path / "m")
    original = (folder / name).read_bytes()
    generator = random.Random(name)
    outcomes = []
    for _ in range(EXAMPLES):
        (folder / name).write_bytes(mutate(original, generator, 2_500))
        outcomes.append(survives(folder))
    assert 0 < sum(outcomes) < EXAMPLES  # both kinds were met, so the mutations do reach the checks


def test_mutated_gguf(tiny_folder, to_gguf, tmp_path):
    from gguf import GGMLQuantizationType

    model, _ = tiny_folder("llama")
    path = to_gguf(model, tmp_path / "m.gguf", "llama", kind=GGMLQuantizationType.Q4_0)
    original = path.read_bytes()
    generator = random.Random(3)
    outcomes = []
    for _ in range(EXAMPLES):
        path.unlink()  # a new inode: an earlier engine may still map the old one
        path.write_bytes(mutate(original, generator, 2_500))
        outcomes.append(survives(path))
    assert 0 < sum(outcomes) < EXAMPLES
