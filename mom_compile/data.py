"""Text files as one stream of tokens, its held-out part, and windows drawn by seed and step."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .tokenizer import Tokenizer


def read_texts(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The texts of UTF-8 files and folders.

    Args:
        paths: files, read whatever their name, or folders, read recursively in sorted order without hidden files.

    Returns:
        One text per file that is not empty, in the order of ``paths``.

    Raises:
        ValueError: no such path, a file given by name that is not UTF-8 (with the offset of the byte), or no text.

    A file of a folder that is not UTF-8 text is left out with a warning that names it.
    """
    texts = []
    for item in paths:
        path = Path(item)
        if path.is_dir():
            texts += [text for file in _files(path) if (text := _read_of_folder(file))]
        elif path.exists():
            texts.append(_read(path))
        else:
            raise ValueError(f"data must be files or folders that exist, got {str(path)!r}; check the path")
    texts = [text for text in texts if text]
    if not texts:
        names = ", ".join(repr(str(path)) for path in paths) or "no path"
        raise ValueError(f"data must hold text, got none in {names}; pass UTF-8 files that are not empty")
    return texts


def _files(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _read(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"data must be UTF-8 text, got {str(path)!r} with byte {raw[error.start]:#04x} at offset {error.start}; "
            "convert the file, or leave it out"
        ) from None


def _read_of_folder(path: Path) -> str:
    try:
        text = _read(path)
        reason = "it holds a zero byte, as binary files do" if "\0" in text else None
    except (ValueError, OSError) as error:
        text, reason = "", str(error)
    if reason is None:
        return text
    warnings.warn(f"left out {path}: {reason}", stacklevel=4)
    return ""


@dataclass(frozen=True)
class TokenStream:
    """Tokens and the bytes of text that each stands for.

    Attributes:
        ids: ``[N]`` uint16, int32 for vocabularies beyond 65,536 entries.
        token_bytes: ``[N]`` uint8 or int32; 0 for end-of-text.
    """

    ids: NDArray[np.uint16] | NDArray[np.int32]
    token_bytes: NDArray[np.uint8] | NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_bytes(self) -> int:
        """Bytes of text in the stream."""
        return int(self.token_bytes.sum(dtype=np.int64))


@dataclass(frozen=True)
class TextData:
    """Tokenized text, split in two.

    Attributes:
        train: what windows are drawn from.
        held_out: what models are judged on; empty where ``held_out`` was 0.
        fingerprint: SHA-256 of both, the same for the same files, tokenizer and split.
    """

    train: TokenStream
    held_out: TokenStream
    fingerprint: str


def tokenize(texts: Sequence[str], tokenizer: Tokenizer, held_out: float = 0.05) -> TextData:
    """Tokenize documents and split each of them.

    Args:
        texts: one per document.
        tokenizer: its end-of-text token, if it has one, goes between documents.
        held_out: share of tokens at the end of every document that is held out, in [0, 0.5]. The two parts share no
            token, so no window of training text reaches into what the model is judged on.

    Raises:
        ValueError: ``held_out`` out of range, no token at all, ids beyond the vocabulary.
    """
    if not 0 <= held_out <= 0.5:
        raise ValueError(f"held_out must lie in [0, 0.5], got {held_out}; 0.05 is usual")
    parts: tuple[list[tuple[NDArray[np.int32], NDArray[np.int32]]], ...] = ([], [])
    for text in texts:
        ids, counts = tokenizer.encode_bytes(text)
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
            raise ValueError(
                f"tokenizer must give ids in [0, {tokenizer.vocab_size}), got {int(ids.max())}; its file is damaged"
            )
        cut = len(ids) - int(len(ids) * held_out)
        for part, piece in zip(parts, (slice(None, cut), slice(cut, None)), strict=True):
            if len(ids[piece]):
                part.append((ids[piece], counts[piece]))
    if not parts[0]:
        raise ValueError("data must hold text, got no token; pass UTF-8 files that are not empty")
    train, tail = (_stream(part, tokenizer) for part in parts)
    digest = hashlib.sha256(f"{tokenizer.name} {tokenizer.vocab_size} {len(train)} {len(tail)}".encode())
    for stream in (train, tail):
        digest.update(stream.ids.astype("<i4").tobytes())
    return TextData(train, tail, digest.hexdigest())


def _stream(documents: Sequence[tuple[NDArray[np.int32], NDArray[np.int32]]], tokenizer: Tokenizer) -> TokenStream:
    ids: list[NDArray[np.int32]] = []
    counts: list[NDArray[np.int32]] = []
    end = tokenizer.eos_token_id
    for index, (document, document_bytes) in enumerate(documents):
        if index and end is not None:
            ids.append(np.array([end], np.int32))
            counts.append(np.zeros(1, np.int32))
        ids.append(document)
        counts.append(document_bytes)
    all_ids = np.concatenate(ids) if ids else np.zeros(0, np.int32)
    all_counts = np.concatenate(counts) if counts else np.zeros(0, np.int32)
    small = all_counts.max(initial=0) < 256
    return TokenStream(
        all_ids.astype(np.uint16) if tokenizer.vocab_size <= 65536 else all_ids,
        all_counts.astype(np.uint8) if small else all_counts,
    )


class WindowSampler:
    """Random windows that depend on nothing but the seed and the step, so that a run resumes exactly.

    Args:
        stream: at least seq_len + 1 tokens.
        batch_size: B. seq_len: L, predictions in a window.
        seed: of the whole run.

    Raises:
        ValueError: the text is shorter than one window.
    """

    def __init__(self, stream: TokenStream, batch_size: int, seq_len: int, seed: int) -> None:
        if len(stream) < seq_len + 1:
            raise ValueError(
                f"data must hold at least seq_len + 1 = {seq_len + 1} training tokens, got {len(stream)}; "
                "pass more text, or a smaller --seq-len"
            )
        self.stream, self.batch_size, self.seq_len, self.seed = stream, batch_size, seq_len, seed

    def windows(self, step: int) -> tuple[NDArray[np.int64], int]:
        """The batch of a step: ids ``[B, L+1]`` int64, and the bytes of text that their B * L targets stand for."""
        generator = np.random.default_rng([self.seed, step])
        starts = generator.integers(0, len(self.stream) - self.seq_len, self.batch_size)
        index = starts[:, None] + np.arange(self.seq_len + 1)
        targets = self.stream.token_bytes[index[:, 1:]]
        return self.stream.ids[index].astype(np.int64), int(targets.sum(dtype=np.int64))
