"""Tokenizers in a person's files: Hugging Face's, those in GGUF, or tiktoken's ranks.

Hugging Face's are tokenizer.json, or vocab.json and merges.txt; the package
`tokenizers` runs them. transformers makes one of what a GGUF file has. Ranks
(.tiktoken) must be for GPT-2's pattern.
"""

import base64
import binascii
import contextlib
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tiktoken

from pcagpt.data import gguf_header
from pcagpt.data.tokenizer import (
    END_OF_TEXT,
    RANKS,
    Numbering,
    encoding_from_ranks,
    load_tokenizer,
)
from pcagpt.errors import OF_NO_FILE, UserError, warn_once
from pcagpt.file_hashes import read_once, sha256_of_file, stamp_of
from pcagpt.files import odd_kind
from pcagpt.json_files import read_json

WHOLE, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
# Beside them:
CONFIG, _ADDED = "tokenizer_config.json", "added_tokens.json"
_MODEL = "config.json"  # of the model
_TEMPLATE = "chat_template"  # its own file, or a field of CONFIG
_SPECIAL = "special_tokens_map.json"
_GPT2 = "GPT2Tokenizer"  # a class of transformers
# Files that a folder with GPT-2's tokens does not have alone.
_PARTS = (VOCAB, MERGES, _ADDED, "vocab.txt", "*.model", "*.tiktoken")
_ENDS = ("bos_token", "eos_token", "unk_token")  # <|endoftext|> if none is named
RANK_ENDING = ".tiktoken"
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token, as in Llama 2
_LOST = "\ufffd"  # stands for bytes that are no character
_LACKING = "\0lacking"  # is no token
_SAYING_LACKING = (_LACKING, "`unk_id` is missing")  # errors of the package
_DAMAGED = "restore it, or download it again"
_SAVE_WHOLE = (
    f"save it as {WHOLE}, with AutoTokenizer and save_pretrained of transformers"
)
# Beginnings of `model_type`. These models cut text in another way than GPT-2.
_OTHER_CUTS = ("biogpt", "clip", "ctrl", "flaubert", "openai-gpt", "qwen", "xlm")
# Fields of a model in tokenizer.json with which it joins bytes in another way.
_OTHER_JOINS = ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
# Normalizers in tokenizer.json that drop no character.
_KEEPING = ("ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Prepend")
# Rank files of OpenAI's whose patterns are not GPT-2's.
_OTHER_PATTERNS = {
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": "cl100k_base",
    "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d": "o200k_base",
}


class Lacking(UserError):
    """A tokenizer has no token for a character of a text, nor one for unknown text."""


