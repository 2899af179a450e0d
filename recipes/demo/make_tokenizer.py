"""Make the demo's tokenizer: a sentencepiece model that knows the captions' words.

python recipes/demo/make_tokenizer.py recipes/demo/model/tokenizer
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import sentencepiece
from shapes import COMBINATIONS, caption

from cvx_io.atomic import atomic_file

VOCABULARY = 64


def main() -> None:
    """Train on the captions; ids 0, 1 and 2 are padding, end and unknown, as in T5."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(caption(*combination) for combination in COMBINATIONS),
        model_writer=model,
        model_type="word",
        vocab_size=VOCABULARY,
        hard_vocab_limit=False,
        use_all_vocab=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    with atomic_file(Path(sys.argv[1]) / "spiece.model") as partial:
        partial.write_bytes(model.getvalue())


if __name__ == "__main__":
    main()
