"""A corpus: token files of the splits train, val and test.

Tokenizing text puts `<|endoftext|>`, or what ends a text for a tokenizer in a file,
before every document. The package's tokenizers keep each byte; one in a file may change
text. A document is one address in `sotu`, a whole split in `wikitext103` and of a
single text, and a whole file in a folder of text files.
"""

import codecs
import contextlib
import filecmp
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tiktoken

from pcagpt.data import vocabulary
from pcagpt.data.characters import CharacterTokenizer
from pcagpt.data.decoded import as_text
from pcagpt.data.meta import CorpusInfo, odd_splits, present_splits, read_meta
from pcagpt.data.sources import (
    NAMED,
    TextSource,
    TokenFolder,
    find_source,
    import_package,
)
from pcagpt.data.token_array import TokenArray, pieces
from pcagpt.data.token_files import TokenFile, check_tokens
from pcagpt.data.tokenize import write_token_folder
from pcagpt.data.tokenizer import END_OF_TEXT, RANKS
from pcagpt.data.words import WordCounter
from pcagpt.errors import UserError, naming, warn_once
from pcagpt.file_hashes import is_settled, stamp_in
from pcagpt.files import folder_name
from pcagpt.json_files import read_json
from pcagpt.sharding import processes

# Parts of a corpus's content that decide the numbers of a training run.
TRAINING_PARTS = ("train", "val", "vocab_size", "tokenizer_sha256")
# Parts of a cache folder's name, the newest first: add one when the tokens change. The
# second ones are for tokenizers in files, the last ones if these drop characters.
_RECIPES, _FILE_RECIPES, _DROPPING_RECIPES = (1,), (3, 1), (3, 2, 1)
_BytesOf = Callable[[list[int]], bytes]  # the UTF-8 of ids


class TextSize(NamedTuple):
    """Size of a split's text, with words as `WordCounter` counts them."""

    words: int
    bytes: int


