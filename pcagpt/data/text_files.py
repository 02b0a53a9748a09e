"""Folders of text files: selects the files of each split and checks every byte."""

import codecs
import dataclasses
import hashlib
import re
import shlex
from collections.abc import Collection, Iterator
from pathlib import Path

from pcagpt.data.file_kinds import HEAD_BYTES, foreign_kind
from pcagpt.data.meta import SPLITS
from pcagpt.data.tokenizer import END_OF_TEXT
from pcagpt.errors import UserError, naming
from pcagpt.file_hashes import read_once

ENDINGS = (".txt", ".raw", ".tokens", ".text")
_SPLIT_WORD = re.compile(
    r"(?:(?P<train>train(?:ing)?)|(?P<val>val(?:id(?:ation)?)?)|(?P<test>test(?:ing)?))\d*"
)
_PLAIN_NAME = re.compile(r"[\w.+@%=/-]+")  # of a list that is separated by commas
_BLOCK_BYTES = 1 << 20
_BOM = codecs.BOM_UTF8
# The longer mark comes first: UTF-32's begins with UTF-16's.
_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
# Pairs of ASCII bytes between two marks.
_PAIRS = {
    "ISO-2022-JP": re.compile(rb"\x1b\$[@B](?:[!-~]{2})+\x1b\([BJ]"),
    "ISO-2022-KR": re.compile(rb"\x1b\$\)C.*?\x0e(?:[!-~]{2})+\x0f", re.DOTALL),
}
# Which of four bytes are often 0.
_WIDE = {
    (False, True, False, True): "UTF-16LE",
    (True, False, True, False): "UTF-16BE",
    (False, True, True, True): "UTF-32LE",
    (True, True, True, False): "UTF-32BE",
}


@dataclasses.dataclass(frozen=True)
class TextFiles:
    """The text files in a folder.

    of_split: those of each split, in sorted order; without_split: those whose names
    have no split; left_out: all names that belong to no split, also of other files.
    """

    folder: Path
    of_split: dict[str, list[Path]]
    without_split: list[Path]
    left_out: list[str]

    def __str__(self) -> str:
        """As in 'text in wiki: train from a.train.txt; not read as text: notes.md'."""
        used = (
            f"{split} from {some_of([path.name for path in paths])}"
            for split, paths in self.of_split.items()
        )
        rest = f"; not read as text: {some_of(self.left_out)}" if self.left_out else ""
        return f"text in {self.folder}: {', '.join(used)}{rest}"


def find_text_files(folder: Path) -> TextFiles:
    """The text files in a folder; UserError for a name or a size that cannot be right.

    Ignores hidden files.
    """
    of_split: dict[str, list[Path]] = {split: [] for split in SPLITS}
    without_split, left_out = [], []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        words = map(_SPLIT_WORD.fullmatch, re.split(r"[\W_]+", path.stem.lower()))
        splits = sorted({word.lastgroup for word in words if word})
        is_text = path.suffix.lower() in ENDINGS and path.is_file()
        if not is_text or not splits:
            left_out.append(path.name + "/" * path.is_dir())
            without_split += [path] if is_text else []
            continue
        if len(splits) > 1:
            raise UserError(
                f"the name of {path} has more than one split ({', '.join(splits)}): "
                "rename it so that it has only one of train, val, test"
            )
        if path.stat().st_size in (0, len(_BOM)) and _is_blank(path):
            raise UserError(f"{path} is empty: fill or remove it")
        of_split[splits[0]].append(path)
    of_split = {split: paths for split, paths in of_split.items() if paths}
    return TextFiles(folder, of_split, without_split, left_out)


def other_names(folder: Path, used: Collection[str]) -> str:
    """The names in a folder besides these and hidden ones, with commas; '' for none."""
    names = (p.name + "/" * p.is_dir() for p in sorted(folder.iterdir()))
    return some_of([name for name in names if name not in used and name[0] != "."])


def text_hashes(files: TextFiles) -> tuple[str, str]:
    """Two hashes of all files and their splits: today's and that of earlier versions.

    They differ if some text has marks that earlier versions took for ordinary text.

    Reads every file. Raises UserError if one is not plain UTF-8.
    """
    today, earlier = hashlib.sha256(), hashlib.sha256()
    for split, paths in files.of_split.items():
        for path in paths:
            content, is_marked = check(path)
            mark = " without its marks" if is_marked else ""
            today.update(f"{split} {content}{mark}\n".encode())
            earlier.update(f"{split} {content}\n".encode())
    return today.hexdigest(), earlier.hexdigest()