class FileTokenizer:
    """The part of `tiktoken.Encoding` that pcagpt uses, of a `tokenizers.Tokenizer`.

    A method raises UserError if the tokenizer fails.

    The package leaves out a character if a byte-pair vocabulary has no token for it and
    none for unknown text. Such a text is refused here. What a tokenizer drops before it
    looks for tokens, such as accents and white space, is left out.
    """

    def __init__(
        self, file: Path, tokenizer: Any, ids: Collection[int], eot_token: int | None
    ):
        """ids: that have a text; eot_token: separates documents; None without one."""
        self.ids, self.n_vocab, self.eot_token = ids, max(ids) + 1, eot_token
        self._file, self._tokenizer = file, tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        self._has_mark = any(token.content == END_OF_TEXT for token in added)
        # Then the package raises an error instead.
        self._loses = getattr(tokenizer.model, "unk_token", "") is None
        if self._loses:
            tokenizer.model.unk_token = _LACKING

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """The ids of a text; `encode_batch` of a single one."""
        return self.encode_batch([text], allowed_special=allowed_special)[0]

    def encode_batch(
        self, texts: Sequence[str], allowed_special: Collection[str] = (), **_: Any
    ) -> list[list[int]]:
        """The ids of several texts.

        Special tokens in a text are always taken for themselves. If `<|endoftext|>` is
        allowed and none of them, it becomes `eot_token`, and the texts on its sides are
        encoded one by one, as documents are. Raises Lacking if a text has a character
        without a token.
        """
        has_end = self.eot_token is not None and not self._has_mark
        is_cut = has_end and END_OF_TEXT in allowed_special
        parts = [text.split(END_OF_TEXT) if is_cut else [text] for text in texts]
        flat = list(itertools.chain.from_iterable(parts))
        with _naming(self._file), self._refusing(flat):
            encoded = self._tokenizer.encode_batch(flat, add_special_tokens=False)
        ids_of, found = iter(encoded), []
        for of_text in parts:
            ids = next(ids_of).ids
            for one in itertools.islice(ids_of, len(of_text) - 1):
                ids += [self.eot_token, *one.ids]
            found.append(ids)
        return found

    @contextlib.contextmanager
    def _refusing(self, texts: Sequence[str]) -> Iterator[None]:
        """An error of the package for a character without a token becomes Lacking."""
        try:
            yield
        except Exception as error:
            if not any(mark in str(error) for mark in _SAYING_LACKING):
                raise
            place = self._first_lacking(texts)
            raise Lacking(
                f"{self._file} has no token for {place}: leave it out"
            ) from None

    def _first_lacking(self, texts: Sequence[str]) -> str:
        """The first character without a token, and the text around it."""
        found = self._naming_unknown
        lacking = found.token_to_id(_LACKING)
        for text in texts:
            encoded = found.encode(text, add_special_tokens=False)
            for number, (at, _) in zip(encoded.ids, encoded.offsets, strict=True):
                if number == lacking:
                    around = text[max(at - 20, 0) : at + 20]
                    return f"{text[at : at + 1]!r}, as in {around!r}"
        return "a character of the text"

    @functools.cached_property
    def _naming_unknown(self) -> Any:
        """The tokenizer with a token for unknown text."""
        whole = self.whole()
        model = whole["model"]
        if isinstance(model["vocab"], list):  # of a unigram model
            model["unk_id"] = len(model["vocab"])
            model["vocab"].append([_LACKING, 0.0])
        else:
            model["unk_token"] = _LACKING
            model["vocab"][_LACKING] = 1 << 31  # Not an id of an added token.
        return type(self._tokenizer).from_str(json.dumps(whole))

    @functools.cached_property
    def unknown(self) -> int | None:
        """The id for text without a token; None if no token is only for such text."""
        model = self.whole()["model"]
        number = model.get("unk_id")
        if model.get("unk_token") is not None:
            number = self._tokenizer.token_to_id(model["unk_token"])
        return None if number == self.eot_token else number

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens included.

        What is no character becomes U+FFFD, and the characters beside it stay.
        """
        with _naming(self._file):
            whole = self._of_characters(ids)
            return self._tokenizer.decode(whole, skip_special_tokens=False)

    def _of_characters(self, ids: Iterable[int]) -> list[int]:
        """The ids with the bytes of U+FFFD in place of bytes that are no character.

        The package would give up all bytes around them, such as a whole text in
        Japanese that is cut within a character.
        """
        byte_of, found = self._byte_of_id, []
        id_of = {byte: number for number, byte in byte_of.items()}
        for are_bytes, run in itertools.groupby(ids, byte_of.__contains__):
            if are_bytes:
                text = bytes(map(byte_of.__getitem__, run)).decode("utf-8", "replace")
                run = map(id_of.__getitem__, text.encode())
            found += run
        return found

    @functools.cached_property
    def _byte_of_id(self) -> dict[int, int]:
        """The tokens that stand for single bytes, as in Llama 2; {} without such."""
        ids = [self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        lost = [ids[byte] for byte in _LOST.encode()]
        if None in ids or self._tokenizer.decode(lost, False) != _LOST:
            return {}
        return {number: byte for byte, number in enumerate(ids)}

    @property
    def end_of_text(self) -> str | None:
        """The text of `eot_token`."""
        end = self.eot_token
        return None if end is None else self._tokenizer.id_to_token(end)

    def whole(self) -> dict[str, Any]:
        """The content of its tokenizer.json."""
        content = json.loads(self._tokenizer.to_str())
        if self._loses:
            content["model"]["unk_token"] = None
        return content


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """An error of the package becomes a UserError that names the tokenizer's file."""
    try:
        yield
    except (Lacking, *OF_NO_FILE):
        raise
    # The package raises Exception itself.
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{file} is damaged ({reason}): {_DAMAGED}") from None