@dataclass(frozen=True)
class Corpus(CorpusInfo):
    """A folder of token files, `<split>.bin`: little-endian ids without a header.

    cache_dir: keeps the hashes of token files if `folder` is read-only; older: folders
    of earlier versions, which made other tokens of the same text.
    """

    folder: Path = Path()
    cache_dir: Path = Path()
    older: tuple[Path, ...] = ()
    _opened: dict[str, "_Opened"] = field(
        default_factory=dict, repr=False, compare=False
    )

    def tokens(self, split: str) -> TokenArray:
        """Token ids of a split, read when they are used: uint16 or uint32 [n].

        The file that the first call opens stays the split, whatever becomes of its
        name. Raises UserError as for `check_tokens`.
        """
        if split not in self._opened:
            path = self._path(split)
            check_splits(self, [split], self.folder)
            with naming(path):
                seen = path.stat()
            is_kept = is_settled(stamp_in(seen))
            checked = self._checked(split)
            tokens = TokenArray(path, checked.dtype)
            self._opened[split] = _Opened(tokens, checked.sha256, seen, is_kept)
        return self._opened[split].tokens

    def check_unchanged(self) -> None:
        """Raises UserError if a file that `tokens` opened holds other ids now.

        Reads it only if its size or its times have changed. A warning says that it was
        written and holds the same ids again: others may have been read meanwhile. One
        that lost its name stays as good as it was; a warning tells of it.
        """
        for split, opened in self._opened.items():
            opened.check_unchanged(self._path(split))

    def tokens_sha256(self, split: str) -> str:
        """Hash of all ids of a split; raises as `tokens` does."""
        opened = self._opened.get(split)
        return opened.sha256 if opened else self._checked(split).sha256

    @property
    def content(self) -> dict[str, Any]:
        """What identifies the corpus in any place: JSON values.

        The hash of each split, `vocab_size` and `tokenizer_sha256`. A damaged test
        split is left out, because most commands do not read it.
        """
        hashes = {s: self.tokens_sha256(s) for s in self.splits if s != "test"}
        with contextlib.suppress(UserError):
            hashes["test"] = self.tokens_sha256("test")
        return {
            **hashes,
            "vocab_size": self.vocab_size,
            "tokenizer_sha256": self.tokenizer_sha256,
        }

    @property
    def sha256(self) -> str:
        """One hash of the train and val splits, the vocabulary and the tokenizer."""
        content = self.content
        parts = [content.get(name) for name in TRAINING_PARTS]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def changed_parts(
        self, record: Mapping[str, Any], names: Iterable[str] = TRAINING_PARTS
    ) -> list[str] | None:
        """Parts of `content` in which a run's corpus differs; None if it is unknown.

        Args:
          record: the run's config.json.
          names: the parts to compare. A part that one side does not know, such as a
            split that the corpus lacks, is not compared.
        """
        known = record.get("corpus")
        if isinstance(known, dict):
            content = self.content
            pairs = {name: (known.get(name), content.get(name)) for name in names}
            return [n for n, (a, b) in pairs.items() if None not in (a, b) and a != b]
        if record.get("corpus_sha256"):  # Of an earlier version.
            is_same = self._sampled_sha256() == record["corpus_sha256"]
            return [] if is_same else ["tokens"]
        return None

    def older_tokens(self, record: Mapping[str, Any], cache_dir: Path) -> str:
        """Words for an error that name the folder of a run's tokens; '' without one.

        `record` is the config.json of a run that an earlier version trained, and
        `cache_dir` the cache folder that its command had.
        """
        theirs = (cache_dir / folder.name for folder in self.older)
        for folder in filter(Path.is_dir, (*self.older, *theirs)):
            older = Corpus(**vars(read_meta(folder, "auto")), folder=folder)
            if older.changed_parts(record) == []:
                return (
                    "; an earlier version made other tokens of the same text, and its "
                    f"tokens are in {folder}, which can be given as "
                    "--config.data.source"
                )
        return ""

    def count_tokens(self, split: str) -> np.ndarray:
        """Number of occurrences of each token id in a split: int64 [V], read-only."""
        tokens = self.tokens(split)  # From here on, `check_unchanged` notices a change.
        key = self._opened[split].sha256, self.vocab_size
        if (count_V := _counts.get(key)) is None:
            count_V = count_tokens(tokens, self.vocab_size)
            count_V.flags.writeable = False
            _counts.clear()
            _counts[key] = count_V
        return count_V

    def text_size(self, split: str) -> TextSize | None:
        """Words and UTF-8 bytes of a split's text; None if they are unknown.

        `<|endoftext|>` ends a word and is not part of the text. The bytes of the first
        token are not counted, because no model predicts it. pcagpt counts them when it
        tokenizes text; the hash says that the tokens are those of that text. Of other
        token files, tiktoken's tokenizers and the characters of a meta file tell them.
        """
        stated = self.hashes, self.text_words, self.text_bytes
        if all(split in known for known in stated):
            return TextSize(self.text_words[split], self.text_bytes[split])
        if (found := self._bytes_of_tokens()) is None:
            return None
        bytes_of, end = found
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        first = self.tokens(split)[:1].tolist()
        words, byte_count = WordCounter(), 0
        if first != [end]:
            byte_count -= len(bytes_of(first))
        for chunk in pieces(self.tokens(split)):
            documents = np.split(chunk, np.flatnonzero(chunk == end))
            raw = b" ".join(bytes_of(ids[ids != end].tolist()) for ids in documents)
            byte_count += len(raw) - (len(documents) - 1)
            words.add(decoder.decode(raw))
        return TextSize(words.count, byte_count)

    def _bytes_of_tokens(self) -> tuple[_BytesOf, int | None] | None:
        """(what tells the bytes of ids, the id that ends documents), if known."""
        if self.tokenizer and vocabulary.tells_bytes(self.tokenizer):
            encoding = vocabulary.load(self.tokenizer)
            assert isinstance(encoding, tiktoken.Encoding)
            return encoding.decode_bytes, encoding.eot_token
        texts = self.characters or ("\ufffd",)
        if any("\ufffd" in text or not text for text in texts):
            return None  # A part of a character, or another text, stands for some ids.
        letters = CharacterTokenizer(texts)
        return lambda ids: letters.decode(ids).encode(), letters.eot_token

    def _sampled_sha256(self) -> str | None:
        """The hash that earlier versions recorded: of samples of train and val.

        A sample is 64 evenly spaced runs of 4,096 tokens.
        """
        if not {"train", "val"} <= set(self.splits):
            return None
        digest = hashlib.sha256(f"{self.vocab_size}".encode())
        for split in ("train", "val"):
            tokens = self.tokens(split)
            digest.update(f" {split} {len(tokens)} ".encode())
            for start in np.linspace(0, max(len(tokens) - 4096, 0), 64).astype(int):
                digest.update(tokens[start : start + 4096].tobytes())
        return digest.hexdigest()

    def _checked(self, split: str) -> TokenFile:
        """The checked file of a split; UserError as for `check_tokens`."""
        check_splits(self, [split], self.folder)
        return check_tokens(self._path(split), self, self.cache_dir)

    def _path(self, split: str) -> Path:
        return self.folder / f"{split}.bin"


# All arms of an experiment have one corpus: {(hash of the ids, V): `count_tokens`}.
_counts: dict[tuple[str, int], np.ndarray] = {}


