"""Tokenizers: round trips, streaming, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mom_compile.tokenizer import ByteTokenizer, Tokenizer, TokenizersFile, load_tokenizer

TEXTS = ["plain", "naïve café", "日本語 text", "🙂🙃 emoji 👩‍👩‍👧", "", "a\r\nb\tc\0d"]


@pytest.fixture(scope="module")
def bpe_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(["the text of the tokenizer of the text"] * 3, trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    fast.save(str(path))
    return path


@pytest.fixture(params=["byte", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return ByteTokenizer() if request.param == "byte" else TokenizersFile(request.getfixturevalue("bpe_file"))


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == text
    array, counts = tokenizer.encode_bytes(text)
    assert array.tolist() == ids and array.dtype == counts.dtype == np.int32
    assert counts.sum() == len(text.encode()) and (counts >= 0).all()


@pytest.mark.parametrize("text", TEXTS)
def test_streaming_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    decoder = tokenizer.decoder()
    pieces = [decoder.push(i) for i in tokenizer.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + decoder.flush() == text
    assert decoder.flush() == ""


def test_streaming_of_what_is_no_text() -> None:
    decoder = ByteTokenizer().decoder()
    assert decoder.push(0xE2) == "" and decoder.push(0x82) == ""
    assert decoder.push(ord("x")) == "\ufffdx"
    assert decoder.push(0xC3) == "" and decoder.flush() == "\ufffd"
    assert decoder.push(0xC3) == "" and decoder.push(256) == "\ufffd"


def test_a_stream_of_broken_bytes_is_not_held_back(bpe_file: Path) -> None:
    tokenizer = TokenizersFile(bpe_file)
    half = tokenizer.encode("é")[:1]
    decoder = tokenizer.decoder()
    shown = "".join(decoder.push(half[0]) for _ in range(40))
    assert len(shown) >= 17 and set(shown) == {"\ufffd"}


def test_properties(bpe_file: Path) -> None:
    byte, fast = ByteTokenizer(), TokenizersFile(bpe_file)
    assert (byte.name, byte.vocab_size, byte.eos_token_id) == ("byte", 257, 256)
    assert (fast.name, fast.vocab_size, fast.eos_token_id) == ("tokenizers", fast._tokenizer.get_vocab_size(), 0)
    assert byte.decode([72, 105, 256]) == "Hi" and byte.decode([0xFF]) == "\ufffd"
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 257\), got 257; decode with"):
        byte.decode([257])


def test_loading_from_a_folder(tmp_path: Path, bpe_file: Path) -> None:
    assert load_tokenizer("byte").name == "byte"
    assert load_tokenizer(bpe_file).name == "tokenizers"
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 257}))
    ByteTokenizer().save(tmp_path)
    assert load_tokenizer(tmp_path).name == "byte"
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 300}))
    with pytest.raises(ValueError, match="must hold a tokenizer.json for its vocabulary of 300 entries, got none"):
        load_tokenizer(tmp_path)
    TokenizersFile(bpe_file).save(tmp_path)
    TokenizersFile(tmp_path / "tokenizer.json").save(tmp_path)
    assert load_tokenizer(tmp_path).encode("text") == TokenizersFile(bpe_file).encode("text")


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer must be a tokenizer.json file, got .*no such file exists"):
        load_tokenizer(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer must be a tokenizer.json of the tokenizers package"):
        load_tokenizer(tmp_path / "bad.json")


def test_a_missing_package_is_named(bpe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'tokenizers must be installed.*pip install "mom-compile\[train\]"'):
        TokenizersFile(bpe_file)


def test_importing_it_loads_neither_torch_nor_tokenizers() -> None:
    code = "import sys, mom_compile.tokenizer, mom_compile.data; assert not {'torch', 'tokenizers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
