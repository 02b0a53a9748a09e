"""What a model's own files say of writing text: which ids end one, and how to draw.

A record keeps it as 'generation': {file: what is kept of it}, with the files of a
tokenizer of the package beside them. A run that is made from another one keeps that of
the other. Runs of our own, and older records, have none.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pcagpt.errors import UserError, warn_once
from pcagpt.json_files import read_json
from pcagpt.run.hugging_face import CONFIG, stored_config

FIELD, FILE = "generation", "generation_config.json"
TOKENIZER = "tokenizer"  # in FIELD: {name: `hugging_face_tokenizer.own_files`}
_EOS = "eos_token_id"
_IDS = ("bos_token_id", _EOS, "pad_token_id")
_ALL_IDS = (
    *_IDS, "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id",
    "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip
_SEQUENCES = ("bad_words_ids", "sequence_bias")  # of ids; a bias is beside its sequence
# The pipelines of transformers take these from config.json.
_OF_PIPELINES = ("prefix", "task_specific_params")
_NAMED = 8  # lost ids in a warning
# transformers takes these from config.json if there is no other file: all fields of its
# GenerationConfig (5.24).
_DRAWING = (
    *_ALL_IDS[len(_IDS) :],
    "assistant_confidence_threshold", "assistant_early_exit",
    "assistant_ensemble_weight", "assistant_lookbehind", "bad_words_ids",
    "cache_config", "cache_implementation", "compile_config", "constraints",
    "continuous_batching_config", "disable_compile", "diversity_penalty",
    "do_sample", "dola_layers", "early_stopping", "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "force_words_ids", "guidance_scale",
    "is_assistant", "length_penalty", "low_memory", "max_cache_len", "max_length",
    "max_matching_ngram_size", "max_new_tokens", "max_time", "min_length",
    "min_new_tokens", "min_p", "no_repeat_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_attentions", "output_hidden_states",
    "output_logits", "output_scores", "penalty_alpha", "prefill_chunk_size",
    "prompt_lookup_num_tokens", "remove_invalid_values", "renormalize_logits",
    "repetition_penalty", "return_dict_in_generate", "sequence_bias",
    "speculation_type", "stop_strings", "target_lookbehind", "temperature",
    "token_healing", "top_h", "top_k", "top_p", "typical_p", "use_cache", "use_mtp",
    "watermarking_config",
)  # fmt: skip
_FROM_CONFIG = {"_from_model_config": True}
_REMEDY = f"restore it, or remove it, so that {CONFIG} counts"


def read(folder: Path, rows: int) -> dict[str, dict[str, Any]]:
    """What the folder of a model of transformers says, for its record.

    Ids without a row in the table are left out, as if nothing stated them: `name_lost`
    names them. UserError if a file is damaged.
    """
    return {
        name: _with_rows(content, rows, folder / name)
        for name, content in _stated(folder).items()
    }


def name_lost(folder: Path, rows: int) -> None:
    """Warns of the ids that `read` leaves out, if any."""
    lost = dict.fromkeys(
        f"{name} {one}"
        for content in _stated(folder).values()
        for name in (*_ALL_IDS, *_SEQUENCES)
        for entry in _listed(content.get(name))
        for one in (_without_row(name, entry if name in _SEQUENCES else [entry], rows))
    )
    if lost:
        more = ", ..." if len(lost) > _NAMED else ""
        warn_once(
            f"{folder}: its table of {rows:,} rows has none for "
            f"{', '.join([*lost][:_NAMED])}{more}: these ids end no text and are left "
            f"out of exports; correct {FILE} or {CONFIG} there if others are right"
        )


def _stated(folder: Path) -> dict[str, dict[str, Any]]:
    """As `read`, with all ids."""
    config = stored_config(folder)
    if isinstance(text := config.get("text_config"), dict):
        config = text | config
    ids = {name: config[name] for name in _IDS if name in config}
    own = read_json(folder / FILE, _REMEDY)
    if own is None:
        drawing = {name: config.get(name) for name in _DRAWING}
        drawing = {name: of for name, of in drawing.items() if of is not None}
        own = _FROM_CONFIG | ids | drawing
    else:  # transformers takes none of config.json then.
        own = dict.fromkeys(_IDS[:2]) | own
    pipelines = {name: config[name] for name in _OF_PIPELINES if name in config}
    return {CONFIG: ids | pipelines, FILE: own}


def _with_rows(content: dict[str, Any], rows: int, path: Path) -> dict[str, Any]:
    """The content of a file without ids that have no row."""
    kept = dict(content)
    for name in _ALL_IDS:
        value = content.get(name)
        ids = _listed(value)
        if any(type(one) is not int for one in ids):
            raise UserError(
                f"{path}: {name} is {value!r:.60}: it must be a token id, a list of "
                "them, or null"
            )
        known = [one for one in ids if 0 <= one < rows]
        if not known and ids:
            del kept[name]
        elif len(known) < len(ids):
            kept[name] = known
    # transformers refuses sequences with ids that its table does not have.
    for name in _SEQUENCES:
        sequences = _listed(content.get(name))
        known = [one for one in sequences if not _without_row(name, one, rows)]
        if len(known) < len(sequences):
            kept[name] = known or None
    return kept


def _without_row(name: str, entry: Any, rows: int) -> list[int]:
    """The ids of a sequence that have no row; a bias may be beside the sequence."""
    has_bias = name == "sequence_bias" and isinstance(entry, list) and entry
    ids = entry[0] if has_bias else entry
    ids = ids if isinstance(ids, list) else []
    return [one for one in ids if type(one) is int and not 0 <= one < rows]


def _listed(ids: Any) -> list[Any]:
    """Ids as a list; JSON files have a list, a single id or null."""
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


def ends(record: Mapping[str, Any], separator: int | None) -> list[int]:
    """The ids that end a text of a model.

    They are those that its own files name: generation_config.json before config.json,
    as in transformers. `separator`, which its tokenizer puts between documents, ends
    the texts of a model without own ids, and of one that was trained here.
    """
    own = record.get(FIELD) or {}
    stated = (_listed((own.get(name) or {}).get(_EOS)) for name in (FILE, CONFIG))
    found = next(filter(None, stated), [])
    is_ended_here = "data" in record or not found
    more = [separator] if is_ended_here and separator not in (None, *found) else []
    return [*found, *more]


def written(
    record: Mapping[str, Any], separator: int | None, textless: Sequence[int] = ()
) -> dict[str, dict[str, Any]]:
    """{file: fields} of an export, so that it ends and draws texts as its model does.

    Of config.json, only the ids and what pipelines read. `textless`: ids that stand for
    no text. pcagpt never draws them; transformers does, unless settings forbid it.
    """
    own, several = record.get(FIELD) or {}, ends(record, separator)
    eos = several if len(several) > 1 else next(iter(several), None)
    found = {}
    for name, without in ((CONFIG, {}), (FILE, _FROM_CONFIG)):
        found[name] = {"bos_token_id": separator, _EOS: eos} | own.get(name, without)
        if name == FILE and FILE not in own and textless:
            found[name]["suppress_tokens"] = list(textless)
        if "data" in record:  # Training here taught the model another end.
            found[name][_EOS] = eos
    return found
