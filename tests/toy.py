"""Small GGUF files that llama.cpp really loads, written in milliseconds with the gguf package's own writer.

The vocabulary is a byte-level BPE of 600 tokens: 256 single bytes, merges of two and three letters, and a few tokens of
every special type. Weights are random, so that two models differ; only a head's rows of the end tokens are 0. Their
logits are then 0, which other logits exceed: an answer ends at its limit, or when a grammar ends it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quant

from llamabase.llama.ggml import quantize_rows

N_EMBD, N_FF, N_HEAD, N_LAYER = 256, 256, 4, 1
ARCHITECTURES = ("llama", "llama-tied", "qwen2", "qwen3", "gemma3")
MROPE = ("qwen2vl", "qwen3vl", "qwen3vlmoe", "paddleocr", "hunyuan_vl", "glm4")
SECTIONS = [11, 11, 10, 0]  # of the 32 angles of a head: those that turn by time, by height and by width
ENDS = ("<|endoftext|>", "<|im_end|>", "<|repo_name|>", "<|file_sep|>")  # llama.cpp knows them by these names
HEAD_TYPES = (Quant.F32, Quant.F16, Quant.Q8_0, Quant.Q4_K, Quant.Q6_K)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vocabulary(n_tokens: int = 600, letters: str = "etaoinshrdlu") -> tuple[list[str], list[int], list[str]]:
    """Tokens, types and merges: bytes first, then merges of letters, then special tokens and padding."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    chars = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(hidden))]
    tokens, types, merges = list(chars), [1] * len(chars), []
    space = chr(256 + hidden.index(32))
    for first in (space, *letters):
        for second in letters:
            merges.append(f"{first} {second}")
            tokens.append(first + second)
            types.append(1)
    for word in ("the", "and", "ing", "tion"):
        merges.append(f"{word[:2]} {word[2:]}" if len(word) == 4 else f"{word[:2]} {word[2]}")
        tokens.append(word)
        types.append(1)
    special = [
        ("<|endoftext|>", 3),
        ("<|im_start|>", 3),
        ("<|im_end|>", 3),
        ("<tool>", 4),
        ("<unk>", 2),
        ("<unused0>", 3),
    ]
    for text, kind in special:
        tokens.append(text)
        types.append(kind)
    for i in range(len(tokens), n_tokens):
        tokens.append(f"[PAD{i}]")
        types.append(5)
    return tokens, types, merges


def quantize(values: np.ndarray, type_: Quant) -> np.ndarray:
    """Rows of float32 as rows of bytes of `type_`, by ggml itself (the gguf package cannot write K-quants)."""
    if type_ == Quant.F32:
        return values.astype(np.float32)
    if type_ == Quant.F16:
        return values.astype(np.float16)
    return quantize_rows(values, type_)


