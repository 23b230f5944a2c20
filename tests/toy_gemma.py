"""Small Gemma 4 targets and their assistants, which llama.cpp really loads.

The last two layers of a target reuse the keys and values of the two before them, as in E2B and E4B; the assistant
attends to those of these last two layers, one with a sliding window and one without.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quant

from .toy import CHAT_TEMPLATE, ENDS, quantize, vocabulary

WIDTH, N_EMBD, N_FF = 256, 128, 128  # numbers of the target's states, of the assistant's, and of its FFN
N_HEAD, N_HEAD_KV, HEAD, HEAD_SWA, WINDOW = 4, 2, 64, 32, 16
Numbers = Mapping[str, int | list[bool] | None]


def write_gemma4(path: Path, seed: int = 0, head_type: Quant = Quant.F32, n_per_layer: int = 0, **how: object) -> Path:
    """Write a target; with `n_per_layer` it has embeddings of as many numbers for each layer."""
    n_layer = 4
    numbers = {
        "embedding_length": WIDTH, "block_count": n_layer, "feed_forward_length": WIDTH,
        "attention.shared_kv_layers": 2, "embedding_length_per_layer_input": n_per_layer,
        "attention.sliding_window_pattern": [True, False] * 2,
    }  # fmt: skip
    normal = _normal(seed)
    tensors = {
        "token_embd.weight": normal(600, WIDTH, scale=2.0),
        "output.weight": normal(600, WIDTH, scale=4.0),
        "output_norm.weight": 1 + 0.1 * normal(1, WIDTH)[0],
        "rope_freqs.weight": _rope_freqs(),
    }
    if n_per_layer:
        tensors |= {
            "per_layer_token_embd.weight": normal(600, n_per_layer * n_layer),
            "per_layer_model_proj.weight": normal(n_per_layer * n_layer, WIDTH),
            "per_layer_proj_norm.weight": np.ones(n_per_layer, np.float32),
        }
    for layer in range(n_layer):
        head = HEAD if layer % 2 else HEAD_SWA
        block = _block(normal, WIDTH, WIDTH, head)
        if layer < 2:
            block |= {f"attn_{part}.weight": normal(N_HEAD_KV * head, WIDTH) for part in "kv"}
            block |= {"attn_k_norm.weight": np.ones(head, np.float32)}
        if n_per_layer:
            block |= {
                "inp_gate.weight": normal(n_per_layer, WIDTH), "proj.weight": normal(WIDTH, n_per_layer),
                "post_norm.weight": np.ones(WIDTH, np.float32),
            }  # fmt: skip
        tensors |= {f"blk.{layer}.{name}": values for name, values in block.items()}
    heads = {"token_embd.weight", "output.weight"}
    return _write(path, "gemma4", numbers, tensors, dict.fromkeys(heads, head_type), **how)  # type: ignore[arg-type]


def write_assistant(
    path: Path,
    seed: int = 7,
    head_type: Quant = Quant.F32,
    type_: Quant = Quant.F32,
    n_tokens: int = 600,
    sharpness: float = 4.0,
    width: int = WIDTH,
    **how: object,
) -> Path:
    """Write an assistant of two layers; `type_` is that of its projections and of what its layers multiply by."""
    numbers = {
        "embedding_length": N_EMBD, "embedding_length_out": width, "block_count": 2, "nextn_predict_layers": 2,
        "feed_forward_length": N_FF, "attention.sliding_window_pattern": [True, False],
    }  # fmt: skip
    normal = _normal(seed)
    tensors = {
        "token_embd.weight": normal(n_tokens, N_EMBD, scale=sharpness),
        "output_norm.weight": 1 + 0.1 * normal(1, N_EMBD)[0],
        "rope_freqs.weight": _rope_freqs(),
        "nextn.post_projection.weight": normal(width, N_EMBD),
    }
    for layer, head in enumerate((HEAD_SWA, HEAD)):
        block = _block(normal, N_EMBD, N_FF, head)
        tensors |= {f"blk.{layer}.{name}": values for name, values in block.items()}
    tensors["nextn.pre_projection.weight"] = normal(N_EMBD, 2 * width)
    types = {name: type_ for name, values in tensors.items() if values.ndim == 2} | {"token_embd.weight": head_type}
    return _write(path, "gemma4-assistant", numbers, tensors, types, n_tokens, **how)  # type: ignore[arg-type]


def _normal(seed: int):
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) * scale / np.sqrt(shape[-1])).astype(np.float32)

    return normal


def _rope_freqs() -> np.ndarray:
    """A quarter of the angles of a layer without a window turn."""
    return np.array([1.0] * (HEAD // 8) + [1e30] * (HEAD // 2 - HEAD // 8), np.float32)


def _block(normal, n_embd: int, n_ff: int, head: int) -> dict[str, np.ndarray]:
    """A layer that reads keys and values of another."""
    norms = ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm")
    return {
        **{f"{name}.weight": np.ones(n_embd, np.float32) for name in norms},
        "attn_q_norm.weight": np.ones(head, np.float32),
        "attn_q.weight": normal(N_HEAD * head, n_embd), "attn_output.weight": normal(n_embd, N_HEAD * head),
        "ffn_gate.weight": normal(n_ff, n_embd), "ffn_up.weight": normal(n_ff, n_embd),
        "ffn_down.weight": normal(n_embd, n_ff), "layer_output_scale.weight": np.full(1, 0.7, np.float32),
    }  # fmt: skip


def _write(
    path: Path,
    architecture: str,
    numbers: Numbers,
    tensors: Mapping[str, np.ndarray],
    types: Mapping[str, Quant],
    n_tokens: int = 600,
    letters: str = "etaoinshrdlu",
    keys: Numbers | None = None,
    without: tuple[str, ...] = (),
    more: Mapping[str, np.ndarray] | None = None,
    n_ctx: int = 512,
) -> Path:
    """`keys`: numbers instead of these, None leaves one out; `more`, `without`: tensors that are added or left out."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(f"toy {architecture}")
    shared = {
        "context_length": n_ctx, "attention.head_count": N_HEAD, "attention.head_count_kv": N_HEAD_KV,
        "attention.key_length": HEAD, "attention.value_length": HEAD, "rope.dimension_count": HEAD,
        "attention.key_length_swa": HEAD_SWA, "attention.value_length_swa": HEAD_SWA,
        "rope.dimension_count_swa": HEAD_SWA, "attention.sliding_window": WINDOW,
    }  # fmt: skip
    for key, value in (shared | dict(numbers) | dict(keys or {})).items():
        if isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32(f"{architecture}.rope.freq_base", 1e6)
    writer.add_float32(f"{architecture}.rope.freq_base_swa", 1e4)
    names, kinds, merges = vocabulary(n_tokens, letters)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(names.index("<|im_end|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, values in (dict(tensors) | dict(more or {})).items():
        if name in without:
            continue
        if name == "output.weight":
            values[np.isin(names, ENDS)] = 0
        type_ = types.get(name, Quant.F32)
        raw = None if type_ in (Quant.F32, Quant.F16) else type_
        writer.add_tensor(name, quantize(values, type_), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
