"""Folders of tiny tokenizers, as the package `tokenizers` writes them."""

import json

import tokenizers

TEXT = "The people of the United States are, as a people, free.\nThe people, 1790!\n"
HARD_TEXT = "don't  stop\n\n 1,234 × naïve 日本語 🙂\t\r\n end  "
SIZE = 300


def byte_level(folder):
    """A BPE tokenizer like GPT-2's, with other ids, in both forms."""
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(
        [TEXT] * 9, SIZE, min_frequency=1, special_tokens=["<|endoftext|>"]
    )
    (folder / "whole").mkdir()
    (folder / "parts").mkdir()
    made.save(str(folder / "whole/tokenizer.json"))
    made.save_model(str(folder / "parts"))


def word_level(folder):
    """A tokenizer that puts a mark before each text, as Llama's does."""
    made = tokenizers.Tokenizer(tokenizers.models.Unigram())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", "</s>"], unk_token="<unk>",
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator([TEXT] * 9, trainer)
    made.save(str(folder / "tokenizer.json"))
    config = {"eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def byte_fallback(folder):
    """A tokenizer like Llama 2's: letters that it lacks are tokens of single bytes."""
    vocabulary = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary += sorted(set(TEXT.replace(" ", "▁"))) + ["th", "▁th", "▁the"]
    model = {
        "type": "BPE",
        "vocab": {text: number for number, text in enumerate(vocabulary)},
        "merges": ["t h", "▁ th", "▁th e"],
        "unk_token": "<unk>",
        "byte_fallback": True,
    }
    made = tokenizers.Tokenizer.from_str(json.dumps({"model": model}))
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["</s>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
