"""Reading text, splitting it, and drawing windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mom_compile.data import TokenStream, WindowSampler, read_texts, tokenize
from mom_compile.tokenizer import ByteTokenizer


def test_folders_are_read_sorted_and_without_hidden_or_binary_files(tmp_path: Path) -> None:
    for name, content in {
        "b.txt": b"second",
        "a/z.md": b"first",
        ".hidden": b"no",
        ".git/config": b"no",
        "image.png": b"\x89PNG\xff",
        "zeros.bin": b"a\0b",
        "empty.txt": b"",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.warns(UserWarning) as warned:
        assert read_texts([tmp_path]) == ["first", "second"]
    messages = sorted(str(w.message) for w in warned)
    assert "image.png: data must be UTF-8" in messages[0] and "byte 0x89 at offset 0" in messages[0]
    assert messages[1].endswith("zeros.bin: it holds a zero byte, as binary files do") and len(messages) == 2


def test_files_by_name_must_be_text(tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"fine so far \xff")
    with pytest.raises(ValueError, match=r"data must be UTF-8 text, got .*bad.txt' with byte 0xff at offset 12"):
        read_texts([bad])
    with pytest.raises(ValueError, match=r"data must be files or folders that exist, got .*nowhere"):
        read_texts([tmp_path / "nowhere"])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"data must hold text, got none in .*empty.txt'; pass UTF-8 files"):
        read_texts([tmp_path / "empty.txt"])
    with pytest.raises(ValueError, match="data must hold text, got none in no path"):
        read_texts([])


def test_every_document_is_split_at_its_end() -> None:
    data = tokenize(["a" * 90 + "A" * 10, "é" * 40 + "B" * 20], ByteTokenizer(), held_out=0.1)
    train, held_out = bytes(data.train.ids.clip(max=255).tolist()), data.held_out.ids.tolist()
    assert held_out == [65] * 10 + [256] + [66] * 10
    assert data.train.ids[90] == 256 and len(train) == 90 + 1 + 90
    assert data.train.ids.dtype == np.uint16 and data.train.token_bytes.dtype == np.uint8
    assert data.train.num_bytes == 180 and data.held_out.num_bytes == 20
    assert len(tokenize(["text"], ByteTokenizer(), 0).held_out) == 0


def test_the_fingerprint_follows_the_tokens_and_the_split() -> None:
    prints = {
        tokenize(texts, ByteTokenizer(), held_out).fingerprint
        for texts, held_out in (
            (["some text"], 0.2),
            (["some text"], 0.4),
            (["some texT"], 0.2),
            (["some", "text"], 0.2),
        )
    }
    assert len(prints) == 4
    again = tokenize(["some text"], ByteTokenizer(), 0.2).fingerprint
    assert again in prints


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r"held_out must lie in \[0, 0.5\], got 0.9"):
        tokenize(["text"], ByteTokenizer(), 0.9)
    with pytest.raises(ValueError, match="data must hold text, got no token"):
        tokenize([""], ByteTokenizer())
    stream = tokenize(["short"], ByteTokenizer(), 0).train
    with pytest.raises(ValueError, match=r"at least seq_len \+ 1 = 9 training tokens, got 5; .*smaller --seq-len"):
        WindowSampler(stream, 2, 8, 0)


def test_windows_depend_on_seed_and_step_alone() -> None:
    stream = TokenStream(np.arange(1000).astype(np.uint16), np.ones(1000, np.uint8))
    sampler = WindowSampler(stream, 4, 32, seed=3)
    ids, count = sampler.windows(7)
    assert ids.shape == (4, 33) and ids.dtype == np.int64 and count == 4 * 32
    assert (np.diff(ids) == 1).all()
    assert np.array_equal(WindowSampler(stream, 4, 32, seed=3).windows(7)[0], ids)
    assert not np.array_equal(sampler.windows(8)[0], ids)
    assert not np.array_equal(WindowSampler(stream, 4, 32, seed=4).windows(7)[0], ids)


def test_windows_reach_the_first_and_the_last_token() -> None:
    stream = TokenStream(np.arange(9).astype(np.uint16), np.ones(9, np.uint8))
    seen = {int(row[0]) for step in range(20) for row in WindowSampler(stream, 4, 6, 0).windows(step)[0]}
    assert seen == {0, 1, 2}
    assert WindowSampler(stream, 1, 8, 0).windows(0)[0].tolist() == [list(range(9))]
