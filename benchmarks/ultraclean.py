"""ultraclean's collapsed scorer against fastText's own prediction, on real text.

Both score the same normalised passages on one thread. The peer is handed a list, its fastest way.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import fasttext
import numpy as np
from harness import Case, main

import testbed
import ultraclean
from ultraclean.library import predict


def cases() -> list[Case]:
    """One case for each width: the collapsed table does not depend on it, the model does."""
    good = [
        d.text[i : i + 2000] for d in testbed.corpus("wikipedia") for i in range(0, 20000, 2000)
    ]
    poor = [d.text[:2000] for d in testbed.corpus("wiki_markup")]
    good, poor = ([t for t in texts if len(t) > 500] for texts in (good, poor))
    found = []
    for dim in (64, 256):
        folder = Path(tempfile.mkdtemp()) / "classifier"
        config = ultraclean.ClassifierConfig(dim=dim, bucket=2_000_000, epochs=1, threads=2)
        classifier = ultraclean.train(good, poor, config, folder)
        library = fasttext.load_model(str(folder / "model.bin"))
        texts = [" ".join(classifier.normaliser(t).split()) for t in (good + poor)[:1000]]
        words = sum(len(t.split()) for t in texts)

        def ours(classifier=classifier, texts=texts) -> np.ndarray:
            return classifier.scorer.score(texts)

        def peer(library=library, texts=texts) -> list:
            return library.predict(texts, k=2)

        def check(scores, _, library=library, texts=texts) -> None:
            wanted = predict(library, texts)
            assert np.abs(scores - wanted).max() < 1e-5, "the collapsed scores differ"

        name = f"score {len(texts)} passages, dim {dim}, 3-grams, 2M buckets"
        found.append(Case(name, "words/s", words, ours, peer, "fasttext predict(list)", check))
    return found


if __name__ == "__main__":
    main("ultraclean", cases())
