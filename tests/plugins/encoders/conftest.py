"""A small SentencePiece model with T5's special ids, trained once."""

import io
import json
from pathlib import Path

import pytest

sentencepiece = pytest.importorskip("sentencepiece")

SENTENCES = (
    "A panda plays the guitar in a quiet bamboo forest.",
    "The quick brown fox jumps over the lazy dog near the river bank.",
    "Waves roll onto the beach while a small boat sails towards the horizon.",
    "Caf\u00e9 cr\u00e8me, na\u00efve \u4f60\u597d \u4e16\u754c, \u00fcber 12.5% (slow motion), 4K!",
    "An astronaut walks slowly across the red desert; dust rises behind her.",
)


@pytest.fixture(scope="session")
def spiece() -> bytes:
    """The serialised model."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_writer=model,
        vocab_size=300,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        character_coverage=0.99,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture
def bare_folder(spiece: bytes, tmp_path: Path) -> Path:
    """A tokenizer folder that holds the model alone."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "spiece.model").write_bytes(spiece)
    return folder


@pytest.fixture
def released_folder(spiece: bytes, tmp_path: Path) -> Path:
    """A tokenizer folder laid out as in the released pipelines, with sentinels that swallow white space."""
    folder = tmp_path / "released"
    folder.mkdir()
    (folder / "spiece.model").write_bytes(spiece)
    pieces = sentencepiece.SentencePieceProcessor(model_proto=spiece).get_piece_size()
    sentinels = {f"<extra_id_{99 - k}>": pieces + k for k in range(100)}
    special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    decoder = {
        str(id): {
            "content": text,
            "lstrip": text in sentinels,
            "rstrip": text in sentinels,
            "normalized": False,
            "single_word": False,
            "special": True,
        }
        for text, id in {**special, **sentinels}.items()
    }
    config = {
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(sentinels),
        "clean_up_tokenization_spaces": True,
        "eos_token": "</s>",
        "extra_ids": 100,
        "legacy": True,
        "model_max_length": 226,
        "pad_token": "<pad>",
        "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "added_tokens.json").write_text(json.dumps(sentinels))
    names = {"additional_special_tokens": list(sentinels)}
    names |= {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    return folder