def file_of(path: Path) -> Path | None:
    """The main file of the tokenizer in a folder or file; None without one.

    UserError if a file of the folder is a link to nothing.
    """
    if path.is_dir():
        for name in (WHOLE, VOCAB, MERGES):
            if kind := odd_kind(path / name):
                raise UserError(f"{path / name} is {kind}, not a file: {_DAMAGED}")
        inside = (path / name for name in (WHOLE, VOCAB))
        return next((file for file in inside if _is_tokenizer(file)), None)
    return path if _is_tokenizer(path) else None


def check_is_gpt2s(folder: Path) -> None:
    """UserError if a file tells of a tokenizer that the folder of a model has lost.

    It is for a folder without a `file_of`. What GPT-2's own tokenizer_config.json and
    special_tokens_map.json say is no such trace.
    """
    traces = [file for file in sorted(folder.iterdir()) if any(map(file.match, _PARTS))]
    config, kind = _config_beside(folder / WHOLE), _class_beside(folder / WHOLE)
    is_other = config.get("add_prefix_space") or _other_special(config, [END_OF_TEXT])
    if is_other or not _is_gpt2(kind or _GPT2):
        named = (folder / name for name in (CONFIG, _SPECIAL, _MODEL))
        traces += filter(Path.is_file, named)
    if traces:
        raise UserError(
            f"{traces[0]} is of a tokenizer, but neither {WHOLE} nor {VOCAB} with "
            f"{MERGES} is there, so that the model's tokens are unknown: download "
            f"these files again, or {_SAVE_WHOLE}"
        )


def _is_tokenizer(file: Path) -> bool:
    endings = (RANK_ENDING, gguf_header.ENDING)
    has_ending = file.suffix in endings or file.name == WHOLE
    has_merges = file.name == VOCAB and file.with_name(MERGES).is_file()
    return file.is_file() and (has_ending or has_merges)


def describe(file: Path) -> Numbering:
    """Size and hash of the tokenizer with this main file; UserError if it is damaged.

    Needs no package, except of GGUF.
    """
    if file.suffix == gguf_header.ENDING:
        fields = gguf_header.tokenizer_fields(file)
        return Numbering(len(fields.tokens), fields.sha256)
    sha256 = sha256_of_file(file)
    if file.name == VOCAB:
        _check_kind(file)
        pair = sha256 + sha256_of_file(file.with_name(MERGES))
        sha256 = hashlib.sha256(pair.encode()).hexdigest()
    if file.suffix == RANK_ENDING:
        return Numbering(_ranks(file)[1], sha256)
    _check_merges(file)
    if END_OF_TEXT not in _id_of_text(file):  # Other files name what ends documents.
        pair = f"{sha256} {_end_beside(file)}"
        sha256 = hashlib.sha256(pair.encode()).hexdigest()
    if file.name == WHOLE and _changes_texts(file):
        # Earlier versions obeyed the file and made other tokens.
        sha256 = hashlib.sha256(f"{sha256} whole texts".encode()).hexdigest()
    size = max(_id_of_text(file).values()) + 1
    return Numbering(size, sha256, _added_from(file, size))


def known_name(file: Path) -> str | None:
    """The name in RANKS of the same tokenizer; None without one.

    Raises UserError if the file is damaged.
    """
    is_pair = file.name == VOCAB
    name = _name_by_content(file, is_pair and stamp_of(file.with_name(MERGES)))
    return None if name and _disagreement(file) else name  # `load` refuses it.


@read_once
def _name_by_content(file: Path, _: object) -> str | None:
    """As `known_name`, whatever else is beside a file, or a pair of files.

    The stamp of the second file has it read again if that one changes.
    """
    if file.suffix == RANK_ENDING:
        sha256 = sha256_of_file(file)
        return next((name for name, of in RANKS.items() if of.sha256 == sha256), None)
    if not (merges := _merges_of_gpt2s_kind(file)):
        return None
    own = _id_of_text(file)
    parts = (one if isinstance(one, list) else [one] for one in merges)
    made = ["".join(map(str, one)).replace(" ", "") for one in parts]
    fitting = (name for name, of in RANKS.items() if of.vocab_size == len(own))
    same = next((name for name in fitting if own == _vocabulary_of(name)), None)
    # Merges make all tokens but the bytes and the end of text, in the order of ids.
    return same if same and made == list(_vocabulary_of(same))[256:-1] else None