@dataclass
class _Opened:
    """An open split, its hash, and the last status of its file with these ids.

    is_kept: whether any later change would give the file another status.
    """

    tokens: TokenArray
    sha256: str
    status: os.stat_result
    is_kept: bool

    def check_unchanged(self, path: Path) -> None:
        """As `Corpus.check_unchanged`, for the split that was opened at `path`."""
        before = self.status
        try:
            now = self.tokens.status()
            is_same = os.path.samestat(before, now) and stamp_in(before) == stamp_in(
                now
            )
            if not (is_same and self.is_kept):
                is_kept = is_settled(stamp_in(now))
                if self.tokens.sha256() != self.sha256:
                    raise UserError(
                        f"{path} was changed while this command used it: restore it, "
                        "or run the same command again"
                    )
                self.status, self.is_kept = now, is_kept
        except OSError as error:
            warn_once(
                f"{path} cannot be read any more, so that it is unknown whether it "
                f"changed: {error.strerror}"
            )
            return
        if not _is_at(path, now):
            warn_once(
                f"{path} was removed or replaced while this command used it, which "
                "goes on with the tokens that it has open"
            )
        elif not is_same:
            warn_once(
                f"{path} was touched or written while this command used it: it holds "
                "the same tokens again, but if it held others meanwhile, they may have "
                "been used"
            )


def _is_at(path: Path, status: os.stat_result) -> bool:
    """Whether a path leads to the file with this status."""
    try:
        return os.path.samestat(path.stat(), status)
    except OSError:
        return False


def count_tokens(tokens: np.ndarray | TokenArray, vocab_size: int) -> np.ndarray:
    """Number of occurrences of each token id in `tokens` [n]: int64 [vocab_size]."""
    # np.bincount of all tokens at once would make an int64 copy: 8 bytes per token.
    count_V = np.zeros(vocab_size, np.int64)
    for chunk in pieces(tokens):
        count_V += np.bincount(chunk, minlength=vocab_size)
    return count_V


def check_splits(info: CorpusInfo, needed: Collection[str], place: object) -> None:
    """Raises UserError if a corpus, which comes from `place`, lacks a split."""
    folder = Path(str(place))
    for split in needed:
        if split in info.splits:
            continue
        ending = "bin" if present_splits(folder) else "txt"
        present = (", ".join(info.splits) or "none") + odd_splits(folder, [split])
        raise UserError(
            f"no '{split}' split in {place} (present: {present}): add a file for it, "
            f"such as {split}.{ending}, or ask for a split that is there"
        )


def describe_corpus(
    source: str,
    tokenizer: str = "auto",
    splits: Collection[str] = (),
    encode_as: str | None = None,
) -> CorpusInfo:
    """Describes what `open_corpus` would open, without reading tokens or tokenizing.

    Raises the same, unless only the token files show it.
    """
    _, info = _find(source, Path(), tokenizer, encode_as)
    check_splits(info, splits, source)
    return info


def check_package(source: str, cache_dir: Path, tokenizer: str = "auto") -> None:
    """Raises UserError if `open_corpus` would need a package that is not there."""
    if source not in NAMED:
        return
    found = find_source(source)
    folder = _folder_names(found.fingerprints(), found.info(tokenizer))[0]
    if not (cache_dir / folder).is_dir():
        import_package(source)


def open_corpus(
    source: str,
    cache_dir: Path,
    tokenizer: str = "auto",
    splits: Collection[str] = (),
    encode_as: str | None = None,
) -> Corpus:
    """Opens a corpus. Text is tokenized once, into a folder of its own in `cache_dir`.

    Only the first of several processes opens it, for all of them. A warning says which
    files of a folder are used and which are left out; another one names a split that is
    the train split.

    Args:
      source: 'sotu' (in the package), 'wikitext103' (needs the package `datasets`), or
        a text file, which is cut into splits (`single_text`), or a folder. The folder
        holds one text, .bin files in nanoGPT's format, or text files with train, val,
        valid, validation or test as a word of their names. .bin files without meta.json
        or meta.pkl must hold GPT-2's tokens.
      cache_dir: folder for the token files of text.
      tokenizer: as for `vocabulary.name_of`, or 'auto': sotu4096 for sotu, gpt2 for
        other text, and the tokenizer in the folder's meta file for token files.
      splits: those that the corpus must have.
      encode_as: a tokenizer. Token files of another one are decoded, and encoded again
        by this one, once, as text is.

    Raises:
      UserError: the source cannot be read as one of these, or lacks a split. Nothing
        has been tokenized then.
    """
    return processes.from_first(
        lambda: _open(source, Path(cache_dir), tokenizer, splits, encode_as)
    )


def made_corpus(
    source: str, cache_dir: Path, tokenizer: str, splits: Collection[str]
) -> Corpus | None:
    """As `open_corpus`, in one process; None for a text that is not tokenized yet."""
    return _open(source, cache_dir, tokenizer, splits, tokenizes=False)


