"""Tokenizers: bytes, or a tokenizer.json. Importing this file needs numpy alone."""

from __future__ import annotations

import codecs
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ._extras import require
from .run_folder import model_folder

BYTE_VOCAB_SIZE = 257
TOKENIZER_FILE = "tokenizer.json"
END_TOKENS = ("</s>", "<|endoftext|>", "<eos>")
# "�" at the end of a decoded text: its last token may be the first half of a character.
_REPLACEMENT = "\ufffd"
# A token that never becomes a whole character must not hold the stream back for ever.
_MAX_PENDING = 16


class Decoder(Protocol):
    """Turns a stream of ids into text, never half a character."""

    def push(self, token_id: int) -> str:
        """The text that one more id completes, possibly empty."""

    def flush(self) -> str:
        """What is left at the end of the stream; the decoder starts anew."""


class Tokenizer(Protocol):
    """What training, evaluation and generation need of a tokenizer.

    Attributes:
        name: ``byte`` or ``tokenizers``.
        vocab_size: ids lie in [0, vocab_size).
        eos_token_id: end-of-text id, or None.
    """

    @property
    def name(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_id(self) -> int | None: ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without end-of-text."""

    def encode_bytes(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Token ids ``[n]`` int32 and the UTF-8 bytes of the text that each stands for ``[n]`` int32.

        The bytes sum to those of the text.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; end-of-text is left out, what is no character becomes U+FFFD."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write what :func:`load_tokenizer` needs into an existing folder."""

    def decoder(self) -> Decoder:
        """An incremental decoder for streaming."""


class ByteTokenizer:
    """UTF-8 bytes 0 to 255 and end-of-text, 256."""

    name = "byte"
    vocab_size = BYTE_VOCAB_SIZE
    eos_token_id: int | None = 256

    def encode(self, text: str) -> list[int]:
        """As :meth:`Tokenizer.encode`."""
        return list(text.encode("utf-8"))

    def encode_bytes(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """As :meth:`Tokenizer.encode_bytes`."""
        ids = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)
        return ids, np.ones_like(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """As :meth:`Tokenizer.decode`.

        Raises:
            ValueError: an id outside [0, 257).
        """
        return bytes(value for value in map(_check_byte, ids) if value < 256).decode("utf-8", errors="replace")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Nothing to write: a vocabulary of 257 entries means bytes."""

    def decoder(self) -> Decoder:
        """As :meth:`Tokenizer.decoder`."""
        return _ByteDecoder()


class _ByteDecoder:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        value = _check_byte(token_id)
        return self._decoder.decode(bytes([value])) if value < 256 else self.flush()

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


def _check_byte(token_id: int) -> int:
    value = int(token_id)
    if not 0 <= value < BYTE_VOCAB_SIZE:
        raise ValueError(f"ids must lie in [0, {BYTE_VOCAB_SIZE}), got {value}; decode with the model's own tokenizer")
    return value


class TokenizersFile:
    """A ``tokenizer.json`` of the ``tokenizers`` package.

    Args:
        path: the file.

    Raises:
        ImportError: the package is missing.
        ValueError: no such file, or one that the package cannot read.
    """

    name = "tokenizers"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"tokenizer must be a tokenizer.json file, got {str(path)!r}; no such file exists")
        tokenizers = require("tokenizers", "train")
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(self.path))
        except Exception as error:  # the package raises plain Exception
            raise ValueError(
                f"tokenizer must be a tokenizer.json of the tokenizers package, got {str(path)!r}: {error}; "
                "save one with Tokenizer.save"
            ) from error
        self.vocab_size = int(self._tokenizer.get_vocab_size(with_added_tokens=True))
        ends = (self._tokenizer.token_to_id(token) for token in END_TOKENS)
        self.eos_token_id: int | None = next((token for token in ends if token is not None), None)

    def encode(self, text: str) -> list[int]:
        """As :meth:`Tokenizer.encode`."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_bytes(self, text: str) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """As :meth:`Tokenizer.encode_bytes`: a token takes the bytes up to its end, the last one all that is left."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        if not len(ids):
            return ids, ids.copy()
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
        position = np.concatenate([np.zeros(1, np.int64), widths.cumsum()])
        ends = np.maximum.accumulate(position[[stop for _, stop in encoding.offsets]])
        ends[-1] = position[-1]
        return ids, np.diff(ends, prepend=0).astype(np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """As :meth:`Tokenizer.decode`."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Copy the file as ``tokenizer.json``."""
        target = Path(folder) / TOKENIZER_FILE
        if not (target.exists() and target.samefile(self.path)):
            shutil.copyfile(self.path, target)

    def decoder(self) -> Decoder:
        """As :meth:`Tokenizer.decoder`."""
        return _PrefixDecoder(self)


class _PrefixDecoder:
    """Emits what a new id adds to the text of the ids since the last whole character."""

    def __init__(self, tokenizer: TokenizersFile) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # ids before it are context: a leading space depends on what came before
        self._shown = ""

    def push(self, token_id: int) -> str:
        self._ids.append(int(token_id))
        text = self._tokenizer.decode(self._ids)
        pending = len(self._ids) - self._start
        if text.endswith(_REPLACEMENT) and pending <= _MAX_PENDING:
            return ""
        return self._emit(text)

    def flush(self) -> str:
        text = self._emit(self._tokenizer.decode(self._ids))
        self._ids, self._start, self._shown = [], 0, ""
        return text

    def _emit(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._ids = self._ids[self._start :]
        self._start = len(self._ids)
        self._shown = self._tokenizer.decode(self._ids)
        return new


def load_tokenizer(source: str | os.PathLike[str], vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer of a name, a file or a folder.

    Args:
        source: ``byte``, a ``tokenizer.json`` file, or the folder of a checkpoint or an artifact. A folder's
            ``tokenizer.json`` is used where there is one; without it a vocabulary of 257 entries means bytes.
        vocab_size: of the model; None reads it from the folder's ``config.json`` or ``manifest.json``.

    Raises:
        ValueError: no such file, or a folder whose model has another vocabulary and no tokenizer.json.
        ImportError: ``tokenizers`` is needed and missing.
    """
    if source == "byte":
        return ByteTokenizer()
    path = model_folder(source)
    if not path.is_dir():
        return TokenizersFile(path)
    if (path / TOKENIZER_FILE).is_file():
        return TokenizersFile(path / TOKENIZER_FILE)
    if vocab_size is None:
        vocab_size = _folder_vocab_size(path)
    if vocab_size != BYTE_VOCAB_SIZE:
        raise ValueError(
            f"{path} must hold a {TOKENIZER_FILE} for its vocabulary of {vocab_size} entries, got none; "
            f"copy it there (only a vocabulary of {BYTE_VOCAB_SIZE} means bytes)"
        )
    return ByteTokenizer()


def _folder_vocab_size(folder: Path) -> int | None:
    from ._files import read_json

    if (folder / "manifest.json").is_file():
        return int(read_json(folder / "manifest.json")["config"]["vocab_size"])
    return int(read_json(folder / "config.json").get("vocab_size", 0))
