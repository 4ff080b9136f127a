"""Tokenizers of checkpoint folders, and text that comes token by token."""

import json
import os
import random
import sys

import pytest

from kvattn.errors import (
    CacheCorruptionError,
    ConfigError,
    DTypeError,
    KVAttnError,
    MissingFileError,
    MissingLibraryError,
    RangeError,
)
from kvattn.models import TextStream, continuation, load_tokenizer

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


def certain(tokenizer, ids, rest):
    """The text that nothing which may follow changes, tried out: nothing, what does follow, and other tokens."""
    others = range(0, tokenizer.get_vocab_size(), 5)
    texts = [tokenizer.decode(ids), tokenizer.decode(ids + rest), *(tokenizer.decode([*ids, x]) for x in others)]
    return os.path.commonprefix(texts).rstrip("\ufffd")  # noqa: RUF071  characters are meant


def check_stream(stream, tokenizer, ids, prompt=()):
    """The parts are the whole, no part has half a character, and nothing waits longer than it must."""
    prompt, parts = list(prompt), []
    start = len(os.path.commonprefix([tokenizer.decode(prompt), tokenizer.decode(prompt + ids)]))  # noqa: RUF071
    for i in range(len(ids)):
        parts.append(stream.push(ids[i]))
        text = certain(tokenizer, prompt + ids[: i + 1], ids[i + 1 :])
        assert "".join(parts) == text[start:], i
    parts.append(stream.finish())
    assert "".join(parts) == tokenizer.decode(prompt + ids)[start:] == continuation(tokenizer, prompt, ids)


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
            self._context, self._new, self._before, self._returned = [], [], "", 0
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


# After a prompt -----------------------------------------------------------------------------------


def test_a_continuation_keeps_its_first_space():
    """Llama's decoder takes away the first space of a text: of the whole text, not of what goes on from a prompt."""
    tokenizer = byte_fallback()
    prompt, new = tokenizer.encode("once upon").ids, tokenizer.encode("there, né").ids
    assert tokenizer.decode(new) == "there, né" and tokenizer.decode(prompt + new) == "once upon there, né"
    assert continuation(tokenizer, prompt, new) == " there, né"
    stream = TextStream(tokenizer, prompt)
    for _ in range(2):  # it begins anew after the same prompt
        assert "".join([*map(stream.push, new), stream.finish()]) == " there, né"
    assert continuation(tokenizer, [], new) == "there, né"
    assert continuation(tokenizer, prompt, []) == ""


@pytest.mark.parametrize("skip", [True, False])
def test_texts_cut_anywhere(tokenizer, skip):
    """Within characters too, and behind special tokens: prompt and continuation are the whole; so is the stream."""
    end = tokenizer.token_to_id("<end>")
    ids = [end, *tokenizer.encode("One n " + TEXT).ids, end, *tokenizer.encode(" née").ids]
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    for cut in range(len(ids) + 1):
        prompt, new = ids[:cut], ids[cut:]
        text = continuation(tokenizer, prompt, new, skip_special_tokens=skip)
        before = tokenizer.decode(prompt, skip_special_tokens=skip).rstrip("\ufffd")
        assert before + text == whole
        stream = TextStream(tokenizer, prompt, skip_special_tokens=skip)
        parts = [*map(stream.push, new), stream.finish()]
        assert "".join(parts) == text
    for cut in range(0, len(ids), 6):
        check_stream(TextStream(tokenizer, ids[:cut]), tokenizer, ids[cut:], ids[:cut])


def words(decoder):
    """A word for a token, with the decoders of other kinds of tokenizers."""
    vocab = ["[UNK]", "▁a", "a", "b</w>", "##b", "n't", ".", "▁", "do", "▁▁c", "|", "<end>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(vocab)}, "[UNK]"))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


DECODERS = {
    "none": lambda d: None,
    "metaspace": lambda d: d.Metaspace(prepend_scheme="always"),
    "metaspace, first": lambda d: d.Metaspace(prepend_scheme="first"),
    "wordpiece": lambda d: d.WordPiece(cleanup=True),
    "suffixes": lambda d: d.BPEDecoder(),
}


@pytest.mark.parametrize("kind", DECODERS)
def test_other_decoders(kind):
    tokenizer, rng = words(DECODERS[kind](tokenizers.decoders)), random.Random(0)
    for _ in range(60):
        ids = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(12)]
        cut = rng.randrange(12)
        prompt, new = ids[:cut], ids[cut:]
        before, whole = tokenizer.decode(prompt), tokenizer.decode(ids)
        assert whole.startswith(before)
        stream = TextStream(tokenizer, prompt)
        parts = [*map(stream.push, new), stream.finish()]
        assert "".join(parts) == continuation(tokenizer, prompt, new) == whole[len(before) :]