def _open(
    source: str,
    cache_dir: Path,
    tokenizer: str,
    splits: Collection[str],
    encode_as: str | None = None,
    tokenizes: bool = True,
) -> Corpus | None:
    """As `open_corpus`, in one process; without `tokenizes`, as `made_corpus`."""
    found, info = _find(source, cache_dir, tokenizer, encode_as)
    check_splits(info, splits, source)
    if found.notice:
        warn_once(found.notice)
    if isinstance(found, TokenFolder):
        return _told(Corpus(**vars(info), folder=found.folder, cache_dir=cache_dir))
    fingerprints = found.fingerprints()
    folder, *older = (cache_dir / name for name in _folder_names(fingerprints, info))
    if not (tokenizes or folder.is_dir()):
        return None
    if not folder.is_dir():
        with naming(cache_dir, "--config.data.cache_dir"):
            write_token_folder(folder, found, info, fingerprints)
    made = _made(folder, info)
    kept = {"folder": folder, "cache_dir": cache_dir, "older": tuple(older)}
    return _told(Corpus(**vars(made), **kept))


def _told(corpus: Corpus) -> Corpus:
    """The corpus; a warning names a split that is byte for byte the train split.

    Others count the tokens for unknown text, and the ends of documents without a
    token, if pcagpt tokenized it.
    """
    unended = {split: f"{n:,}" for split, n in corpus.unended.items() if n}
    unknown = {
        split: f"{count:,} of the {corpus.counts.get(split, 0):,}"
        for split, count in corpus.unknown.items()
        if count
    }
    if unended:
        warn_once(
            f"ends of documents of {corpus.name} have no token "
            f"({_by_split(unended)}), because nothing names the end of text of "
            f"{corpus.tokenizer}: documents are not separated, and {END_OF_TEXT} "
            'is read as letters; name it as "eos_token" in a tokenizer_config.json '
            "beside that file"
        )
    if unknown:
        warn_once(
            f"tokens of {corpus.name} stand for text that {corpus.tokenizer} has no "
            f"token for ({_by_split(unknown)}): a loss does not tell how well such "
            "text is predicted"
        )
    for split in {*corpus.splits} & {"val", "test"}:
        files = (corpus.folder / f"{name}.bin" for name in ("train", split))
        # An error of the system is told where the files are read.
        with contextlib.suppress(OSError):
            if filecmp.cmp(*files, shallow=False):
                warn_once(
                    f"the {split} split of {corpus.name} is the same as its train "
                    "split, so that a loss on it does not tell how a model predicts "
                    "other text: give another file for it"
                )
    return corpus


def _by_split(numbers: Mapping[str, str]) -> str:
    """{'train': '3', 'val': '1'} → '3 in train, 1 in val'."""
    return ", ".join(f"{number} in {split}" for split, number in numbers.items())


def _find(
    source: str, cache_dir: Path, tokenizer: str, encode_as: str | None
) -> tuple[TextSource | TokenFolder, CorpusInfo]:
    """A source and what it would make; tokens as text if they must be encoded again."""
    found = find_source(source)
    info = found.info(tokenizer)
    if encode_as is None or isinstance(found, TextSource):
        return found, info
    if info.tokenizer_sha256 in (None, vocabulary.describe(encode_as).sha256):
        return found, info  # The numbering is the same, or unknown.
    corpus = Corpus(**vars(info), folder=found.folder, cache_dir=cache_dir)
    text = as_text(corpus, encode_as)
    return text, text.info(encode_as)


def _made(folder: Path, info: CorpusInfo) -> CorpusInfo:
    """Describes a folder that pcagpt made; UserError if a file is lost or damaged."""
    remedy = f"delete the folder {folder}, and the next command makes it again"
    read_json(folder / "meta.json", remedy)  # `read_meta` would ask for another one.
    for name in ("meta.json", *(f"{split}.bin" for split in info.splits)):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is lost: {remedy}")
    return read_meta(folder, info.tokenizer)


def _folder_names(fingerprints: Sequence[str], info: CorpusInfo) -> list[str]:
    """The folder for the tokens of a text, then those of earlier versions.

    `fingerprints`: of the text, as in `TextSource`.
    """
    recipes = _RECIPES if info.tokenizer in RANKS else _FILE_RECIPES
    if vocabulary.drops_characters(info.tokenizer):
        recipes = _DROPPING_RECIPES
    names = []
    for recipe in recipes:
        for fingerprint in dict.fromkeys(fingerprints):
            parts = json.dumps([recipe, fingerprint, info.tokenizer_sha256])
            key = hashlib.sha256(parts.encode()).hexdigest()[:12]
            ending = f"-{vocabulary.label(info.tokenizer)}-{key}"
            names.append(folder_name(info.name, ending))
    return names
