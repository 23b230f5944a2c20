"""Vocabularies alone, as GGUF files that llama.cpp loads with `vocab_only`: every kind, every pre-tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf

from .toy import vocabulary

# What llama.cpp (llama-vocab.cpp, of llama-cpp-python 0.3.36) knows as `tokenizer.ggml.pre`.
_NAMES = """
    default minicpm5 llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano deepseek-llm
    deepseek-coder deepseek-v3 spark2_5 youtu falcon mpt starcoder gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es
    jina-v2-de a.x-4.0 mellum modern-bert jais-2 gemma4 granite-embed-multi-311m sarvam-moe jina-v1-en jina-v2-code
    roberta-bpe whitespace refact command-r qwen2 deepseek-r1-qwen kormo f2llmv2 qwen35 stablelm2 olmo dbrx smaug-bpe
    poro-chat chatglm-bpe glm4 glm5 viking jais tekken smollm codeshell bloom gpt3-finnish exaone exaone4 exaone-moe
    chameleon minerva-7b megrez gpt-4o llama4 kanana2 talkie granite-embed-multi-97m tiny_aya cohere2moe superbpe
    trillion granite-docling bailingmoe bailingmoe2 llada-moe seed-coder hunyuan hunyuan-dense hy_v4 joyai-llm kimi-k2
    ufakzeka grok-2 afmoe laguna minimax-m2 solar-open mellum2
"""
PRE_TOKENIZERS = _NAMES.split()
OTHERS = ("llama", "t5", "rwkv", "plamo2", "bert")  # values of `tokenizer.ggml.model` that are not BPE
_SPECIAL = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("<tool>", 4), ("\n\n", 4), ("\n\n\n", 4)]


def write_vocabulary(
    path: Path, pre: str = "gpt-2", model: str = "gpt2", special: Sequence[tuple[str, int]] = (), no_byte: int = -1
) -> Path:
    """Write a vocabulary of `model`; `special`: more tokens with their types; `no_byte`: the byte it lacks."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "context_length": 512, "embedding_length": 64, "block_count": 1, "feed_forward_length": 64,
        "attention.head_count": 1,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    merges: list[str] = []
    as_bytes = [(f"<0x{byte:02X}>", 6) for byte in range(256) if byte != no_byte]
    if model == "gpt2":
        if pre == "whitespace":
            model = pre  # which drops white space, where BPE would end the process over it
        names, types, merges = vocabulary(600)
        tokens = [*zip(names, types, strict=True), *as_bytes, *special]
    elif model == "rwkv":
        lone = [(chr(byte) if 32 < byte < 127 and byte != 92 else f"\\x{byte:02x}", 1) for byte in range(256)]
        tokens = [*_SPECIAL[:3], *(each for byte, each in enumerate(lone) if byte != no_byte), ("the", 1), ("AAAA", 1)]
    elif model == "bert":
        words = [("▁" + chr(byte), 1) for byte in range(33, 127)] + [(chr(byte), 1) for byte in range(33, 127)]
        tokens = [("[PAD]", 3), ("[UNK]", 2), ("[CLS]", 3), ("[SEP]", 3), *words, ("AAAA", 1), ("▁AAAA", 1)]
    else:
        words = [(text, 1) for text in ("▁", "e", "t", "th", "▁t", "▁the", "A", "AA", "AAAA", "=", "====", "é", "中")]
        tokens = [*_SPECIAL, *as_bytes, *words, *special]
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    if model in ("gpt2", "whitespace"):
        writer.add_token_merges(merges)
    texts = [text for text, _ in tokens]
    for key, names_ in (
        ("bos", ("<s>", "[CLS]", "<|endoftext|>")), ("eos", ("</s>", "<|im_end|>")), ("unknown", ("<unk>", "[UNK]")),
        ("seperator", ("[SEP]",)), ("padding", ("[PAD]",)),
    ):  # fmt: skip
        for name in names_:
            if name in texts:
                writer.add_uint32(f"tokenizer.ggml.{key}_token_id", texts.index(name))
                break
    if model == "llama":
        writer.add_add_eos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
