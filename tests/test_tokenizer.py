"""Tokenizers of checkpoint folders, and text that comes token by token."""

import random
import sys

import pytest

from kvattn.errors import (
    CacheCorruptionError,
    DTypeError,
    KVAttnError,
    MissingFileError,
    MissingLibraryError,
    RangeError,
)
from kvattn.models import TextStream, load_tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is in the extra hf")

TEXT = "Füße, naïve 東京 🙂🇩🇪 e\u0301 \u200bdone.\n\ttabs"


def byte_level():
    """GPT-2's kind: 256 symbols of one byte, a few merges that end within characters, one special token."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ã", "¼"), ("Ġ", "n"), ("ð", "Ł"), ("æ", "Ŀ")]  # the last two: half of an emoji, two thirds of 東
    vocab = {symbol: i for i, symbol in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


def byte_fallback():
    """Llama's kind: ▁ for spaces, bytes for what is not in the vocabulary, the text's first space taken away."""
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.,"]
    merges = [("▁", "n"), ("o", "n")]
    vocab = {piece: i for i, piece in enumerate([*pieces, *(a + b for a, b in merges)])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


KINDS = {"bytes": byte_level, "fallback": byte_fallback}


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return KINDS[request.param]()


def check_stream(stream, tokenizer, ids):
    """The parts are the whole, no part has half a character, and nothing waits longer than it must."""
    parts, whole = [], ""
    for i in range(len(ids)):
        parts.append(stream.push(ids[i]))
        whole = max(whole, tokenizer.decode(ids[: i + 1]).rstrip("\ufffd"), key=len)
        assert "".join(parts) == whole, i
    parts.append(stream.finish())
    assert "".join(parts) == tokenizer.decode(ids)


def test_text_comes_in_whole_characters(tokenizer):
    ids = tokenizer.encode(TEXT).ids
    assert tokenizer.decode(ids) == TEXT
    assert len(ids) > len(TEXT)  # characters of several tokens
    check_stream(TextStream(tokenizer), tokenizer, ids)


def test_special_tokens(tokenizer):
    end = tokenizer.token_to_id("<end>")
    ids = [end, *tokenizer.encode("one").ids, end, end, *tokenizer.encode(" née").ids, end]
    check_stream(TextStream(tokenizer), tokenizer, ids)
    stream = TextStream(tokenizer, skip_special_tokens=False)
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids, skip_special_tokens=False)
    assert "<end>" in tokenizer.decode(ids, skip_special_tokens=False)


def test_what_is_cut_off_comes_at_the_end(tokenizer):
    ids = tokenizer.encode("a 🙂").ids
    stream = TextStream(tokenizer)
    parts = [stream.push(token) for token in ids[:-1]]
    assert "".join(parts) == "a "
    rest = stream.finish()
    assert rest and set(rest) == {"\ufffd"}
    check_stream(stream, tokenizer, ids)  # the stream begins anew
    assert stream.finish() == ""


def test_bytes_that_are_no_text():
    """Random bytes: only what may become text is held back, and in the end all is as decoded at once."""
    tokenizer, rng = byte_level(), random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(260) for _ in range(40)]
        stream = TextStream(tokenizer)
        parts = []
        for i in range(len(ids)):
            parts.append(stream.push(ids[i]))
            assert "".join(parts) == tokenizer.decode(ids[: i + 1]).rstrip("\ufffd")
        assert "".join(parts) + stream.finish() == tokenizer.decode(ids)


def test_long_texts_are_not_decoded_again_and_again(tokenizer):
    longest = 0

    class Counting:
        def decode(self, ids, skip_special_tokens=True):
            nonlocal longest
            longest = max(longest, len(ids))
            return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    ids = tokenizer.encode(TEXT * 20).ids
    stream = TextStream(Counting())
    assert "".join(map(stream.push, ids)) + stream.finish() == TEXT * 20
    assert longest <= 16


class Eager(TextStream):
    """Holds nothing back."""

    def push(self, token):
        return self._tokenizer.decode([token])


class Forgetful(TextStream):
    """Decodes without what came before."""

    def push(self, token):
        text = super().push(token)
        if text:
            self._context, self._new, self._returned = [], [], 0
        return text


class Late(TextStream):
    """Holds back one token too many."""

    waiting = ""

    def push(self, token):
        self.waiting, text = super().push(token), self.waiting
        return text

    def finish(self):
        return self.waiting + super().finish()


@pytest.mark.parametrize("fault", [Eager, Forgetful, Late])
def test_planted_faults(fault):
    with pytest.raises(AssertionError):
        for make in KINDS.values():
            tokenizer = make()
            check_stream(fault(tokenizer), tokenizer, tokenizer.encode(TEXT).ids)


@pytest.mark.parametrize(
    ("token", "error"), [(True, DTypeError), (1.0, DTypeError), ("a", DTypeError), (-1, RangeError)]
)
def test_streams_refuse(tokenizer, token, error):
    stream = TextStream(tokenizer)
    before = stream.push(tokenizer.encode("a").ids[-1])
    with pytest.raises(error):
        stream.push(token)
    assert before + stream.finish() in ("a", " a")


# Files --------------------------------------------------------------------------------------------


def test_a_tokenizer_comes_from_its_folder(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for folder in (tmp_path, str(tmp_path)):
        assert load_tokenizer(folder).encode(TEXT).ids == tokenizer.encode(TEXT).ids


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(MissingFileError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_tokenizer(tmp_path / "elsewhere")
    assert issubclass(MissingFileError, KVAttnError)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"\xff\xfe\x00", b'{"model": {"type": "unheard"}}'], ids=str
)
def test_files_that_are_damaged(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CacheCorruptionError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_file_that_was_cut(tokenizer, tmp_path):
    text = tokenizer.to_str()
    for keep in (10, len(text) // 2, len(text) - 1):
        (tmp_path / "tokenizer.json").write_text(text[:keep], encoding="utf-8")
        with pytest.raises(CacheCorruptionError):
            load_tokenizer(tmp_path)


def test_without_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingLibraryError, match=r"kvattn\[hf\]"):
        load_tokenizer(tmp_path)
