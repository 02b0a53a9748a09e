"""Opens a causal language model of transformers and finds its tables.

A model with missing, odd, unread or contradicting weights is refused: transformers
would go on with random numbers, or with a part of the model.
"""

import contextlib
import io
import itertools
import math
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
import transformers
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

from pcagpt.array_files import check_values
from pcagpt.data import gguf_header
from pcagpt.errors import OF_NO_FILE, UserError, reason_of, warn_once
from pcagpt.run import hugging_face
from pcagpt.run.gpt2_names import are_equal
from pcagpt.unfilled import Place, refuse_unfilled

# What programs store although it follows from config.json, such as causal masks.
_BUFFERS = re.compile(
    r"(rotary_emb\..*|inv_freq|masked_bias|(attn|attention)\.bias|causal_mask|"
    r"position_ids|token_type_ids|[kv]_scale)$"
)
_LIMITS = re.compile(r"\.(in|out)put_(min|max)$")  # Gemma 4's; inf is no limit.
_TEXT = re.compile(r"norm|^ln|embed|^wpe$|position")  # modules beside the layers
# A GGUF file scales positions by fields with these endings.
_SCALES = (
    ".rope.scaling.type",
    ".rope.scaling.factor",
    ".rope.scaling.attn_factor",
    ".rope.scale_linear",
)
# Without them, transformers leaves the rows of queries and keys in llama.cpp's order,
# or takes an epsilon of its own.
_NEEDED = {"llama": ("attention.head_count_kv", "attention.layer_norm_rms_epsilon")}
# Its fields that change no loss, or that the shapes of its tensors tell.
_TOLD = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "context_length",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "feed_forward_length",
    "tensor_data_layout",
    "use_parallel_residual",
    "vocab_size",
}
_EPSILONS = (
    *("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
    "rms_norm_eps",  # LFM2 gets it, too, and does not use it.
)
# Layers of Gemma 2 and 3 with 27 billion parameters; no field tells their scale.
_GEMMA_27B = {"gemma2": 46, "gemma3_text": 62}
_QUANTIZED = (
    "its weights are quantized ({method}), which transformers does not read here: give "
    "the model without quantization"
)
_SAFETENSORS = "give the folder with its model.safetensors"
_PRODUCTS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
_one = threading.RLock()


def device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def own_torch() -> Iterator[None]:
    """PyTorch computes as in a command, whatever the program has chosen.

    One thread at a time, because the default dtype and the precision of products, such
    as TF32, belong to the whole process: all threads see ours meanwhile.
    """
    with (
        _one,
        torch.inference_mode(False),
        torch.autocast(device().type, enabled=False),
    ):
        dtype, each = torch.get_default_dtype(), [at.fp32_precision for at in _PRODUCTS]
        try:
            of_all = torch.get_float32_matmul_precision()
        except RuntimeError:  # The program has set only those of `each`.
            of_all = "highest"
        try:
            torch.set_default_dtype(torch.float32)
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_float32_matmul_precision(of_all)
            for at, precision in zip(_PRODUCTS, each, strict=True):
                at.fp32_precision = precision


class _OfOthers(io.TextIOBase):
    """Passes text on to a stream, except that of one thread, if any (`dropped`)."""

    def __init__(self, stream: TextIO):
        self._stream: TextIO = stream
        self.dropped: int | None = threading.get_ident()

    def write(self, text: str) -> int:
        is_dropped = threading.get_ident() == self.dropped
        return len(text) if is_dropped else self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """transformers prints and logs nothing meanwhile; all is then as before.

    One thread at a time: this changes the whole process, and transformers does so, too.
    What other threads print is printed.
    """
    with _one, contextlib.redirect_stderr(_OfOthers(sys.stderr)) as of_others:
        level = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity(transformers.logging.CRITICAL)
        try:
            yield
        finally:
            transformers.logging.set_verbosity(level)
            of_others.dropped = None  # A log may keep the stream.


def open_model(folder: Path) -> Any:
    """The model of a folder in float32; UserError if it has none that is whole."""
    is_file = folder.is_file()  # GGUF
    try:
        # The errors below replace what it prints about damaged files.
        alone = gguf_header.alone if is_file else contextlib.nullcontext
        with _quietly(), alone(folder) as place:
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                str(place),
                gguf_file=folder.name if is_file else None,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # The error below names the tensor.
                output_loading_info=True,
            )
    except OF_NO_FILE:
        raise
    # The package and what it calls raise errors of many types for damaged files.
    except Exception as error:
        reason = reason_of(error)
        if is_file:
            reason = f"{reason.rstrip('.')}: {_SAFETENSORS}"
        raise UserError(f"transformers cannot open {folder}: {reason}") from None
    _copy(model)
    if not is_file:
        _check_files(model, folder)
    # It would go on with random numbers. It ignores parts of a GGUF file's header, such
    # as the context of GPT-2, the width of Qwen 3's heads, and a lack of biases.
    asks, remedy = "its config.json asks for", "restore it, or download the model again"
    if is_file:
        asks, remedy = "the model that transformers makes of it has", _SAFETENSORS
    wrong = [
        f"{folder}: {name} is {tuple(shape)}, but {asks} {tuple(wanted)}"
        for name, shape, wanted in sorted(report["mismatched_keys"])
    ]
    lacking = sorted(report["missing_keys"])
    wrong += [f"{folder} has no tensor {name}, which {asks}" for name in lacking]
    if wrong:
        raise UserError(f"{wrong[0]}: {remedy}")
    _check_all_are_used(model, sorted(map(str, report["unexpected_keys"])), folder)
    if is_file:
        _check_header(model, folder)
    _check_values(model, folder)
    return model


