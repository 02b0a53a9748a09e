"""Where text comes from: the embedded corpus, the Hugging Face hub, a local folder."""

import hashlib
import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pcagpt.data.token_files import SPLITS, CorpusInfo, present_splits
from pcagpt.data.tokenizer import packaged_bytes, rank_file
from pcagpt.errors import UserError
from pcagpt.files import sha256_of_file

Document = Iterable[str]  # consecutive blocks of its text, of any size

_SOTU_SHA256 = "6f9e2605f2ca1284be8565dab901767419942184a16fd403b5a1b9f05f884d2d"
_WIKITEXT = ("Salesforce/wikitext", "wikitext-103-raw-v1")
_TEXT_ENDINGS = (".txt", ".raw", ".tokens", ".text")
_SPLIT_WORD = re.compile(
    r"(?:(?P<train>train(?:ing)?)|(?P<val>val(?:id(?:ation)?)?)|(?P<test>test(?:ing)?))\d*"
)


class TextSource(NamedTuple):
    """Text that is not tokenized yet."""

    name: str
    tokenizer: str  # the one that 'auto' selects
    fingerprint: Callable[[], str]  # changes when the text changes
    documents: dict[str, Callable[[], Iterable[Document]]]  # by split

    def info(self, tokenizer: str) -> CorpusInfo:
        """Describes the corpus that a tokenizer (name or 'auto') makes of the text."""
        name = self.tokenizer if tokenizer == "auto" else tokenizer
        vocab_size = rank_file(name).vocab_size
        dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        return CorpusInfo(self.name, vocab_size, dtype, name)


def find_source(source: str) -> TextSource | Path:
    """The text of a source, or its folder of token files; UserError for others."""
    if source == "sotu":
        documents = {split: partial(_sotu_blocks, split) for split in SPLITS}
        return TextSource("sotu", "sotu4096", lambda: _SOTU_SHA256, documents)
    if source == "wikitext103":
        documents = {split: partial(_wikitext_documents, split) for split in SPLITS}
        return TextSource("wikitext103", "gpt2", lambda: "/".join(_WIKITEXT), documents)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        problem = "is a file" if folder.exists() else "does not exist"
        raise UserError(
            f"data source '{source}' {problem}: give 'sotu', 'wikitext103' or a folder "
            "of .bin or text files, as --config.data.source"
        )
    if present_splits(folder):
        return folder
    files = _text_files(folder)
    if not files:
        raise UserError(
            f"nothing recognisable in {folder}: it must hold train.bin and val.bin, or "
            f"text files named by split and ending in {', '.join(_TEXT_ENDINGS)}, such "
            "as train.txt and val.txt"
        )
    name = re.sub(r"[^\w.-]+", "_", folder.resolve().name) or "text"
    documents = {split: partial(map, _read_lines, files[split]) for split in files}
    return TextSource(name, "gpt2", partial(_fingerprint, files), documents)


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


def _wikitext_documents(split: str) -> Iterator[Document]:
    """A raw split of WikiText-103 as one document, byte for byte as in its file."""
    try:
        import datasets
    except ImportError:
        raise UserError(
            "the source 'wikitext103' needs the package `datasets`: "
            "pip install 'pcagpt[datasets]'"
        ) from None
    hub_split = "validation" if split == "val" else split
    try:
        rows = datasets.load_dataset(*_WIKITEXT, split=hub_split)
    except OSError as error:
        raise UserError(
            f"could not load {'/'.join(_WIKITEXT)} ({type(error).__name__}): it needs "
            "the network once; or give --config.data.source a folder with "
            "wiki.train.raw and wiki.valid.raw"
        ) from error
    # The hub's rows are the lines of the file, but a blank line, " \n", became "".
    yield (row["text"] or " \n" for row in rows)


def _text_files(folder: Path) -> dict[str, list[Path]]:
    """The text files of each split, in sorted order."""
    files: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in _TEXT_ENDINGS or not path.is_file():
            continue
        words = map(_SPLIT_WORD.fullmatch, re.split(r"[._-]", path.stem.lower()))
        splits = sorted({word.lastgroup for word in words if word})
        if len(splits) > 1:
            raise UserError(
                f"the name of {path} has more than one split ({', '.join(splits)}): "
                "rename it so that it has only one of train, val, test"
            )
        if splits and path.stat().st_size == 0:
            raise UserError(f"{path} is empty: fill or remove it")
        for split in splits:
            files[split].append(path)
    return {split: paths for split, paths in files.items() if paths}


def _fingerprint(files: dict[str, list[Path]]) -> str:
    """Hash of the text files of each split."""
    digest = hashlib.sha256()
    for split, paths in files.items():
        for path in paths:
            digest.update(f"{split} {sha256_of_file(path)}\n".encode())
    return digest.hexdigest()


def _read_lines(path: Path) -> Document:
    """The lines of a file as they are; UserError if it is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8: byte 0x{line[error.start]:02x} in line "
                    f"{number}; convert it, e.g. with iconv -f latin1 -t utf-8"
                ) from error
