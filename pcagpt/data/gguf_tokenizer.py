"""The tokenizer in a GGUF file, as llama.cpp would use it: transformers makes it.

transformers ignores some of what a file says of its tokenizer. What changes tokens is
done here, or the file is refused.
"""

import re
from pathlib import Path
from typing import Any

from pcagpt.data import gguf_header
from pcagpt.data.file_tokenizer import FileTokenizer
from pcagpt.data.gguf_header import TOKENIZER, TokenizerFields
from pcagpt.data.tokenizer import END_OF_TEXT
from pcagpt.data.vocabulary_files import WHOLE, ids_by_text
from pcagpt.errors import OF_NO_FILE, UserError

_KINDS = ("gpt2", "llama", "gemma4")  # by bytes, and two of SentencePiece
# How llama.cpp names a cut of text before its merges: these are GPT-2's.
_CUT_AS_GPT2 = {
    *("a.x-4.0", "exaone4", "gigachat", "gpt-2", "granite-docling", "jais", "mellum"),
    *("mpt", "olmo", "phi-2", "trillion"),
}
# With these cuts, a piece that is a token needs no merges.
_WHOLE_PIECES = {
    *("falcon-h1", "falcon3", "jina-v5-nano", "lfm2", "llama-bpe", "llama-v3"),
    *("llama3", "midm-2.0", "pixtral", "tekken"),
}
# Fields that transformers reads, that this module reads, or that change no text's ids.
_HEEDED = re.compile(
    r"model|pre|tokens|token_type(_count)?|scores|merges|(\w+_)?token_ids?|"
    r"add_(bos|eos|sep)_token|suppress_tokens"
)
_PREFIX = "add_space_prefix"
_FOUND_FIRST = (2, 3, 4)  # types of tokens: unknown, control, user-defined


def is_gpt2s_kind(fields: TokenizerFields) -> bool:
    """Whether a file cuts and joins a text as GPT-2 does.

    No token but the last, the end of a text, may be found in a text before it is cut,
    and nothing may be put before a text.
    """
    types = fields.others.get("token_type") or []
    if not isinstance(types, list) or fields.others.get(_PREFIX):
        return False
    found_first = {number for number, kind in enumerate(types) if kind in _FOUND_FIRST}
    is_cut_first = found_first <= {len(fields.tokens) - 1}
    return fields.kind == ("gpt2", "gpt-2") and is_cut_first and not _ignored(fields)


def is_changed(file: Path) -> bool:
    """Whether `load` does not leave the tokenizer as transformers makes it."""
    fields = gguf_header.tokenizer_fields(file)
    (kind, pre), of_file = fields.kind, gguf_header.header(file).fields
    has_prefix = not str(of_file.get("general.architecture")).startswith("gemma")
    is_plain = kind == "llama" and has_prefix and fields.others.get(_PREFIX) is False
    return is_plain or (kind == "gpt2" and pre in _WHOLE_PIECES)


def load(file: Path) -> FileTokenizer:
    """The tokenizer in a file; UserError if it would be another one."""
    import tokenizers

    fields, id_of_text = gguf_header.tokenizer_fields(file), ids_by_text(file)
    if ignored := _ignored(fields):
        raise _refusal(file, ignored)
    made = _made(file)
    (kind, pre), prefix = fields.kind, fields.others.get(_PREFIX)
    if kind == "gpt2" and pre in _CUT_AS_GPT2:
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "gpt2" and pre in _WHOLE_PIECES:
        made.model.ignore_merges = True
    if kind == "llama" and prefix is False:
        decoders = tokenizers.decoders
        parts = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
        made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
        made.pre_tokenizer, made.decoder = None, decoders.Sequence(list(parts))
    if prefix is not None and prefix != _puts_prefix(made):
        raise _refusal(file, f"{TOKENIZER}{_PREFIX} is {prefix}")
    end = id_of_text.get(END_OF_TEXT, fields.end)
    return FileTokenizer(file, made, range(len(fields.tokens)), end)


def _made(file: Path) -> Any:
    """What transformers makes of a file; UserError if it cannot."""
    try:
        import transformers

        with gguf_header.alone(file) as folder:
            return transformers.AutoTokenizer.from_pretrained(
                str(folder),
                gguf_file=file.name,
                local_files_only=True,
                trust_remote_code=False,
            ).backend_tokenizer
    except OF_NO_FILE:
        raise
    # The package and what it calls raise errors of many types.
    except Exception as error:
        raise _refusal(file, " ".join(str(error).split())[:120]) from None


def _refusal(file: Path, reason: str) -> UserError:
    return UserError(
        f"transformers does not make the tokenizer of {file} ({reason}): name the "
        f"{WHOLE} of its model as --config.data.tokenizer"
    )


def _ignored(fields: TokenizerFields) -> str | None:
    """What a file says and transformers ignores, so tokens differ; None if nothing."""
    kind, pre = fields.kind
    if kind not in _KINDS:
        return f"{TOKENIZER}model is {kind}"
    if kind == "gpt2" and pre not in _CUT_AS_GPT2 | _cuts_of_transformers():
        return f"{TOKENIZER}pre is {pre}"
    names = (
        name
        for name, value in fields.others.items()
        if value and name != _PREFIX and not _HEEDED.fullmatch(name)
    )
    return next((f"it has {TOKENIZER}{name}" for name in names), None)


def _cuts_of_transformers() -> set[str]:
    """The names of cuts that transformers knows; GPT-2's stands for all others there.

    Older versions have no list of them.
    """
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping
    except ImportError:
        return set()
    return set(getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", ()))


def _puts_prefix(made: Any) -> bool:
    """Whether a tokenizer puts a space before a text."""
    text = made.normalizer.normalize_str("a") if made.normalizer else "a"
    cut = made.pre_tokenizer
    pieces = cut.pre_tokenize_str(text) if cut else [(text, None)]
    return pieces[0][0] != "a"
