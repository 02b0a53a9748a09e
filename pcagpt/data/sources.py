"""Where text comes from: the package, the Hugging Face hub, a folder or a file."""

import errno
import lzma
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from pcagpt.data import content, single_text, text_files, vocabulary
from pcagpt.data.meta import (
    META_FILES,
    SPLITS,
    CorpusInfo,
    odd_splits,
    present_splits,
    read_meta,
)
from pcagpt.data.tokenizer import packaged_bytes
from pcagpt.errors import FAILING, UserError, naming
from pcagpt.files import odd_kind

Document = Iterable[str]  # consecutive blocks of its text, of any size

_SOTU_SHA256 = "6f9e2605f2ca1284be8565dab901767419942184a16fd403b5a1b9f05f884d2d"
_WIKITEXT = ("Salesforce/wikitext", "wikitext-103-raw-v1")


class TextSource(NamedTuple):
    """Text that is not tokenized yet."""

    name: str
    tokenizer: str  # the one that 'auto' selects
    # The first changes when the text changes; the others are those of earlier versions.
    fingerprints: Callable[[], tuple[str, ...]]
    documents: dict[str, Callable[[], Iterable[Document]]]  # by split
    notice: str = ""  # as in `TokenFolder`, or a line about an unused namesake

    def info(self, tokenizer: str) -> CorpusInfo:
        """Describes the corpus that a tokenizer (as for `open_corpus`) makes."""
        name = self.tokenizer if tokenizer == "auto" else vocabulary.name_of(tokenizer)
        vocab_size, sha256, _ = vocabulary.describe(name)
        return CorpusInfo(
            name=self.name,
            splits=tuple(self.documents),
            vocab_size=vocab_size,
            tokenizer=name,
            tokenizer_sha256=sha256,
        )


class TokenFolder(NamedTuple):
    """A folder of token files."""

    folder: Path

    def info(self, tokenizer: str) -> CorpusInfo:
        """Describes the corpus, as `read_meta` does."""
        return read_meta(self.folder, tokenizer)

    @property
    def notice(self) -> str:
        """A line that names what is not read as tokens; '' if there is nothing."""
        used = {f"{split}.bin" for split in SPLITS} | {*META_FILES, content.NAME}
        others = text_files.other_names(self.folder, used)
        return (
            f"tokens in {self.folder}; not read as tokens: {others}" if others else ""
        )


def absolute_source(source: str) -> str:
    """The source as a name or an absolute path."""
    return source if source in NAMED else str(Path(source).resolve())


def find_source(source: str) -> TextSource | TokenFolder:
    """The text of a source, or its token files; UserError for others."""
    if not source:
        raise UserError(
            "data.source is empty: give --config.data.source=FOLDER; . is the current "
            "folder"
        )
    if source in NAMED:
        tokenizer, version, read, _ = NAMED[source]
        documents = {split: partial(read, split) for split in SPLITS}
        line = _namesake(source)
        return TextSource(source, tokenizer, lambda: (version,), documents, line)
    folder = Path(source)
    endings = ", ".join(text_files.ENDINGS)
    if folder.is_file() and folder.suffix.lower() in text_files.ENDINGS:
        return _single_text(folder)
    if not folder.is_dir():
        absent = f"does not end in {endings}" if folder.exists() else "does not exist"
        kind = odd_kind(folder)
        problem = f"is {kind}" if kind else absent
        raise UserError(
            f"data source '{source}' {problem}: give {', '.join(map(repr, NAMED))}, a "
            "text file, or a folder of .bin or text files, as --config.data.source"
        )
    if present_splits(folder):
        return TokenFolder(folder)
    files = text_files.find_text_files(folder)
    if not files.of_split and len(files.without_split) == 1:
        return _single_text(files.without_split[0], files.left_out)
    if not files.of_split:
        raise UserError(
            f"nothing recognisable in {folder}: it must hold train.bin and val.bin, or "
            f"text files named by split and ending in {endings}, "
            "such as train.txt and val.txt, or one text file"
            f"{odd_splits(folder)}"
        )
    documents = {
        split: partial(map, text_files.read_text, paths)
        for split, paths in files.of_split.items()
    }
    fingerprints = partial(text_files.text_hashes, files)
    return TextSource(_name(folder), "gpt2", fingerprints, documents, str(files))


