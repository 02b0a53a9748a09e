"""Token files in nanoGPT's format: little-endian ids without a header.

Such a file does not say what it holds. Mostly the values show whether ids have 16 or
32 bits. Where they do not, meta.json must say it. Files that people often mistake for
token files are recognised and refused.
"""

import shlex
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pcagpt.data.content import ZERO_BLOCK, Content, content_of
from pcagpt.data.file_kinds import HEAD_BYTES, foreign_kind, is_text, layout_of
from pcagpt.data.meta import DTYPES, META_FILES, CorpusInfo, narrowest
from pcagpt.data.token_array import TokenArray, pieces
from pcagpt.data.tokenizer import END_OF_TEXT, load_tokenizer
from pcagpt.errors import UserError, naming, warn_once

_ENOUGH_BYTES = 128  # Shorter files do not show their width reliably.
_FEW_BYTES = 32  # enough to doubt that uint16 ids are 0 at every second place
_SAMPLE, _SAMPLES = 1024, 16  # rows of 8 bytes, number of samples
_LONG_END = 1024  # zeros
_MOST_HOLES = 3  # of a file that was not filled; padding has more
# Windows of ids that are decoded and encoded again, and the share of all pairs of
# neighbours that must come back. GPT-2's tokens reach 0.99, other ids at most 0.9.
_WINDOWS, _WINDOW, _SHARE = 8, 1024, 0.95


class TokenFile(NamedTuple):
    """A token file all of whose ids are in the vocabulary.

    sha256: of the ids as uint16 if all of them fit, as uint32 otherwise.
    """

    dtype: np.dtype
    length: int
    sha256: str


def check_tokens(path: Path, info: CorpusInfo, cache_dir: Path) -> TokenFile:
    """Checks `<split>.bin`; reads the whole file, once until it changes.

    Args:
      path: of an existing file.
      info: what is known of the corpus in the folder of the file.
      cache_dir: see `content_of`.

    Raises:
      UserError: the file is too short or truncated, holds no ids or an id
        >= vocab_size, or contradicts its meta file.
    """
    stated = info.counts.get(path.stem)
    # If the meta file states width and count, no guess is made.
    is_proven = info.dtype is not None and stated is not None
    if not is_proven:
        _refuse_foreign(path)
    content = content_of(path, cache_dir)
    if info.hashes.get(path.stem, content.sha256) != content.sha256:
        raise UserError(
            f"{path} was changed or damaged since pcagpt tokenized its text: delete "
            f"the folder {path.parent}, and give the text as --config.data.source to "
            "have it tokenized again"
        )
    if content.size == 0:
        raise UserError(f"{path} is empty: write its tokens again")
    name = _dtype(path, content, info, cache_dir)
    dtype, highest = DTYPES[name], content.highest[name]
    if highest is None:
        raise UserError(
            f"{path} is truncated: it has {content.size} bytes, which must be a "
            f"multiple of {dtype.itemsize}, the size of a {name}; write its tokens "
            "again, or correct its dtype in meta.json"
        )
    length = content.size // dtype.itemsize
    if stated is not None and length != stated:
        raise UserError(
            f"{path} is truncated or belongs to other tokens: it has {content.size} "
            f"bytes, but meta.json says {stated!r} tokens of {dtype.itemsize} bytes; "
            'write them again, or correct "tokens"; if pcagpt tokenized a text into '
            f"{path.parent}, delete this folder to have it tokenized again"
        )
    if length == 1:
        raise UserError(
            f"{path} holds a single token: at least 2 are needed, to predict one from "
            "the other; give more text"
        )
    if not is_proven and not (name == "uint32" and highest < info.vocab_size):
        _refuse_layout(path, name, content, info)
    if highest >= info.vocab_size:
        raise _beyond(path, name, info)
    if not is_proven:
        _refuse_unfilled(path, TokenArray(path, dtype))
        _refuse_holes(path, content, dtype)
    if info.is_assumed and not _are_tokens(TokenArray(path, dtype), info.tokenizer):
        raise UserError(
            f"{path} seems to hold other ids than {info.tokenizer}'s, which are assumed"
            ' without a meta file: add meta.json beside it with {"vocab_size": …}, or '
            f"set --config.data.tokenizer={info.tokenizer} if they are"
        )
    is_narrow = name == "uint32" and content.narrow_sha256 is not None
    sha256 = content.narrow_sha256 if is_narrow else content.sha256
    return TokenFile(dtype, length, sha256)


def _refuse_foreign(path: Path) -> None:
    """Raises for the beginning of another kind of file."""
    with naming(path), path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if kind := foreign_kind(head):
        raise UserError(f"{path} holds no token ids, it is {kind}")
    if _is_litdata(path):
        raise UserError(
            f"{path} holds no token ids, it is a chunk of litdata: read its items with "
            "StreamingDataset, and write their ids"
        )
    if len(head) >= 16 and is_text(head):
        raise UserError(
            f"{path} holds no token ids, it is text: name it {path.stem}.txt, in a "
            "folder without .bin files, to have it tokenized"
        )


