"""From a prompt to T5 token ids: SentencePiece, `tokenizer.json` or bytes. Padding is the encoder's work."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cvx_core import FormatError

PAD, END, UNKNOWN = 0, 1, 2
SENTENCEPIECE_FILE, TOKENIZERS_FILE = "spiece.model", "tokenizer.json"
DEFAULT_EXTRA_IDS = 100


class Tokenizer(Protocol):
    """Turns text into ids that end with END. size: one more than the largest id."""

    size: int

    def __call__(self, text: str) -> list[int]: ...


class ByteTokenizer:
    """UTF-8 bytes, shifted past the three special ids. Source: Xue et al. 2022 (ByT5)."""

    size = 256 + 3

    def __call__(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode()] + [END]


class AddedToken(NamedTuple):
    """Text that is one token by itself, and whether it takes the white space on its left and right."""

    text: str
    id: int
    lstrip: bool = False
    rstrip: bool = False


class SentencePieceTokenizer:
    """A folder with `spiece.model` and, usually, JSON files that list added tokens.

    Gives the ids of transformers' T5Tokenizer: text is cut at added tokens, the pieces between them are
    encoded one by one. Raises FormatError where the model's special ids are not T5's.
    """

    def __init__(self, folder: Path):
        import sentencepiece

        file = folder / SENTENCEPIECE_FILE
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise FormatError(
                f"{file}: not a SentencePiece model ({error}). Is the download complete?"
            ) from error
        special = (self.model.pad_id(), self.model.eos_id(), self.model.unk_id())
        if special != (PAD, END, UNKNOWN):
            raise FormatError(
                f"{file}: ids of padding, end and unknown are {special}; T5 needs {(PAD, END, UNKNOWN)}."
            )
        added = _added_tokens(folder, self.model.get_piece_size())
        added += [AddedToken(self.model.id_to_piece(id), id) for id in special]
        self.added = {token.text: token for token in reversed(added)}
        self.pattern = _pattern(self.added.values())
        self.size = max(self.model.get_piece_size(), *(token.id + 1 for token in added))

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        start = 0
        for match in self.pattern.finditer(text):
            assert match.lastgroup is not None
            ids += [*self.model.encode(text[start : match.start()]), int(match.lastgroup.removeprefix("id"))]
            start = match.end()
        return [*ids, *self.model.encode(text[start:]), END]


class JsonTokenizer:
    """A folder with only the `tokenizer.json` of the tokenizers library."""

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer as Compiled

        file = folder / TOKENIZERS_FILE
        try:
            self.compiled = Compiled.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise FormatError(f"{file}: cannot be read ({error}). Is the download complete?") from error
        self.compiled.no_padding()
        self.compiled.no_truncation()
        self.size = max(self.compiled.get_vocab().values()) + 1
        if (empty := self("")) != [END]:
            raise FormatError(f"{file}: the empty prompt gives ids {empty}; a T5 tokenizer gives {[END]}.")

    def __call__(self, text: str) -> list[int]:
        return list(self.compiled.encode(text).ids)


def load_tokenizer(source: Path | str) -> Tokenizer:
    """Load `bytes` or a folder. Raises FormatError where the folder has no tokenizer."""
    if source == "bytes":
        return ByteTokenizer()
    folder = Path(source)
    if (folder / SENTENCEPIECE_FILE).is_file():
        return SentencePieceTokenizer(folder)
    if (folder / TOKENIZERS_FILE).is_file():
        return JsonTokenizer(folder)
    raise FormatError(
        f"{folder}: has neither {SENTENCEPIECE_FILE} nor {TOKENIZERS_FILE}. Give the tokenizer folder of a "
        "pipeline, usually `tokenizer` beside `text_encoder`."
    )


def _added_tokens(folder: Path, pieces: int) -> list[AddedToken]:
    """Read the added tokens of a folder; without a list, sentinels follow the vocabulary, falling."""
    config = _read_json(folder / "tokenizer_config.json")
    if listed := config.get("added_tokens_decoder"):
        return [
            AddedToken(entry["content"], int(id), entry.get("lstrip", False), entry.get("rstrip", False))
            for id, entry in listed.items()
        ]
    if listed := _read_json(folder / "added_tokens.json"):
        return [AddedToken(text, id) for text, id in listed.items()]
    count = config.get("extra_ids", DEFAULT_EXTRA_IDS)
    return [AddedToken(f"<extra_id_{count - 1 - k}>", pieces + k) for k in range(count)]


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{file}: not JSON ({error}). Is the download complete?") from error
    return content


def _pattern(tokens: Iterable[AddedToken]) -> re.Pattern[str]:
    """Match any added token, the longest first; the group's name tells its id."""
    longest_first = sorted(tokens, key=lambda token: -len(token.text))
    return re.compile("|".join(_expression(token) for token in longest_first))


def _expression(token: AddedToken) -> str:
    left, right = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
    return f"{left}(?P<id{token.id}>{re.escape(token.text)}){right}"