def _merges_of_gpt2s_kind(file: Path) -> list[Any] | None:
    """The merges in a file that cuts and joins a text as GPT-2 does; None in others."""
    if file.name == VOCAB:
        return _lines_of_merges(file)
    if file.suffix == gguf_header.ENDING:
        fields = gguf_header.tokenizer_fields(file)
        return fields.merges if fields.kind == ("gpt2", "gpt-2") else None
    whole = read_json(file, _DAMAGED) or {}
    model, cut = (
        part if isinstance(part := whole.get(name), dict) else {}
        for name in ("model", "pre_tokenizer")
    )
    is_cut_so = cut.get("type") == "ByteLevel" and cut.get("use_regex", True)
    is_changed = cut.get("add_prefix_space") or whole.get("normalizer")
    is_joined_so = not any(map(model.get, _OTHER_JOINS))
    added, merges = whole.get("added_tokens"), model.get("merges")
    has_end = isinstance(added, list) and any(map(_is_plain_end, added))
    is_alike = is_cut_so and not is_changed and is_joined_so and has_end
    return merges if is_alike and isinstance(merges, list) else None


def _lines_of_merges(vocab: Path) -> list[str]:
    """The merges in the merges.txt beside a vocab.json."""
    lines = vocab.with_name(MERGES).read_text("utf-8", "replace").splitlines()
    return [line for line in lines if line and not line.startswith("#version")]


def _check_merges(file: Path) -> None:
    """UserError if no merge makes most tokens; a warning if it is so of a few.

    Then merges were cut off, and texts get other tokens. In the intact files of Llama
    2 and 3, Gemma 3, Qwen 3, DeepSeek-V3, gpt-oss and Claude, merges make all tokens
    but letters, bytes and added tokens. Others may have some more special tokens.
    """
    place = file.with_name(MERGES) if file.name == VOCAB else file
    lacking, size = _unmade(file, stamp_of(place))
    said = f"no merge makes {len(lacking):,} of {size:,} tokens"
    if 2 * len(lacking) > size:
        raise UserError(f"{place} is damaged ({said}): {_DAMAGED}")
    if lacking:
        warn_once(
            f"{place}: {said}, such as {lacking[0]!r}; if the file was cut off, texts "
            f"get other tokens than the model knows: {_DAMAGED}"
        )


@read_once
def _unmade(file: Path, _: object) -> tuple[list[str], int]:
    """(tokens that no merge makes although they need one, how many need one).

    The stamp of merges.txt has a pair of files read again if that one changes.
    """
    if file.name == VOCAB:
        model, merges, added = {}, _lines_of_merges(file), ()
    else:
        whole = read_json(file, _DAMAGED) or {}
        model, added = whole.get("model"), whole.get("added_tokens") or ()
        merges = model.get("merges") if isinstance(model, dict) else None
    if not isinstance(merges, list):  # It joins no letters.
        return [], 0
    start, end = (model.get(name) or "" for name in _OTHER_JOINS[1:])
    pairs = (one if isinstance(one, list) else str(one).split(" ") for one in merges)
    made = {str(one[0]) + str(one[-1]).removeprefix(start) for one in pairs if one}
    texts = _id_of_text(file)
    known = {END_OF_TEXT, *(one["content"] for one in added)}
    needing = [
        text
        for text in texts
        if len(text.removeprefix(start).removesuffix(end)) > 1
        and not (text in known or _BYTE.fullmatch(text))
    ]
    return [text for text in needing if text not in made], len(needing)


def _is_plain_end(added: Any) -> bool:
    """Whether an added token is the end of text, and takes no spaces beside it."""
    is_end = isinstance(added, dict) and added.get("content") == END_OF_TEXT
    return is_end and not any(map(added.get, ("single_word", "lstrip", "rstrip")))


