"""Token ids against transformers' T5Tokenizer, and refusal of folders that are no T5 tokenizer."""

import random
from pathlib import Path
from typing import Any

import pytest

from cvx_core import FormatError
from cvx_plugins.encoders.tokenizer import (
    ByteTokenizer,
    JsonTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
)

PROMPTS = (
    "",
    " ",
    "\n\t ",
    "A panda plays the guitar.",
    "  two  spaces\tand\na newline ",
    "caf\u00e9 cafe\u0301 \u4f60\u597d \ufb01sh \u3000 wide \u00a0 nbsp",
    "\U0001f600\U0001f600 emoji\U0001f600",
    "\u2581underline\u2581piece",
    "zero\u200bwidth \u202bright",
    "\x00\x01control",
    "x <extra_id_0> y",
    "x<extra_id_0>y <extra_id_99>",
    "<extra_id_1><extra_id_2>  end",
    "<extra_id_10> is not <extra_id_1>0>",
    "<extra_id_100> is none",
    "a </s> b</s>",
    "<pad> <unk> <s> b",
)


@pytest.fixture
def oracle() -> Any:
    return pytest.importorskip("transformers").T5Tokenizer


def fuzz(count: int) -> list[str]:
    chars = random.Random(0)
    alphabet = "abc APanda,. \t\n\u00e9\u4f60\u2581\u3000\U0001f600</s>"
    bits = [*alphabet, "the ", "panda", "<extra_id_7>", "</s>", "<pad>", " "]
    return ["".join(chars.choices(bits, k=chars.randrange(1, 30))) for _ in range(count)]


@pytest.mark.parametrize("layout", ["bare_folder", "released_folder"])
def test_ids_are_those_of_transformers(layout: str, oracle: Any, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(layout)
    ours, theirs = load_tokenizer(folder), oracle.from_pretrained(folder)
    assert isinstance(ours, SentencePieceTokenizer)
    assert ours.size == len(theirs)
    for prompt in (*PROMPTS, *fuzz(300)):
        assert ours(prompt) == theirs(prompt).input_ids, repr(prompt)


def test_folder_with_only_tokenizer_json_gives_the_same_ids(
    bare_folder: Path, oracle: Any, tmp_path: Path
) -> None:
    theirs = oracle.from_pretrained(bare_folder)
    theirs.save_pretrained(tmp_path / "fast")
    ours = load_tokenizer(tmp_path / "fast")
    assert isinstance(ours, JsonTokenizer)
    assert ours.size == len(theirs)
    for prompt in PROMPTS:
        assert ours(prompt) == theirs(prompt).input_ids, repr(prompt)


def test_listed_tokens_beside_the_model_count(bare_folder: Path) -> None:
    (bare_folder / "added_tokens.json").write_text('{"<video>": 900}')
    tokenizer = load_tokenizer(bare_folder)
    assert tokenizer("a <video>")[-2:] == [900, 1]
    assert tokenizer.size == 901


def test_tokenizer_without_sentinels_reads_them_as_text(bare_folder: Path) -> None:
    (bare_folder / "tokenizer_config.json").write_text('{"extra_ids": 0}')
    tokenizer = load_tokenizer(bare_folder)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.size == tokenizer.model.get_piece_size()
    assert len(tokenizer("<extra_id_0>")) > 3


def test_bytes_are_shifted_past_the_special_ids() -> None:
    tokenizer = load_tokenizer("bytes")
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer("a\u00e9") == [97 + 3, 0xC3 + 3, 0xA9 + 3, 1]
    assert tokenizer("") == [1]
    assert tokenizer.size == 259


def test_folder_without_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"neither spiece\.model nor tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("file", ["spiece.model", "tokenizer.json"])
def test_damaged_file_is_named(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(b"not a tokenizer")
    with pytest.raises(FormatError, match=file):
        load_tokenizer(tmp_path)


def test_damaged_list_of_added_tokens_is_named(bare_folder: Path) -> None:
    (bare_folder / "added_tokens.json").write_text("{")
    with pytest.raises(FormatError, match=r"added_tokens\.json"):
        load_tokenizer(bare_folder)


def test_model_with_other_special_ids_is_refused(tmp_path: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text to learn from"] * 20),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(FormatError, match="T5 needs"):
        load_tokenizer(tmp_path)