def write_model(
    path: Path,
    architecture: str = "llama",
    head_type: Quant = Quant.F32,
    seed: int = 0,
    n_tokens: int = 600,
    head_bias: bool = False,
    alignment: int | None = None,
    sharpness: float = 4.0,
    template: str | None = CHAT_TEMPLATE,
    n_ctx: int = 512,
    letters: str = "etaoinshrdlu",
    n_layer: int = N_LAYER,
    keys: Mapping[str, int | float | list[int]] | None = None,
    pre: str = "gpt-2",
) -> Path:
    """Write a loadable model. `llama-tied` and `gemma3` have no head of their own; those of MROPE have its sections.

    `keys`: metadata of the architecture beside, or instead of, what its toys have; an empty list leaves it out.
    sharpness scales the head, so that the best token is well ahead and floating point cannot change it.
    """
    name = architecture.removesuffix("-tied")
    tied = architecture in ("llama-tied", "gemma3")
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, name)
    if alignment:
        writer.add_custom_alignment(alignment)
    head_dim = N_EMBD // N_HEAD
    writer.add_name(f"toy {architecture}")
    writer.add_context_length(n_ctx)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if name == "llama":
        writer.add_rope_dimension_count(head_dim)
    if name == "gemma3":
        writer.add_sliding_window(32)
    more: dict[str, int | float | list[int]] = {}
    if name in MROPE:
        more |= {"rope.dimension_sections": SECTIONS}
    if name == "qwen3vlmoe":
        more |= {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 64}
    if name == "granite":
        more |= {"logit_scale": 1.0, "rope.dimension_count": head_dim}
    for key, value in (more | dict(keys or {})).items():
        if isinstance(value, list):
            writer.add_array(f"{name}.{key}", value)  # an empty one is left out
        elif isinstance(value, float):
            writer.add_float32(f"{name}.{key}", value)
        else:
            writer.add_uint32(f"{name}.{key}", value)
    tokens, types, merges = vocabulary(n_tokens, letters)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokens.index("<|endoftext|>"))
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_add_bos_token(False)
    if template:
        writer.add_chat_template(template)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) * scale / np.sqrt(shape[-1])).astype(np.float32)

    def table(scale: float, zeros: Sequence[str] = ()) -> np.ndarray:
        rows = normal(n_tokens, N_EMBD, scale=scale)
        rows[np.isin(tokens, zeros)] = 0
        return quantize(rows, head_type)

    def add(tensor: str, values: np.ndarray, type_: Quant = Quant.F32) -> None:
        writer.add_tensor(tensor, values, raw_dtype=type_ if type_ not in (Quant.F32, Quant.F16) else None)

    add("token_embd.weight", table(sharpness if tied else 8.0), head_type)
    if not tied:
        add("output.weight", table(sharpness, ENDS), head_type)
    if head_bias:
        add("output.bias", normal(n_tokens) * 10)
    add("output_norm.weight", np.ones(N_EMBD, np.float32))
    for layer in range(n_layer):
        prefix = f"blk.{layer}."
        add(prefix + "attn_norm.weight", np.ones(N_EMBD, np.float32))
        add(prefix + "ffn_norm.weight", np.ones(N_EMBD, np.float32))
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            heads = N_HEAD if part in ("attn_q", "attn_output") else (keys or {}).get("attention.head_count_kv", N_HEAD)
            add(prefix + part + ".weight", normal(heads * head_dim, N_EMBD))
            if name in ("qwen2", "qwen2vl") and part != "attn_output":
                add(prefix + part + ".bias", normal(N_EMBD))
        if name in ("qwen3", "gemma3", "qwen3vl", "qwen3vlmoe", "hunyuan_vl"):
            for part in ("attn_q_norm", "attn_k_norm"):
                add(prefix + part + ".weight", np.ones(head_dim, np.float32))
        if name in ("gemma3", "glm4"):
            for part in ("post_attention_norm", "post_ffw_norm"):
                add(prefix + part + ".weight", np.ones(N_EMBD, np.float32))
        if name == "qwen3vlmoe":
            add(prefix + "ffn_gate_inp.weight", normal(4, N_EMBD))
            for part, shape in (("gate", (4, 64, N_EMBD)), ("up", (4, 64, N_EMBD)), ("down", (4, N_EMBD, 64))):
                add(prefix + f"ffn_{part}_exps.weight", normal(*shape))
            continue
        if name != "glm4":
            add(prefix + "ffn_gate.weight", normal(N_FF, N_EMBD))
        add(prefix + "ffn_up.weight", normal(2 * N_FF if name == "glm4" else N_FF, N_EMBD))
        add(prefix + "ffn_down.weight", normal(N_EMBD, N_FF))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_head(
    path: Path,
    head_type: Quant = Quant.F32,
    seed: int = 7,
    ids: np.ndarray | None = None,
    n_tokens: int = 600,
    layers: tuple[int, ...] = (0, 1, 2),
    width: int = N_EMBD,
    own_embeddings: bool = False,
    tokens: bool = False,
    without: tuple[str, ...] = (),
    head_rows: int | None = None,
    sharpness: float = 4.0,
    architecture: str = "eagle3",
    zeros: tuple[str, ...] = (),
    more: dict[str, np.ndarray] | None = None,
    kind: str = "",
    anchor: bool = True,
    numbers: dict[str, int] | None = None,
) -> Path:
    """Write a loadable EAGLE-3 head, or a DFlash drafter, for a target of these sizes.

    `ids`: the d2t; `without`: keys and tensors left out; `zeros`: tensors that are 0. `kind`: of a DFlash drafter,
    "markov" for DSpark, "selector" for DFlash2. `anchor`: whether the place of a block's first token drafts, too.
    `numbers`: further keys.
    The rows of two heads of one seed that stand for the same token are the same.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    head_dim = N_EMBD // N_HEAD
    numbers = (numbers or {}) | {
        "context_length": 512, "embedding_length": N_EMBD, "block_count": 1, "feed_forward_length": N_FF,
        "attention.head_count": N_HEAD, "attention.head_count_kv": N_HEAD, "rope.dimension_count": head_dim,
        "target_hidden_size": width, "vocab_size": n_tokens,
    }  # fmt: skip
    if architecture == "dflash":
        numbers |= {"block_size": 4}
        writer.add_bool("dflash.sample_from_anchor", anchor)
    if kind == "selector":
        numbers |= {"selector_rank": 32, "selector_top_k": 8, "conv_kernel_size": 3, "conv_group_size": 32}
    for key, value in numbers.items():
        if key not in without:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{architecture}.rope.freq_base", 10000.0)
    if "target_layers" not in without:
        writer.add_array(f"{architecture}.target_layers", list(layers))
    if tokens:
        names, types, merges = vocabulary(n_tokens)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(names)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
    else:
        writer.add_tokenizer_model("none")

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)

    tensors = {
        "fc.weight": normal(N_EMBD, 3 * width),
        "output_norm.weight": 1 + 0.1 * normal(1, N_EMBD)[0],
        "blk.0.attn_norm.weight": np.ones(N_EMBD, np.float32),
        "blk.0.attn_norm_2.weight": np.ones(N_EMBD, np.float32),
        "blk.0.ffn_norm.weight": np.ones(N_EMBD, np.float32),
        **{f"blk.0.attn_{part}.weight": normal(N_EMBD, 2 * N_EMBD) for part in "qkv"},
        "blk.0.attn_output.weight": normal(N_EMBD, N_EMBD),
        **{f"blk.0.ffn_{part}.weight": normal(N_FF, N_EMBD) for part in ("gate", "up", "down")},
    }
    whole = normal(n_tokens, N_EMBD) * sharpness
    if architecture == "dflash":
        tensors |= {f"blk.0.attn_{part}.weight": normal(N_EMBD, N_EMBD) for part in "qkv"}
        tensors |= {f"blk.0.attn_{part}_norm.weight": np.ones(head_dim, np.float32) for part in "qk"}
        tensors["enc.output_norm.weight"] = np.ones(N_EMBD, np.float32)
        del tensors["blk.0.attn_norm_2.weight"]
    if kind == "markov":
        tensors |= {"markov_w1.weight": normal(n_tokens, 32) * 8, "conf_proj.weight": normal(1, N_EMBD + 32)}
    if kind == "selector":
        for part in ("predecessor", "successor"):
            tensors[f"selector_{part}.weight"] = normal(n_tokens, 32)
        tensors["selector_hidden.weight"] = normal(32, N_EMBD)
        for part in ("attn", "ffn"):
            tensors[f"blk.0.{part}_conv_base"] = normal(2, 3, N_EMBD)
            tensors[f"blk.0.{part}_conv_proj.weight"] = normal(2 * 3 * N_EMBD // 32, N_EMBD)
    for name, values in tensors.items():
        if name not in without:
            writer.add_tensor(name, values * (name not in zeros))
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    if own_embeddings:
        writer.add_tensor("token_embd.weight", normal(n_tokens, N_EMBD))
    heads = {"output.weight": whole}
    if kind == "markov":
        heads["markov_w2.weight"] = normal(n_tokens, 32) * sharpness
    for name, rows in heads.items():
        if name not in without:
            rows = rows if ids is None else rows[np.clip(ids, 0, n_tokens - 1)]
            rows = quantize(rows if head_rows is None else rows[:head_rows], head_type)
            writer.add_tensor(name, rows, raw_dtype=head_type if head_type not in (Quant.F32, Quant.F16) else None)
    if ids is not None:
        writer.add_tensor("d2t", np.asarray(ids, np.int64), raw_dtype=Quant.I64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_mtp(
    path: Path,
    architecture: str = "qwen35",
    head_type: Quant = Quant.F32,
    seed: int = 0,
    n_tokens: int = 600,
    own_head: bool = False,
    n_blocks: int = 1,
    without: tuple[str, ...] = (),
    sharpness: float = 4.0,
    n_ctx: int = 512,
    mrope: bool | None = None,
    alone: bool = False,
    ids: np.ndarray | None = None,
) -> Path:
    """Write a loadable model of two layers with an MTP block: `qwen35` (whose first layer is recurrent) or `glm4moe`.

    `own_head`: the block has a head that is not the target's. `without`: tensors left out. `mrope`: whether it has the
    sections of M-RoPE, for None if it is `qwen35`. `alone`: without the two layers, as files beside a target are.
    `ids`: the head that the block uses has rows for these only, and the file a d2t; llama.cpp does not load that.
    """
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    head_dim, n_expert = N_EMBD // N_HEAD, 4
    numbers = {
        "context_length": n_ctx, "embedding_length": N_EMBD, "block_count": 2 + n_blocks, "feed_forward_length": N_FF,
        "attention.head_count": N_HEAD, "attention.head_count_kv": N_HEAD, "rope.dimension_count": head_dim,
        "attention.key_length": head_dim, "attention.value_length": head_dim, "vocab_size": n_tokens,
        "nextn_predict_layers": n_blocks,
    }  # fmt: skip
    if architecture == "qwen35":
        numbers |= {
            "full_attention_interval": 2, "ssm.conv_kernel": 4, "ssm.inner_size": 256, "ssm.state_size": 64,
            "ssm.time_step_rank": 4, "ssm.group_count": 2,
        }  # fmt: skip
    else:
        numbers |= {
            "expert_feed_forward_length": 64, "expert_count": n_expert, "expert_used_count": 2,
            "expert_shared_count": 1, "leading_dense_block_count": 1,
        }  # fmt: skip
        writer.add_bool(f"{architecture}.expert_weights_norm", True)
    if mrope or (mrope is None and architecture == "qwen35"):
        writer.add_array(f"{architecture}.rope.dimension_sections", SECTIONS)
    for key, value in numbers.items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32(f"{architecture}.rope.freq_base", 10000.0)
    names, types, merges = vocabulary(n_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(names.index("<|im_end|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) * scale / np.sqrt(shape[-1])).astype(np.float32)

    one = np.ones(N_EMBD, np.float32)
    tensors: dict[str, np.ndarray] = {
        "token_embd.weight": normal(n_tokens, N_EMBD, scale=8.0),
        "output.weight": normal(n_tokens, N_EMBD, scale=sharpness),
        "output_norm.weight": one,
    }
    for layer in range(2 + n_blocks):
        block: dict[str, np.ndarray] = {"attn_norm.weight": one, "post_attention_norm.weight": one}
        if architecture == "qwen35" and layer == 0:
            block |= {
                "attn_qkv.weight": normal(512, N_EMBD), "attn_gate.weight": normal(256, N_EMBD),
                "ssm_conv1d.weight": normal(512, 4), "ssm_dt.bias": normal(1, 4)[0],
                "ssm_a": -np.exp(normal(1, 4)[0]), "ssm_beta.weight": normal(4, N_EMBD),
                "ssm_alpha.weight": normal(4, N_EMBD), "ssm_norm.weight": np.ones(64, np.float32),
                "ssm_out.weight": normal(N_EMBD, 256),
            }  # fmt: skip
        else:
            twice = 2 if architecture == "qwen35" else 1  # a gate beside the query
            block |= {
                "attn_q.weight": normal(twice * N_EMBD, N_EMBD), "attn_output.weight": normal(N_EMBD, N_EMBD),
                "attn_k.weight": normal(N_EMBD, N_EMBD), "attn_v.weight": normal(N_EMBD, N_EMBD),
                "attn_q_norm.weight": np.ones(head_dim, np.float32),
                "attn_k_norm.weight": np.ones(head_dim, np.float32),
            }  # fmt: skip
        if architecture == "glm4moe" and layer > 0:
            block |= {
                "ffn_gate_inp.weight": normal(n_expert, N_EMBD), "exp_probs_b.bias": normal(1, n_expert)[0],
                **{f"ffn_{part}_exps.weight": normal(n_expert, 64, N_EMBD) for part in ("gate", "up")},
                **{f"ffn_{part}_shexp.weight": normal(64, N_EMBD) for part in ("gate", "up")},
                "ffn_down_exps.weight": normal(n_expert, N_EMBD, 64), "ffn_down_shexp.weight": normal(N_EMBD, 64),
            }  # fmt: skip
        else:
            block |= {f"ffn_{part}.weight": normal(N_FF, N_EMBD) for part in ("gate", "up", "down")}
        if layer >= 2:
            block |= {"nextn.eh_proj.weight": normal(N_EMBD, 2 * N_EMBD), "nextn.enorm.weight": one}
            block |= {"nextn.hnorm.weight": one}
            if own_head:
                block |= {"nextn.shared_head_head.weight": normal(n_tokens, N_EMBD, scale=sharpness)}
                block |= {"nextn.shared_head_norm.weight": 1 + 0.1 * normal(1, N_EMBD)[0]}
        tensors |= {f"blk.{layer}.{name}": values for name, values in block.items()}
    reduced = "blk.2.nextn.shared_head_head.weight" if own_head else "output.weight"
    for name, values in tensors.items():
        if name in without or (alone and name.startswith(("blk.0.", "blk.1."))):
            continue
        heads = ("output.weight", "blk.2.nextn.shared_head_head.weight")
        type_ = head_type if name in ("token_embd.weight", *heads) else Quant.F32
        if name in heads:
            values[np.isin(names, ENDS)] = 0
        if ids is not None and name == reduced:
            values = values[ids]
        writer.add_tensor(name, quantize(values, type_), raw_dtype=None if type_ in (Quant.F32, Quant.F16) else type_)
    if ids is not None:
        writer.add_tensor("d2t", np.asarray(ids, np.int64), raw_dtype=Quant.I64)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