def load(file: Path) -> tiktoken.Encoding | FileTokenizer:
    """The tokenizer with this main file.

    Raises UserError if it is damaged, or needs a package that is not installed.
    """
    if file.suffix == RANK_ENDING:
        ranks, vocab_size = _ranks(file)
        return encoding_from_ranks(str(file), ranks, vocab_size)
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            f"{file} can only be used with the package `tokenizers`: "
            "pip install 'pcagpt[hf]'"
        ) from None
    if file.suffix == gguf_header.ENDING:
        return _of_gguf(file)
    if file.name == VOCAB:
        _check_kind(file)
    with _naming(file):
        made = _byte_level(tokenizers, file) if file.name == VOCAB else None
        made = made or tokenizers.Tokenizer.from_file(str(file))
        # A file can ask for these; they would change the tokens of a text.
        made.no_truncation()
        made.no_padding()
        if getattr(made.model, "dropout", None):
            made.model.dropout = None
    id_of_text = _id_of_text(file)
    _check_merges(file)
    if problem := _disagreement(file):
        raise UserError(f"{file} {problem}: {_SAVE_WHOLE}")
    texts = (END_OF_TEXT, _end_beside(file))
    ends = (id_of_text[text] for text in texts if text in id_of_text)
    return FileTokenizer(file, made, id_of_text.values(), next(ends, None))


def _of_gguf(file: Path) -> FileTokenizer:
    """What transformers makes of the tokenizer in a file; UserError if it cannot."""
    fields, id_of_text = gguf_header.tokenizer_fields(file), _id_of_text(file)
    try:
        import transformers

        with gguf_header.alone(file) as folder:
            made = transformers.AutoTokenizer.from_pretrained(
                str(folder),
                gguf_file=file.name,
                local_files_only=True,
                trust_remote_code=False,
            ).backend_tokenizer
    except OF_NO_FILE:
        raise
    # The package and what it calls raise errors of many types.
    except Exception as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"transformers makes no tokenizer of {file} ({reason}): name its "
            f"{WHOLE} as --config.data.tokenizer"
        ) from None
    end = id_of_text.get(END_OF_TEXT, fields.end)
    return FileTokenizer(file, made, range(len(fields.tokens)), end)


def _byte_level(tokenizers: Any, file: Path) -> Any:
    """GPT-2's kind of tokenizer with another vocabulary."""
    merges = str(file.with_name(MERGES))
    model = tokenizers.models.BPE.from_file(str(file), merges)
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([END_OF_TEXT])
    return made


def _config_beside(file: Path) -> dict[str, Any]:
    """The settings in the files beside a tokenizer, as transformers combines them."""
    config = read_json(file.with_name(CONFIG), _DAMAGED) or {}
    if "added_tokens_decoder" in config:
        return config  # transformers then ignores special_tokens_map.json.
    return config | (read_json(file.with_name(_SPECIAL), _DAMAGED) or {})


def _model_beside(file: Path) -> dict[str, Any]:
    """The config.json of the model of a tokenizer."""
    return read_json(file.with_name(_MODEL), _DAMAGED, True) or {}


def _class_beside(file: Path) -> Any:
    """The class of a tokenizer in transformers; None if no file beside it tells."""
    own, of_model = (
        one.get("tokenizer_class")
        for one in (_config_beside(file), _model_beside(file))
    )
    return own or of_model


def _is_gpt2(kind: object) -> bool:
    """Whether a class of tokenizers of transformers is that of GPT-2."""
    return str(kind).removesuffix("Fast") == _GPT2


def own_settings(folder: Path) -> dict[str, Any]:
    """What the tokenizer in a folder says besides how it cuts text.

    These are fields of tokenizer_config.json: its special tokens, the template of a
    chat, and the sides on which texts are filled up or cut off.
    """
    file = file_of(folder)
    if file is None or file.name not in (WHOLE, VOCAB):
        return {}
    config = _config_beside(file)
    if (template := file.with_name(f"{_TEMPLATE}.jinja")).is_file():
        config |= {_TEMPLATE: template.read_text("utf-8", "replace")}
    names = (_TEMPLATE, "padding_side", "truncation_side")
    ends = ("_token", "_special_tokens")
    return {n: of for n, of in config.items() if n in names or n.endswith(ends)}


def _check_kind(vocab: Path) -> None:
    """UserError if a vocab.json is for another way to cut text than GPT-2's."""
    kind, cut = _class_beside(vocab), str(_model_beside(vocab).get("model_type"))
    is_gpt2 = _is_gpt2(kind)
    if not is_gpt2 and (kind or cut.startswith(_OTHER_CUTS)):
        raise UserError(
            f"{vocab} is of {kind or cut}, which cuts text in another way than GPT-2: "
            f"{_SAVE_WHOLE}"
        )
    lacking = set(byte_letters().values()) - _id_of_text(vocab).keys()
    if not is_gpt2 and lacking:
        raise UserError(
            f"{vocab} has no token {min(lacking)}, so it cuts text in another way than "
            f"GPT-2: {_SAVE_WHOLE}"
        )