def _is_litdata(path: Path) -> bool:
    """Whether a file begins with the number of its items and where each one starts.

    The last place is the end of the file, so ids do not look like this.
    """
    size = path.stat().st_size
    with naming(path), path.open("rb") as file:
        items, first = (int.from_bytes(file.read(4), "little") for _ in range(2))
        end = 4 * (items + 1)
        file.seek(min(end, size))
        last = int.from_bytes(file.read(4), "little")
    return items > 0 and (first, last) == (end + 4, size)


def _dtype(path: Path, content: Content, info: CorpusInfo, cache_dir: Path) -> str:
    """The key of DTYPES that a file's ids have: one for all splits of a corpus.

    meta.json states it, or the values show it. UserError if they contradict each other,
    or if nothing tells uint16 from uint32.
    """
    fitting, is_long = _fitting(content, info), content.size >= _ENOUGH_BYTES
    counted = _counted(path, content, info)
    least = narrowest(info.vocab_size)
    if least == "uint32" and "uint16" in (info.dtype, None if info.dtype else counted):
        warn_once(
            f"{path} is read as uint16, which holds no id above 65,535, but its "
            f"vocabulary has {info.vocab_size:,} tokens: if higher ids were written, "
            "they are others now; write the tokens again as uint32"
        )
    if info.dtype and counted == info.dtype:
        return info.dtype
    if is_long and content.highest["uint16"] and "int64" in fitting:
        named = info.dtype or narrowest(info.vocab_size)
        raise _other_layout(path, "int64", named, info.vocab_size)
    if info.dtype:
        # Ids of a small vocabulary fit both widths. The stated one is then believed,
        # unless their number is that of wide ids.
        told = (counted, narrowest(info.vocab_size))
        is_wide = "uint32" in fitting and "uint32" in told
        found = "uint32" if is_wide else "uint16"
        is_wrong = is_wide if info.dtype == "uint16" else fitting == ["uint16"]
        if is_wrong:
            raise UserError(
                f"{path} looks like {found}, not {info.dtype}: correct dtype in "
                f"meta.json, or write the tokens again{_if_right(path)}"
            )
        fits_wide = "uint32" in fitting and content.highest["uint16"]
        if info.dtype == "uint16" and fits_wide and is_long:
            warn_once(
                f"{path} has id 0 at every second place, like uint32 ids that are read "
                f"as uint16: correct dtype in meta.json{_if_right(path)}"
            )
        return info.dtype
    if counted:
        return counted
    if narrowest(info.vocab_size) == "uint32":
        return "uint32"  # Uint16 cannot hold every id, so it must be stated.
    seems_wide = "uint32" in fitting and content.size >= _FEW_BYTES
    short = "uint32" if seems_wide and content.highest["uint32"] else None
    own = _width(path, content, info) if is_long else short
    others = (path.with_name(f"{split}.bin") for split in info.splits)
    for other in sorted(others, key=lambda file: file.stat().st_size, reverse=True):
        found = _width(other, content_of(other, cache_dir), info)
        if found and own not in (None, found):
            raise UserError(
                f"{path} looks like {own}, but {other} like {found}, and ids of all "
                "splits have one width: write one of them again, or "
                f"{_statement(path, info)}"
            )
        if found:
            return found
    return "uint16"


def _fitting(content: Content, info: CorpusInfo) -> list[str]:
    """The widths, narrow to wide, at which each number is in the vocabulary.

    A file of uint32 ids can also be read as uint16. A file of uint16 ids can seldom be
    read as uint32: two of them make a number beyond the vocabulary, unless every second
    one is 0.
    """
    return [
        name
        for name, highest in content.highest.items()
        if highest is not None and highest < info.vocab_size
    ]


def _counted(path: Path, content: Content, info: CorpusInfo) -> str | None:
    """The width at which a file has as many ids as meta.json states.

    If no dtype is stated, another width at which the ids are in the vocabulary goes
    before: the count is wrong then.
    """
    stated = info.counts.get(path.stem, 0)
    fitting = () if info.dtype else DTYPES.keys() & _fitting(content, info)
    widths = {DTYPES[name].itemsize * stated: name for name in fitting or DTYPES}
    return widths.get(content.size)


def _width(path: Path, content: Content, info: CorpusInfo) -> str | None:
    """The width that a file shows; None if it shows nothing.

    UserError if it may have either.
    """
    if counted := _counted(path, content, info):
        return counted
    fitting = _fitting(content, info)
    if not fitting or not content.highest["uint16"]:
        return None
    if "uint32" not in fitting:
        return "uint16"
    raise UserError(
        f"{path} holds either uint32 ids, or uint16 ids with 0 at every second "
        f"place: {_statement(path, info)}"
    )


def _statement(path: Path, info: CorpusInfo) -> str:
    """How a person states the width of a corpus's ids."""
    if any(path.with_name(name).is_file() for name in META_FILES):
        return 'say which in meta.json beside it: {"dtype": "uint16"} or "uint32"'
    return (
        f'say which in meta.json beside it: {{"vocab_size": {info.vocab_size}, '
        f'"tokenizer": "{info.tokenizer}", "dtype": "uint16"}} or "uint32"'
    )


