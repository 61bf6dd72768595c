"""Load, generate, score and talk on the CPU backend; as a program, where PyTorch is refused.

    python cpmcu_without_torch.py '[[MODEL, {OPTION OF from_pretrained: VALUE, ...}], ...]'

Prints one JSON object for each model.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory


class Refused:
    """A finder that lets nobody import PyTorch, nor what would bring it."""

    def find_spec(self, name, path=None, target=None):
        """As importlib asks for it."""
        if name.partition(".")[0] in ("torch", "transformers", "triton"):
            raise AssertionError(f"{name} is imported")


def answer(model: str, options: dict) -> dict:
    """What the engine says; as JSON."""
    from cpmcu import Engine, SparseAttention

    if isinstance(options.get("sparse"), dict):
        options = options | {"sparse": SparseAttention(**options["sparse"])}
    engine = Engine.from_pretrained(model, backend="cpu", max_context=256, **options)
    ids = [(7 * i + 3) % 250 + 1 for i in range(90)]
    said = {
        "quant": engine.quant,
        "greedy": engine.generate(token_ids=ids, max_new_tokens=12).token_ids,
        "drawn": engine.generate(
            token_ids=ids, max_new_tokens=12, temperature=0.8, top_k=40, top_p=0.95, min_p=0.01,
            repetition_penalty=1.1, seed=5,
        ).token_ids,
    }  # fmt: skip
    with TemporaryDirectory() as folder:
        engine.save(Path(folder) / "session")
        other = engine.session()
        other.restore(Path(folder) / "session")
        said["restored"] = other.generate(token_ids=[*engine.tokens, 9], max_new_tokens=4).token_ids
    if engine.tokenizer is not None:
        said["text"] = engine.generate("Water boils", max_new_tokens=8).text
        said["score"] = engine.score(["Water boils at 100 degrees."])[0].log_likelihood
        messages = [{"role": "user", "content": "Hi"}]
        said["chat"] = engine.generate(messages=messages, max_new_tokens=8, stop=["zzz"]).text
    return said


if __name__ == "__main__":
    sys.meta_path.insert(0, Refused())
    for path, given in json.loads(sys.argv[1]):
        print(json.dumps(answer(path, given)))
    assert "torch" not in sys.modules
