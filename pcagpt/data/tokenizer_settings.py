"""What the files beside a tokenizer say, and whether they contradict it.

They name its class in transformers, its special tokens and the end of a text.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pcagpt.data.tokenizer import END_OF_TEXT
from pcagpt.data.vocabulary_files import (
    DAMAGED,
    MERGES,
    VOCAB,
    WHOLE,
    added_tokens,
    byte_letters,
    fields_of,
    ids_by_text,
)
from pcagpt.errors import UserError
from pcagpt.json_files import read_json

CONFIG, ADDED = "tokenizer_config.json", "added_tokens.json"
_MODEL = "config.json"  # of the model
_SPECIAL = "special_tokens_map.json"
GPT2 = "GPT2Tokenizer"  # a class of transformers
# Files that a folder with GPT-2's tokens does not have alone.
PARTS = (VOCAB, MERGES, ADDED, "vocab.txt", "tekken.json", "*.model", "*.tiktoken")
_ENDS = ("bos_token", "eos_token", "unk_token")  # <|endoftext|> if none is named
SAVE_WHOLE = (
    f"save it as {WHOLE}, with AutoTokenizer and save_pretrained of transformers"
)
# Beginnings of `model_type`. These models cut text in another way than GPT-2.
_OTHER_CUTS = ("biogpt", "clip", "ctrl", "flaubert", "openai-gpt", "qwen", "xlm")


def check_is_gpt2s(folder: Path) -> None:
    """UserError if a file tells of a tokenizer that the folder of a model has lost.

    It is for a folder without a `file_of`. What GPT-2's own tokenizer_config.json and
    special_tokens_map.json say is no such trace.
    """
    traces = [file for file in sorted(folder.iterdir()) if any(map(file.match, PARTS))]
    config, kind = config_beside(folder / WHOLE), class_beside(folder / WHOLE)
    is_other = config.get("add_prefix_space") or _other_special(config, [END_OF_TEXT])
    if is_other or not _is_gpt2(kind or GPT2):
        named = (folder / name for name in (CONFIG, _SPECIAL, _MODEL))
        traces += filter(Path.is_file, named)
    if traces:
        raise UserError(
            f"{traces[0]} is of a tokenizer, but neither {WHOLE} nor {VOCAB} with "
            f"{MERGES} is there, so that the model's tokens are unknown: download "
            f"these files again, or {SAVE_WHOLE}"
        )


def check_kind(vocab: Path) -> None:
    """UserError if a vocab.json is for another way to cut text than GPT-2's."""
    kind, cut = class_beside(vocab), str(_model_beside(vocab).get("model_type"))
    is_gpt2 = _is_gpt2(kind)
    if not is_gpt2 and (kind or cut.startswith(_OTHER_CUTS)):
        raise UserError(
            f"{vocab} is of {kind or cut}, which cuts text in another way than GPT-2: "
            f"{SAVE_WHOLE}"
        )
    lacking = set(byte_letters().values()) - ids_by_text(vocab).keys()
    if not is_gpt2 and lacking:
        raise UserError(
            f"{vocab} has no token {min(lacking)}, so it cuts text in another way than "
            f"GPT-2: {SAVE_WHOLE}"
        )


def disagreement(file: Path) -> str | None:
    """How the files beside a tokenizer contradict it; None if they do not.

    Some classes of transformers take added tokens or a space before each text from
    these files, others from the tokenizer. So they must say the same.
    """
    if file.name not in (WHOLE, VOCAB):
        return None
    config, id_of_text = config_beside(file), ids_by_text(file)
    others = config.get("fast_tokenizer_files")
    if isinstance(others, list) and others != [WHOLE] and file.name == WHOLE:
        return f"stands beside a file that names another one: {others[-1]}"
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
        added = read_json(file.with_name(ADDED), DAMAGED) or {}
        stated = [(text, str(number), ADDED) for text, number in added.items()]
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
        if not is_plain_end(of):
            return f"stands beside a file with another special token: {of}"
    if not special or END_OF_TEXT not in texts:
        return f"has no special token {END_OF_TEXT}"
    return None


def _adds_space(file: Path) -> bool | None:
    """Whether GPT-2's way to cut puts a space before a text; None of another way."""
    if file.name == VOCAB:
        return False
    cut = fields_of(file).get("pre_tokenizer")
    cut = cut if isinstance(cut, dict) else {}
    parts = cut.get("pretokenizers")
    for part in parts if isinstance(parts, list) else [cut]:
        if isinstance(part, dict) and part.get("type") == "ByteLevel":
            return part.get("add_prefix_space")
    return None


def end_beside(file: Path) -> str | None:
    """`eos_token` of the files beside a tokenizer, else `eos_token_id` of the model.

    An id counts if it is of an added token: transformers writes GPT-2's 50256 into the
    config.json of models with other vocabularies, too.
    """
    stated = config_beside(file).get("eos_token")
    stated = stated.get("content") if isinstance(stated, dict) else stated
    if isinstance(stated, str):
        return stated
    ids = _model_beside(file).get("eos_token_id")
    text_of = {str(one["id"]): one["content"] for one in added_tokens(file)}
    ids = map(str, ids if isinstance(ids, list) else [ids])
    return next((text_of[one] for one in ids if one in text_of), None)


def config_beside(file: Path) -> dict[str, Any]:
    """The settings in the files beside a tokenizer, as transformers combines them."""
    config = read_json(file.with_name(CONFIG), DAMAGED) or {}
    if "added_tokens_decoder" in config:
        return config  # transformers then ignores special_tokens_map.json.
    return config | (read_json(file.with_name(_SPECIAL), DAMAGED) or {})


def _model_beside(file: Path) -> dict[str, Any]:
    """The config.json of the model of a tokenizer."""
    return read_json(file.with_name(_MODEL), DAMAGED, True) or {}


def class_beside(file: Path) -> Any:
    """The class of a tokenizer in transformers; None if no file beside it tells."""
    own, of_model = (
        one.get("tokenizer_class") for one in (config_beside(file), _model_beside(file))
    )
    return own or of_model


def _is_gpt2(kind: object) -> bool:
    """Whether a class of tokenizers of transformers is that of GPT-2."""
    return str(kind).removesuffix("Fast") == GPT2


def is_plain_end(added: Any) -> bool:
    """Whether an added token is the end of text, and takes no spaces beside it."""
    is_end = isinstance(added, dict) and added.get("content") == END_OF_TEXT
    return is_end and not any(map(added.get, ("single_word", "lstrip", "rstrip")))