def _copy(model: Any) -> None:
    """Moves all tensors out of the files, which transformers maps into memory.

    A file that is written in place would otherwise change the model, or end the
    process if it becomes shorter. Only while transformers opens it, that can happen.
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        tensor.data = tensor.data.clone()


def _check_values(model: Any, folder: Path) -> None:
    """UserError if parameters, or buffers that files hold, are not finite, or absurd.

    Such buffers are the biases that choose experts. Those of `_BUFFERS`, and those that
    no file holds, may be masks.
    """
    stored = model.state_dict().keys()
    buffers = (
        (name, buffer)
        for name, buffer in model.named_buffers()
        if name in stored and not _BUFFERS.search(name)
    )
    for name, tensor in itertools.chain(model.named_parameters(), buffers):
        if tensor.is_floating_point() and not _LIMITS.search(name):
            values = tensor.detach().float().cpu().numpy()
            check_values(values, f"{folder} is damaged: {name}")


def _check_all_are_used(model: Any, unused: list[str], folder: Path) -> None:
    """UserError for a stored tensor that changes what the model's own program computes.

    Such are biases and norms that a module was built without, and surplus layers.
    Tensors of other modules, such as those that see images, are only named.
    """
    parts, stacks, others = set(), set(), []
    prefix = f"{model.base_model_prefix}."
    modules = {
        spelling: module
        for name, module in model.named_modules()
        for spelling in (name, name.removeprefix(prefix))
    }
    for name, module in modules.items():
        if hasattr(module, "weight"):
            parts.add(name)
        if isinstance(module, torch.nn.ModuleList):
            stacks.add(name)
    for name in unused:
        owner = name.rpartition(".")[0]
        above, _, last = owner.rpartition(".")
        around = set(itertools.accumulate(owner.split("."), "{}.{}".format))
        # Adapters are beside or in the parts that they change, such as the head.
        is_in_part = around & (parts | stacks)
        is_of_text = is_in_part or (above in modules and _TEXT.search(last))
        if owner not in parts and _BUFFERS.search(name):
            continue
        others.append(name)
        if is_of_text:
            raise UserError(
                f"{folder} has the tensor {name}, which the model of its config.json "
                "does not use, so its losses would be wrong: correct config.json"
            )
    if others:
        warn_once(
            f"{folder}: its model does not use {len(others)} of the tensors, such as "
            f"{others[0]}; losses are measured without them"
        )


def check_filled(path: Path) -> None:
    """UserError if a part of a GGUF file was never written."""
    _, shapes, _, places = gguf_header.header(path)
    placed = {name: Place(shapes[name], *at) for name, at in places.items()}
    refuse_unfilled(path, placed)


def _check_header(model: Any, path: Path) -> None:
    """UserError if transformers silently dropped a part of a GGUF file."""
    fields, shapes, *_ = gguf_header.header(path)
    check_filled(path)
    scaled = [
        name
        for name, value in fields.items()
        if name.endswith(_SCALES) and value not in ("none", 0, 1)
    ]
    rope = getattr(model.config, "rope_parameters", None) or {}
    if scaled and rope.get("rope_type", "default") == "default":
        raise UserError(
            f"{path} scales its positions ({scaled[0]}), which transformers does not "
            f"read from GGUF: {_SAFETENSORS}"
        )
    architecture = fields.get("general.architecture")
    for name in _NEEDED.get(architecture, ()):
        if f"{architecture}.{name}" not in fields:
            raise UserError(
                f"{path} does not state {architecture}.{name}, so transformers would "
                f"compute another model: {_SAFETENSORS}"
            )
    if field := _unheeded(model.config, fields):
        raise UserError(
            f"{path} has {field}, which transformers does not read from GGUF, so its "
            f"losses would be wrong: {_SAFETENSORS}"
        )
    stored = sum(math.prod(shape) for shape in shapes.values())
    if stored > sum(parameter.numel() for parameter in model.parameters()):
        raise UserError(
            f"{path} has tensors that transformers does not read from GGUF, so its "
            f"losses would be wrong: {_SAFETENSORS}"
        )


def _unheeded(config: Any, fields: dict[str, Any]) -> str | None:
    """What a GGUF file states and the model of a config does not do; None if nothing.

    transformers has its defaults for fields that it does not read.
    """
    read = GGUF_CONFIG_MAPPING.get(config.model_type.removesuffix("_text"), {})
    ropes = getattr(config, "rope_parameters", None) or {}
    rope = ropes.get("full_attention", ropes)
    heads_width = config.hidden_size // getattr(config, "num_attention_heads", 1)
    width = getattr(config, "head_dim", None) or heads_width
    softcaps = ("attn_logit_softcapping", "final_logit_softcapping")
    epsilon = next((getattr(config, n) for n in _EPSILONS if hasattr(config, n)), None)
    own = {name: getattr(config, name, None) for name in softcaps} | {
        "attention.causal": True,
        "attention.layer_norm_epsilon": epsilon,
        "attention.layer_norm_rms_epsilon": epsilon,
        "attention.sliding_window": getattr(config, "sliding_window", None),
        "rope.dimension_count": int(width * rope.get("partial_rotary_factor", 1)),
        "rope.freq_base": rope.get("rope_theta"),
        "rope.freq_base_swa": ropes.get("sliding_attention", rope).get("rope_theta"),
    }
    architecture = fields.get("general.architecture")
    for field, value in fields.items():
        prefix, _, name = field.partition(".")
        if prefix != architecture or name.startswith("rope.scal"):
            continue
        # What is off or empty asks for nothing, such as mamba.ssm.dt_b_c_rms.
        is_read = bool(name in _TOLD or read.get(name) or not value)
        if not (_are_alike(value, own[name]) if name in own else is_read):
            return f"{field} {value}"
    scale = getattr(config, "query_pre_attn_scalar", None)
    is_27b = _GEMMA_27B.get(config.model_type) == config.num_hidden_layers
    if scale and scale != (heads_width if is_27b else width):
        return f"a scale of attention other than 1/sqrt({scale})"
    return None


def _are_alike(stated: Any, own: Any) -> bool:
    """Whether a field of a GGUF file, where numbers have 32 bits, says what is done."""
    if isinstance(stated, float) and isinstance(own, float | int):
        return math.isclose(stated, own, rel_tol=1e-6)
    return (stated or None) == (own or None)


def _check_files(model: Any, folder: Path) -> None:
    """UserError if a parameter has two tensors, or is quantized in an unknown way.

    transformers reads a name with and without the prefix of the model's body, and takes
    integers for values if it does not know the method.
    """
    is_known = getattr(model, "hf_quantizer", None) is not None
    stated = getattr(model.config, "quantization_config", None)
    if stated and not is_known:
        method = dict(stated).get("quant_method", "unknown")
        raise UserError(f"{folder}: {_QUANTIZED.format(method=method)}")
    prefix = f"{model.base_model_prefix}."
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    found: dict[str, tuple[str, Path]] = {}
    for path in hugging_face.files(folder):
        with hugging_face.opened(path, "pt") as file:
            names = file.keys()
            types = {name: file.get_slice(name).get_dtype() for name in names}
        for name, kind in types.items():
            key = name.removeprefix(prefix)
            is_read = bool({key, prefix + key} & own)
            is_read |= name.endswith("weight")  # such as an expert, which is merged
            if is_read and not is_known and kind not in hugging_face.DTYPES:
                raise UserError(f"{folder}: {_QUANTIZED.format(method=kind)}")
            other, place = found.setdefault(key, (name, path))
            if other == name or {name, other} <= own:
                continue
            if not are_equal(_tensor(path, name), _tensor(place, other)):
                raise UserError(
                    f"{folder} has two tensors for one parameter, {other} and {name}: "
                    "remove the wrong one"
                )
        hugging_face.check_filled(path)


def _tensor(path: Path, name: str) -> torch.Tensor:
    with hugging_face.opened(path, "pt") as file:
        return file.get_tensor(name)


def tables_of(model: Any, folder: Path) -> tuple[torch.nn.Embedding, torch.nn.Linear]:
    """The modules of input and output; they share one parameter in a tied model.

    Raises UserError unless the model has both, with tables of one shape, or if its
    files hold two tables although it should have one.
    """
    own = _found(model.get_input_embeddings)
    head = _found(model.get_output_embeddings)
    if not isinstance(own, torch.nn.Embedding):
        raise UserError(f"{folder}: its model has no embedding of tokens")
    if not isinstance(head, torch.nn.Linear):
        raise UserError(f"{folder}: its model has no table of the output")
    if head.weight.shape != own.weight.shape:
        raise UserError(
            f"{folder}: its input table is {tuple(own.weight.shape)}, its output table "
            f"{tuple(head.weight.shape)}: only tables of one shape can be measured"
        )
    says_tied = getattr(model.config, "tie_word_embeddings", False)
    if (head.weight is own.weight or says_tied) and not folder.is_file():
        _check_stored_table(model, (own.weight, head.weight), folder)
    return own, head


def _found(get: Any) -> Any:
    """What a getter of the model returns; None if the model lacks it."""
    try:
        return get()
    except (AttributeError, NotImplementedError):
        return None


def _check_stored_table(model: Any, tables: tuple, folder: Path) -> None:
    """UserError if the files hold two tables for a model that should have one.

    Versions of transformers differ in what they make of it, without a word.
    """
    prefix = f"{model.base_model_prefix}."
    named = model.named_parameters(remove_duplicate=False)
    own = {name for name, p in named if any(p is table for table in tables)}
    own |= {name.removeprefix(prefix) for name in own}
    first: tuple[str, torch.Tensor] | None = None
    for path in hugging_face.files(folder):
        with hugging_face.opened(path, "pt") as file:
            for name in sorted(own & set(file.keys())):
                table = file.get_tensor(name)
                if first and not torch.equal(first[1], table):
                    raise UserError(
                        f"{folder}: {name} is another table than {first[0]}, although "
                        "tie_word_embeddings is true: set it to false in its "
                        "config.json, or remove the wrong table"
                    )
                first = first or (name, table)