def test_bytes_that_only_are_text_together():
    """Bytes of byte fallback become text, or none of them does: what came before a wrong one is taken back."""
    tokenizer, rng = byte_fallback(), random.Random(1)
    letters = [tokenizer.token_to_id(x) for x in "an."] + [tokenizer.token_to_id("<end>")]
    runs = [[1 + b for b in text.encode()] for text in ("東", "🙂", "\n", "é")]
    for _ in range(60):
        ids = []
        for _ in range(8):
            ids += rng.choice([*runs, [rng.choice(letters)], [1 + rng.randrange(256)]])
        cut = rng.randrange(len(ids))
        stream = TextStream(tokenizer, ids[:cut])
        parts = [*map(stream.push, ids[cut:]), stream.finish()]
        assert "".join(parts) == continuation(tokenizer, ids[:cut], ids[cut:])
    ids = [*runs[0], *runs[1][:2]]  # the end comes within the second character
    assert tokenizer.decode(ids) == "\ufffd" * 5
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in ids] == [""] * 5 and stream.finish() == "\ufffd" * 5


@pytest.mark.wrong_types
@pytest.mark.parametrize(
    ("ids", "error"),
    [("text", DTypeError), (3, DTypeError), ([1.0], DTypeError), ([True], DTypeError), ([-1], RangeError)],
)
def test_prompts_that_are_none(tokenizer, ids, error):
    with pytest.raises(error, match="prompt"):
        TextStream(tokenizer, ids)
    with pytest.raises(error, match="prompt"):
        continuation(tokenizer, ids, [1])
    with pytest.raises(error, match="tokens"):
        continuation(tokenizer, [1], ids)


def test_prompts_of_any_kind_of_ids(tokenizer):
    import numpy as np

    ids = tokenizer.encode("a n").ids
    for prompt in (tuple(ids), np.array(ids), iter(ids), bytes(x for x in ids if x < 256)):
        assert "".join([TextStream(tokenizer, prompt).push(ids[0])]) is not None
    assert continuation(tokenizer, np.array(ids), np.array(ids)) == continuation(tokenizer, ids, ids)


@pytest.mark.wrong_types
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


def test_texts_are_neither_cut_nor_padded(tokenizer, tmp_path):
    """Whatever lengths the file was saved with: as transformers, which sets both back."""
    text = "one two, three. " * 30
    whole = tokenizer.encode(text).ids
    tokenizer.enable_truncation(8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(text).ids == whole
    tokenizer.enable_padding(length=1000, pad_id=3)
    tokenizer.no_truncation()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(text).ids == whole
    assert [len(x.ids) for x in loaded.encode_batch(["a", "one"])] == [len(loaded.encode(x).ids) for x in ("a", "one")]


def with_ends(processor):
    """Ids 0 to 5, and what its tokenizer.json puts at the ends of a text."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "[S]": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    make = PROCESSORS[processor]
    if make is not None:
        tokenizer.post_processor = make(tokenizers.processors)
    return tokenizer


def template(single, p):
    pair = f"{single} {single.replace('$A', '$B')}".replace("$B", "$B:1")
    return p.TemplateProcessing(single=single, pair=pair, special_tokens=[("<s>", 1), ("</s>", 2)])


PROCESSORS = {
    "nothing": None,
    "bytes": lambda p: p.ByteLevel(trim_offsets=False),
    "bos": lambda p: template("<s> $A", p),
    "eos": lambda p: template("$A </s>", p),
    "both": lambda p: template("<s> $A </s>", p),
    "llama 3": lambda p: p.Sequence([p.ByteLevel(trim_offsets=False), template("<s> $A", p)]),
    "roberta": lambda p: p.RobertaProcessing(("</s>", 2), ("<s>", 1)),
}
ENDS = {"": [3, 4], "b": [1, 3, 4], "e": [3, 4, 2], "be": [1, 3, 4, 2]}
OWN = {"nothing": "", "bytes": "", "bos": "b", "eos": "e", "both": "be", "llama 3": "b", "roberta": "be"}


@pytest.mark.parametrize("processor", PROCESSORS)
def test_tokens_at_the_ends_that_only_the_settings_ask_for(tmp_path, processor):
    """What is asked for is there, once. For Llama's class transformers 4.57 gives these ids where both are said."""
    with_ends(processor).save(str(tmp_path / "tokenizer.json"))
    own = OWN[processor]

    def ids(text="a b", **settings):
        names = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False, "__type": "AddedToken"}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | settings))
        return load_tokenizer(tmp_path).encode(*text.split("+")).ids

    def expected(bos, eos):
        return ENDS[("b" if bos else "") + ("e" if eos else "")]

    had_bos, had_eos = "b" in own, "e" in own
    assert ids() == ids(add_bos_token=None) == ENDS[own]
    for kind in (None, "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "Qwen2Tokenizer"):
        named = {} if kind is None else {"tokenizer_class": kind}
        replaces = kind is not None and kind.startswith("Llama")
        assert ids(add_bos_token=True, **named) == expected(True, had_eos)
        assert ids(add_eos_token=True, **named) == expected(had_bos, True)
        assert ids(add_bos_token=True, add_eos_token=True, **named) == expected(True, True)
        assert ids(add_bos_token=False, **named) == expected(had_bos and not replaces, had_eos)
        assert ids(add_bos_token=False, add_eos_token=False, **named) == ENDS["" if replaces else own]
        assert ids(add_bos_token=True, add_eos_token=False, **named) == expected(True, had_eos and not replaces)
    if processor != "roberta":  # which has one more between two texts
        assert ids("a+b", add_bos_token=True, add_eos_token=False, tokenizer_class="LlamaTokenizer") == [1, 3, 1, 4]
    # One token for both ends, as GPT-NeoX has it.
    both = {"bos_token": {"content": "[S]"}, "eos_token": "[S]", "add_bos_token": True, "add_eos_token": True}
    assert [token for token in ids(**both) if token not in (1, 2)] == [5, 3, 4, 5]


def test_special_tokens_in_a_text(tmp_path):
    with_ends("bos").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"clean_up_tokenization_spaces": True}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a </s> b").ids == [1, 3, 2, 4]
    assert tokenizer.encode("a </s> b", add_special_tokens=False).ids == [3, 2, 4]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"split_special_tokens": True}))
    assert load_tokenizer(tmp_path).encode_special_tokens