def _refuse_layout(path: Path, name: str, content: Content, info: CorpusInfo) -> None:
    """Raises UserError if samples of the file look like numbers of another layout."""
    octets = TokenArray(path, np.dtype(np.uint8))
    rows = len(octets) // 8
    if 8 * rows < _ENOUGH_BYTES:
        return
    size = min(_SAMPLE, rows)
    count = min(_SAMPLES, rows // size)  # so that they do not overlap
    starts = 8 * np.linspace(0, rows - size, count).astype(int)
    sample = np.concatenate([octets[at : at + 8 * size] for at in starts])
    layout = layout_of(sample.reshape(-1, 8), info.vocab_size)
    # If the ids fit two widths, the choice between them is made already.
    if layout not in (None, name, *_fitting(content, info)):
        raise _other_layout(path, layout, name, info.vocab_size)


def _other_layout(path: Path, layout: str, name: str, vocab_size: int) -> UserError:
    right = DTYPES[narrowest(vocab_size)]
    return UserError(
        f"{path} looks like {layout}, not little-endian {name}: write its ids again, "
        f"as with ids.astype('<u{right.itemsize}').tofile(…){_if_right(path)}"
    )


def _if_right(path: Path) -> str:
    """Tells a person how to overrule a wrong guess."""
    return (
        '; or, if it is right, add to meta.json its "dtype" and the number of its ids, '
        f'"tokens": {{"{path.stem}": …}}'
    )


def _refuse_unfilled(path: Path, tokens: TokenArray) -> None:
    """Raises UserError for an end of zeros like that of a preallocated, unfilled file.

    It is long, and much longer than every other series of zeros.
    """
    least = min(_LONG_END, max(_ENOUGH_BYTES // 2, len(tokens) // 20))
    if tokens[-least:].any() or len(tokens) < least:
        return
    last, longest = -1, 0  # place of the last id that is not 0, longest series before
    start = 0
    for chunk in pieces(tokens):
        places = np.flatnonzero(chunk) + start
        start += len(chunk)
        if len(places):
            longest = max(longest, int(np.diff(places, prepend=last).max()) - 1)
            last = int(places[-1])
    end, size = len(tokens) - 1 - last, (last + 1) * tokens.dtype.itemsize
    if end > 4 * longest:
        remedy = f"cut them off with: truncate -s {size} {shlex.quote(str(path))}"
        raise UserError(
            f"{path} ends in {end:,} zeros after {last + 1:,} ids, like a file that "
            f"was not filled: {remedy if size else 'write its ids'}{_if_right(path)}"
        )


def _refuse_holes(path: Path, content: Content, dtype: np.dtype) -> None:
    """Raises UserError for parts of zeros like those that a program did not fill.

    They are few, long, and much longer than all other series of zeros.
    """
    least = _LONG_END * dtype.itemsize
    holes = [one for one in content.zeros if one[1] - one[0] >= least]
    others = [stop - start for start, stop in content.zeros if stop - start < least]
    if not 0 < len(holes) <= _MOST_HOLES:
        return
    size = min(stop - start for start, stop in holes)
    if size > 4 * max(others, default=ZERO_BLOCK):
        raise UserError(
            f"{path} holds at least {size // dtype.itemsize:,} zeros in a row near id "
            f"{holes[0][0] // dtype.itemsize:,}, like a file that was not filled: "
            f"write its ids again{_if_right(path)}"
        )


def _beyond(path: Path, name: str, info: CorpusInfo) -> UserError:
    """Names the first id outside the vocabulary."""
    position, highest = 0, 0
    for chunk in pieces(TokenArray(path, DTYPES[name])):
        beyond = np.flatnonzero(chunk >= info.vocab_size)
        if len(beyond):
            position, highest = position + int(beyond[0]), chunk[beyond[0]]
            break
        position += len(chunk)
    return UserError(
        f"{path} holds id {highest} at position {position}, but the "
        f"vocabulary size is {info.vocab_size}: correct vocab_size or dtype (now "
        f"{name}{'' if info.dtype else ', as none is stated'}) in meta.json beside it, "
        "or write the tokens again"
    )


def _are_tokens(tokens: TokenArray, tokenizer: str) -> bool:
    """Decoding and encoding gives the tokens back, as a tokenizer does with its own.

    A sample of some thousand tokens is tried.
    """
    encoding = load_tokenizer(tokenizer)
    size, kept, total = min(_WINDOW, len(tokens)), 0, 0
    for start in np.linspace(0, len(tokens) - size, _WINDOWS).astype(int):
        ids = tokens[start : start + size].tolist()
        text = encoding.decode_bytes(ids).decode("utf-8", "replace")
        again = encoding.encode(text, allowed_special={END_OF_TEXT})
        pairs, pairs_again = Counter(pairwise(ids)), Counter(pairwise(again))
        kept += (pairs & pairs_again).total()
        total += pairs.total()
    return kept >= _SHARE * total