@read_once
def _changes_texts(whole: Path) -> bool:
    """Whether a tokenizer.json asks to cut off, fill up or vary texts."""
    content = read_json(whole, _DAMAGED) or {}
    model = content.get("model")
    has_dropout = isinstance(model, dict) and model.get("dropout")
    return bool(content.get("truncation") or content.get("padding") or has_dropout)


@read_once
def drops_characters(file: Path) -> bool:
    """Whether a normalizer may drop characters, such as spaces at the end of a text."""
    if file.name != WHOLE:  # What is made of other files has none that does.
        return False
    return _drops((read_json(file, _DAMAGED) or {}).get("normalizer"))


def _drops(normalizer: Any) -> bool:
    """`drops_characters` of a normalizer, or a part of one, in a tokenizer.json."""
    match normalizer:
        case None:
            return False
        case {"type": "Sequence", "normalizers": [*parts]}:
            return any(map(_drops, parts))
        case {"type": "Replace", "pattern": {"String": _}, "content": str(content)}:
            return not content  # Llama's puts a mark for each space.
        case {"type": kind}:
            return kind not in _KEEPING
    return True


def _disagreement(file: Path) -> str | None:
    """How the files beside a tokenizer contradict it; None if they do not.

    Some classes of transformers take added tokens or a space before each text from
    these files, others from the tokenizer. So they must say the same.
    """
    if file.name not in (WHOLE, VOCAB):
        return None
    config, id_of_text = _config_beside(file), _id_of_text(file)
    if file.name == VOCAB and (problem := _other_special(config, id_of_text)):
        return problem
    if isinstance(decoder := config.get("added_tokens_decoder"), dict):
        # transformers reads no added_tokens.json then.
        stated = [
            (one.get("content"), number, CONFIG)
            for number, one in decoder.items()
            if isinstance(one, dict)
        ]
    else:
        added = read_json(file.with_name(_ADDED), _DAMAGED) or {}
        stated = [(text, str(number), _ADDED) for text, number in added.items()]
    for text, number, place in stated:
        if not isinstance(text, str):
            continue
        if text not in id_of_text:
            return f"lacks the token {text}, which {place} adds"
        if str(own := id_of_text[text]) != number:
            return f"has the token {text} as {own}, and {place} as {number}"
        if file.name == VOCAB and text != END_OF_TEXT:
            return f"does not tell how {text} is cut, which {place} adds"
    stated, own = config.get("add_prefix_space"), _adds_space(file)
    if isinstance(stated, bool) and own == (not stated):
        return f"puts {'a' if own else 'no'} space before a text, unlike {CONFIG}"
    return None


def _other_special(config: dict[str, Any], texts: Collection[str]) -> str | None:
    """How the special tokens of a vocab.json are not just `<|endoftext|>`.

    transformers finds each special token in a text before it cuts the rest.
    """
    decoder = config.get("added_tokens_decoder")
    stated = list(decoder.values()) if isinstance(decoder, dict) else []
    for name, of in (dict.fromkeys(_ENDS, END_OF_TEXT) | config).items():
        if name.endswith("_token"):
            stated.append(of)
        elif name.endswith("_special_tokens"):
            more = of.values() if isinstance(of, dict) else of
            stated += more if isinstance(of, dict | list) else ()
    found = ({"content": of} if isinstance(of, str) else of for of in stated)
    special = [of for of in found if isinstance(of, dict)]
    for of in special:
        if not _is_plain_end(of):
            return f"stands beside a file with another special token: {of}"
    if not special or END_OF_TEXT not in texts:
        return f"has no special token {END_OF_TEXT}"
    return None


@read_once
def _adds_space(file: Path) -> bool | None:
    """Whether GPT-2's way to cut puts a space before a text; None of another way."""
    if file.name == VOCAB:
        return False
    cut = (read_json(file, _DAMAGED) or {}).get("pre_tokenizer")
    cut = cut if isinstance(cut, dict) else {}
    parts = cut.get("pretokenizers")
    for part in parts if isinstance(parts, list) else [cut]:
        if isinstance(part, dict) and part.get("type") == "ByteLevel":
            return part.get("add_prefix_space")
    return None