BAD_SETTINGS = [
    ({"add_bos_token": True}, ConfigError, "bos_token is None, which names no token"),
    ({"add_bos_token": True, "bos_token": None}, ConfigError, "names no token"),
    ({"add_bos_token": True, "bos_token": 1}, ConfigError, "bos_token is 1, which names no token"),
    ({"add_bos_token": True, "bos_token": {"text": "<s>"}}, ConfigError, "which names no token"),
    ({"add_bos_token": True, "bos_token": "<bos>"}, ConfigError, "'<bos>', which is not in the vocabulary"),
    ({"add_eos_token": True, "eos_token": "<eos>"}, ConfigError, "'<eos>', which is not in the vocabulary"),
    ({"add_bos_token": "yes", "bos_token": "<s>"}, ConfigError, "add_bos_token must be true or false, got 'yes'"),
    ({"add_bos_token": 1, "bos_token": "<s>"}, ConfigError, "add_bos_token must be true or false"),
    ([], ConfigError, "JSON object"),
    (b"{", CacheCorruptionError, "no JSON"),
    (b"\xff\xfe", CacheCorruptionError, "no JSON"),
    (b"[" * 200_000, CacheCorruptionError, "no JSON"),
]


@pytest.mark.wrong_types
@pytest.mark.parametrize(("settings", "error", "part"), BAD_SETTINGS, ids=lambda x: str(x)[:40])
def test_settings_that_are_refused(tmp_path, settings, error, part):
    with_ends("nothing").save(str(tmp_path / "tokenizer.json"))
    content = settings if isinstance(settings, bytes) else json.dumps(settings).encode()
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(error) as caught:
        load_tokenizer(tmp_path)
    assert part in str(caught.value) and "tokenizer_config.json" in str(caught.value)


def test_tokens_that_an_older_file_names(tmp_path):
    with_ends("nothing").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "bos_token": None}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    assert load_tokenizer(tmp_path).encode("a b").ids == [1, 3, 4]
    (tmp_path / "special_tokens_map.json").write_text("{")
    with pytest.raises(CacheCorruptionError, match=r"special_tokens_map\.json"):
        load_tokenizer(tmp_path)


def test_settings_that_ask_for_nothing_need_no_tokens(tmp_path):
    with_ends("nothing").save(str(tmp_path / "tokenizer.json"))
    for settings in ({"bos_token": "<not there>"}, {"add_bos_token": False, "tokenizer_class": "LlamaTokenizer"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        assert load_tokenizer(tmp_path).encode("a b").ids == [3, 4]


@pytest.mark.wrong_types
def test_a_file_instead_of_a_folder(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(MissingFileError) as caught:
        load_tokenizer(tmp_path / "tokenizer.json")
    assert f"give the folder it lies in, {tmp_path}" in str(caught.value)
    for path in (None, 3, b"folder"):
        with pytest.raises(DTypeError, match="path"):
            load_tokenizer(path)


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