def _single_text(path: Path, beside: Sequence[str] = ()) -> TextSource:
    """A text file as a source; each split is one document.

    `beside`: the names in its folder. The notice lists the others.
    """

    def documents(start: int, end: int) -> list[Document]:
        return [single_text.read_part(path, start, end)]

    def fingerprints() -> tuple[str]:
        return (single_text.text_hash(path),)

    others = text_files.some_of([name for name in beside if name != path.name])
    line = single_text.notice(path) + (
        f"; not read as text: {others}" if others else ""
    )
    places = single_text.parts(path).items()
    of_split = {split: partial(documents, *place) for split, place in places}
    return TextSource(_name(path), "gpt2", fingerprints, of_split, line)


def _name(path: Path) -> str:
    """The name of a corpus that a person has in a file or folder."""
    return re.sub(r"[^\w.-]+", "_", path.resolve().name) or "text"


def _namesake(source: str) -> str:
    """A line that says that a folder of this name here is not used; '' without one."""
    if not Path(source).exists():
        return ""
    kind = "folder" if Path(source).is_dir() else "file"
    return (
        f"data source '{source}' is the known corpus, not the {kind} {source} here: "
        f"give --config.data.source=./{source} for the {kind}"
    )


def sotu_documents(split: str) -> list[str]:
    """Returns the addresses of a split of `sotu`, each with its line end.

    Address i, in the order of the file, is in test if i % 20 == 0, in val if
    i % 20 == 10, and in train otherwise: every split has addresses of all periods.
    """
    text = lzma.decompress(packaged_bytes("sotu.txt.xz", _SOTU_SHA256)).decode()
    # splitlines() would also cut at other characters than the line feed.
    lines = [f"{line}\n" for line in text.split("\n") if line.strip()]
    split_of = {0: "test", 10: "val"}
    return [
        line for i, line in enumerate(lines) if split_of.get(i % 20, "train") == split
    ]


def _sotu_blocks(split: str) -> Iterable[Document]:
    """Each address as a document of one block."""
    return [[address] for address in sotu_documents(split)]


def import_package(source: str) -> None:
    """Raises UserError if a source in NAMED needs a package that is not there."""
    NAMED[source].check()


def _import_datasets() -> ModuleType:
    try:
        import datasets
    except ImportError:
        raise UserError(
            "the source 'wikitext103' needs the package `datasets`: "
            "pip install 'pcagpt[datasets]'"
        ) from None
    return datasets


def _wikitext_documents(split: str) -> Iterator[Document]:
    """A raw split of WikiText-103 as one document, byte for byte as in its file."""
    datasets = _import_datasets()
    hub_split = "validation" if split == "val" else split
    try:
        with naming("the cache of the package `datasets`", "HF_HOME"):
            rows = datasets.load_dataset(*_WIKITEXT, split=hub_split)
    except OSError as error:
        if error.errno in {*FAILING, errno.EACCES, errno.EROFS}:  # not of the network
            raise
        raise UserError(
            f"could not load {'/'.join(_WIKITEXT)} ({type(error).__name__}): it needs "
            "the network once; or give --config.data.source a folder with "
            "wiki.train.raw and wiki.valid.raw"
        ) from error
    # The hub's rows are the lines of the file, but a blank line, " \n", became "".
    yield (row["text"] or " \n" for row in rows)


class _Named(NamedTuple):
    """A source with a name.

    tokenizer: the one that 'auto' selects; version: hash or version of the text; read:
    the documents of a split; check: raises UserError if a package is missing.
    """

    tokenizer: str
    version: str
    read: Callable[[str], Iterable[Document]]
    check: Callable[[], object] = lambda: None


NAMED = {
    "sotu": _Named("sotu4096", _SOTU_SHA256, _sotu_blocks),
    "wikitext103": _Named(
        "gpt2", "/".join(_WIKITEXT), _wikitext_documents, _import_datasets
    ),
}