def _end_beside(file: Path) -> str | None:
    """`eos_token` of the files beside a tokenizer, else `eos_token_id` of the model.

    An id counts if it is of an added token: transformers writes GPT-2's 50256 into the
    config.json of models with other vocabularies, too.
    """
    stated = _config_beside(file).get("eos_token")
    stated = stated.get("content") if isinstance(stated, dict) else stated
    if isinstance(stated, str):
        return stated
    ids = _model_beside(file).get("eos_token_id")
    text_of = {str(one["id"]): one["content"] for one in _added(file)}
    ids = map(str, ids if isinstance(ids, list) else [ids])
    return next((text_of[one] for one in ids if one in text_of), None)


def _added(file: Path) -> list[dict[str, Any]]:
    """The added tokens that a tokenizer.json states; [] for another file."""
    whole = (read_json(file, _DAMAGED) or {}) if file.name == WHOLE else {}
    return whole.get("added_tokens") or []


@read_once
def _id_of_text(file: Path) -> dict[str, int]:
    """{text as the file writes it: id} of a tokenizer of Hugging Face's."""
    if file.suffix == gguf_header.ENDING:
        tokens = gguf_header.tokenizer_fields(file).tokens
        return {text: number for number, text in enumerate(tokens)}
    content = read_json(file, _DAMAGED) or {}
    if file.name == VOCAB:
        vocabulary, added = content, ()
    else:
        model, added = content.get("model"), content.get("added_tokens") or ()
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
    try:
        if isinstance(vocabulary, list):  # A unigram model's have scores.
            vocabulary = {str(pair[0]): n for n, pair in enumerate(vocabulary)}
        found = dict(vocabulary) | {one["content"]: one["id"] for one in added}
    except (TypeError, ValueError, LookupError):
        found = {}
    if not found or any(type(number) is not int for number in found.values()):
        raise UserError(f"{file} is damaged (it has no vocabulary): {_DAMAGED}")
    text_of: dict[int, str] = {}
    for text, number in found.items():
        if text_of.setdefault(number, text) != text:
            raise UserError(
                f"{file} is damaged (id {number} has two texts, {text_of[number]!r} "
                f"and {text!r}): {_DAMAGED}"
            )
    return found


@read_once
def _added_from(file: Path, size: int) -> int | None:
    """The first id of the added tokens at the end; `size` without any.

    None for a file of another kind, which does not name them.
    """
    if file.name != WHOLE:
        return None
    added = {one["id"] for one in _added(file)}
    first = size
    while first - 1 in added:
        first -= 1
    return first


@read_once
def _ranks(file: Path) -> tuple[dict[bytes, int], int]:
    """({token: rank}, number of ids with `<|endoftext|>`) of a rank file.

    The special token has the id after the last rank.
    """
    if name := _OTHER_PATTERNS.get(sha256_of_file(file)):
        raise UserError(
            f"{file} is {name}, which cuts text in another way than GPT-2: give its "
            f"{WHOLE} instead"
        )
    try:
        rows = [line.split() for line in file.read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
    except (ValueError, binascii.Error):
        ranks = {}
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise UserError(
            f"{file} is damaged: it must have lines of base64 tokens and their ranks, "
            "0, 1, 2 and so on"
        )
    return ranks, len(ranks) + 1


@functools.cache
def _vocabulary_of(name: str) -> dict[str, int]:
    """vocab.json of a tokenizer of the package."""
    encoding = load_tokenizer(name)
    tokens = map(encoding.decode_single_token_bytes, range(encoding.eot_token))
    found = {letters_of(token): number for number, token in enumerate(tokens)}
    return found | {END_OF_TEXT: encoding.eot_token}


@functools.cache
def byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in GPT-2's files, in its order of bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {
        **{byte: chr(byte) for byte in plain},
        **{byte: chr(256 + number) for number, byte in enumerate(others)},
    }


def letters_of(token: bytes) -> str:
    """A token as GPT-2's files write it: a letter for each byte."""
    return "".join(map(byte_letters().__getitem__, token))