def read_text(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file as they are, without a byte order mark."""
    with naming(path), path.open(encoding="utf-8-sig", newline="\n") as file:
        yield from file


@read_once
def check(path: Path) -> tuple[str, bool]:
    """(sha256 of a file, whether it has a byte order mark or `<|endoftext|>`).

    UserError unless it is UTF-8 without NUL.
    """
    digest, decoder = hashlib.sha256(), codecs.getincrementaldecoder("utf-8")()
    line, end, is_marked = 1, b"", False
    with naming(path), path.open("rb") as file:
        while True:
            block = file.read(_BLOCK_BYTES)
            if not end:  # It is the first block.
                _refuse_other(path, block[:HEAD_BYTES])
                is_marked = block.startswith(_BOM)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                # The decoder had up to three bytes of the block before.
                at = error.start - (len(error.object) - len(block))
                line += block.count(b"\n", 0, max(at, 0))
                raise _not_utf8(path, error, line) from None
            if (at := block.find(b"\0")) >= 0:
                line += block.count(b"\n", 0, at)
                raise UserError(
                    f"{path} is not text: it has a NUL byte in line {line}; if the "
                    "rest is right, remove them with: tr -d '\\000' < "
                    f"{_quoted(path)} > NEW"
                )
            if not block:
                return digest.hexdigest(), is_marked
            digest.update(block)
            joined = end + block
            is_marked = is_marked or END_OF_TEXT.encode() in joined
            line += block.count(b"\n")
            end = joined[-len(END_OF_TEXT) :]


def _refuse_other(path: Path, head: bytes) -> None:
    """Raises UserError if a file does not begin like text in UTF-8.

    It may be no text at all, or UTF-16, UTF-32 or ISO-2022. UTF-16 and UTF-32 need no
    mark.
    """
    found = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    if not found and (kind := foreign_kind(head)):
        raise UserError(f"{path} is not text, it is {kind}")
    # The high bytes of the commonest characters are 0, the low bytes almost never.
    zeros = [head[start::4].count(0) for start in range(4)]
    wide = tuple(count > 4 + sum(zeros) / 20 for count in zeros)
    paired = (name for name, pattern in _PAIRS.items() if pattern.search(head))
    found = found or _WIDE.get(wide) or next(paired, None)
    if found:
        raise UserError(
            f"{path} is {found}, not UTF-8: convert it with: iconv -f {found} -t UTF-8 "
            f"{_quoted(path)} > NEW"
        )


def _not_utf8(path: Path, error: UnicodeDecodeError, line: int) -> UserError:
    """Says what a file may be instead of UTF-8, and the command that converts it."""
    with path.open("rb") as file:
        head = file.read(_BLOCK_BYTES)
    byte, end = error.object[error.start], error.object[error.start :]
    said = f"{path} is not UTF-8: byte 0x{byte:02x} in line {line}; "
    is_cut = error.reason == "unexpected end of data"
    # A single such byte can also be the last letter of Western European text.
    if is_cut and (len(end) > 1 or byte < 0xE0):
        whole = path.stat().st_size - len(end)
        return UserError(
            f"{said}its last character is cut off, so it is truncated UTF-8: write it "
            f"again, or leave the rest of this character out with: head -c {whole} "
            f"{_quoted(path)} > NEW"
        )
    text = head.decode("utf-8", "replace")
    wrong = text.count("\ufffd")
    if sum(character > "\x7f" for character in text) > 2 * wrong:
        return UserError(
            f"{said}the rest is UTF-8, so the file is damaged; leave such bytes out "
            f"with: iconv -c -f UTF-8 -t UTF-8 {_quoted(path)} > NEW"
        )
    # In Western European text, most such letters stand alone, and no byte is a control.
    neighbours = len(b"".join(re.findall(rb"[\x80-\xff]{2,}", head)))
    controls = len(re.findall(rb"[\x00-\x08\x0e-\x1f]", head))
    if 2 * neighbours > sum(byte > 0x7F for byte in head) or controls > len(head) / 100:
        return UserError(
            f"{said}convert it with: iconv -f ENCODING -t UTF-8 {_quoted(path)} > NEW, "
            "where ENCODING is perhaps GB18030, SHIFT_JIS, EUC-KR, CP1251 or UTF-16LE"
        )
    # These bytes are letters and quotation marks in Windows only.
    western = "CP1252" if re.search(rb"[\x80-\x9f]", head) else "ISO-8859-1"
    return UserError(
        f"{said}{'if it is truncated UTF-8, write it again; ' * is_cut}"
        f"if it is Western European text, convert it with: iconv -f {western} -t UTF-8 "
        f"{_quoted(path)} > NEW"
    )


def _is_blank(path: Path) -> bool:
    """Whether a file has no byte, or only a byte order mark."""
    return path.read_bytes() in (b"", _BOM)


def _quoted(path: Path) -> str:
    """The path as a word of a shell's command."""
    return shlex.quote(str(path))


def some_of(names: list[str]) -> str:
    """At most eight names, quoted unless plain, and the number of further ones."""
    names = [n if _PLAIN_NAME.fullmatch(n) else repr(n) for n in names]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
