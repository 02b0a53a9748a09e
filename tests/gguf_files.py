"""Tiny models as GGUF files, as llama.cpp has them."""

import json

import gguf
import numpy as np

WIDTH, HEADS, INNER, LAYERS, CONTEXT = 32, 4, 64, 2, 64
Q8 = gguf.GGMLQuantizationType.Q8_0


def add_tokenizer_fields(writer, says):
    """Writes what a file says of its tokenizer; None stands for no such field."""
    for name, value in says.items():
        add = {bool: writer.add_bool, str: writer.add_string, list: writer.add_array}
        if value is not None:
            add[type(value)](f"tokenizer.ggml.{name}", value)


def write_sentencepiece(path, tokenizer, says, architecture="llama"):
    """Writes one tensor and the tokens of a tokenizer.json like Llama 2's."""
    model = json.loads(tokenizer.read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    ranks = {"".join(pair): -float(at) for at, pair in enumerate(model["merges"])}
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    add_tokenizer_fields(writer, {"model": "llama", "pre": "default"} | says)
    writer.add_token_list(tokens)
    writer.add_token_scores([ranks.get(token, -1e5) for token in tokens])
    kinds = {"<unk>": 2, "</s>": 3}
    is_byte = (token.startswith("<0x") for token in tokens)
    types = [6 if b else kinds.get(t, 1) for t, b in zip(tokens, is_byte, strict=True)]
    writer.add_token_types(types)
    writer.add_unk_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_tensor("token_embd.weight", np.ones((len(tokens), WIDTH), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_module(path, architecture, model, fields):
    """Writes a model of transformers with two layers.

    fields: numbers, by their names without that of the architecture.
    """
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    kind = kinds.get(architecture, gguf.MODEL_ARCH.LLAMA)
    names = gguf.get_tensor_name_map(kind, LAYERS)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(LAYERS)
    for name, value in fields.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{architecture}.{name}", value)
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        is_turned = architecture == "gpt2" and ".c_" in name
        ours = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(ours, np.ascontiguousarray(array.T if is_turned else array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write(
    path,
    tokenizer,
    is_tied=True,
    quantized=True,
    scaled=False,
    says=None,
    lacks=None,
    types=None,
    **fields,
):
    """Writes a random Llama with the tokens of a byte-level tokenizer.json.

    says: fields of the tokenizer, for `add_tokenizer_fields`. lacks: a field to omit.
    types: those of some tokens, by text.
    fields: numbers beside those of the model, such as split_count for split.count, with
    __ for _; arrays among them become tensors.
    Returns {name in the file: float32 array as transformers must read it}.
    """
    vocab = json.loads(tokenizer.read_text())["model"]["vocab"]
    merges = json.loads(tokenizer.read_text())["model"]["merges"]
    size, random = len(vocab), np.random.default_rng(0)
    shapes = {"token_embd.weight": (size, WIDTH), "output_norm.weight": (WIDTH,)}
    if not is_tied:
        shapes["output.weight"] = (size, WIDTH)
    for layer in range(LAYERS):
        of_layer = {
            "attn_norm": (WIDTH,),
            "ffn_norm": (WIDTH,),
            **dict.fromkeys(
                ("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH)
            ),
            "ffn_gate": (INNER, WIDTH),
            "ffn_up": (INNER, WIDTH),
            "ffn_down": (WIDTH, INNER),
        }
        shapes |= {f"blk.{layer}.{name}.weight": s for name, s in of_layer.items()}
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(size)
    add_tokenizer_fields(writer, {"model": "gpt2", "pre": "gpt-2"} | (says or {}))
    writer.add_token_list(sorted(vocab, key=vocab.get))
    types = {"<|endoftext|>": 3} | (types or {})
    writer.add_token_types(
        [types.get(text, 1) for text in sorted(vocab, key=vocab.get)]
    )
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in merges)
    writer.add_token_merges(list(pairs))
    writer.add_eos_token_id(vocab["<|endoftext|>"])
    writer.add_bos_token_id(vocab["<|endoftext|>"])
    arrays = {}
    for name, shape in shapes.items():
        array = random.normal("norm" in name, 0.2, shape).astype(np.float32)
        if quantized and len(shape) == 2:
            stored = gguf.quants.quantize(array, Q8)
            array = gguf.quants.dequantize(stored, Q8)
            writer.add_tensor(name, stored, raw_dtype=Q8)
        else:
            writer.add_tensor(name, array)
        arrays[name] = array
    if scaled:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(name, value)
        else:
            key = name.replace("__", " ").replace("_", ".").replace(" ", "_")
            writer.add_uint16(key, value)
    if lacks:
        del writer.kv_data[0][lacks]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return arrays
