"""Small GGUF files of hybrid and recurrent models, which llama.cpp really loads: a table for each architecture.

A layer is a sum of parts, a part is tensors by their shapes (rows first, as numpy has them). Weights are random, but
what makes up the recurrence is chosen so that a state fades by some percent a token: it matters for tens of tokens, and
neither grows nor dies.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quant

from .toy import CHAT_TEMPLATE, ENDS, N_EMBD, N_FF, N_HEAD, SECTIONS, quantize, vocabulary

Shapes = dict[str, tuple[int, ...]]
Keys = dict[str, int | float | list[int]]

HEAD_DIM, STATE, CONV, RANK, N_EXPERT, EXPERT_FF, LORA = 64, 32, 4, 4, 4, 64, 32


def named(suffix: str, parts: str, *shape: int) -> Shapes:
    """Tensors of one shape."""
    return {f"{part}{suffix}": shape for part in parts.split()}


NORM = named(".weight", "attn_norm", N_EMBD)
FFN_NORM = named(".weight", "ffn_norm", N_EMBD)
POST_NORM = named(".weight", "post_attention_norm", N_EMBD)
ATTENTION = named(".weight", "attn_q attn_k attn_v attn_output", N_EMBD, N_EMBD)
QK_NORM = named(".weight", "attn_q_norm attn_k_norm", HEAD_DIM)
GATED_ATTENTION = ATTENTION | {"attn_q.weight": (2 * N_EMBD, N_EMBD)} | QK_NORM
MLP = named(".weight", "ffn_gate ffn_up", N_FF, N_EMBD) | {"ffn_down.weight": (N_EMBD, N_FF)}
EXPERTS: Shapes = {
    "ffn_gate_inp.weight": (N_EXPERT, N_EMBD),
    **named(".weight", "ffn_gate_exps ffn_up_exps", N_EXPERT, EXPERT_FF, N_EMBD),
    "ffn_down_exps.weight": (N_EXPERT, N_EMBD, EXPERT_FF),
}
SHARED = named(".weight", "ffn_gate_shexp ffn_up_shexp", EXPERT_FF, N_EMBD) | {
    "ffn_down_shexp.weight": (N_EMBD, EXPERT_FF)
}
SHARED_GATE: Shapes = {"ffn_gate_inp_shexp.weight": (N_EMBD,)}
PROBS: Shapes = {"exp_probs_b.bias": (N_EXPERT,)}
SHORT_CONV: Shapes = {
    "shortconv.conv.weight": (N_EMBD, CONV),
    "shortconv.in_proj.weight": (3 * N_EMBD, N_EMBD),
    "shortconv.out_proj.weight": (N_EMBD, N_EMBD),
}
DELTA_NET: Shapes = {
    "attn_qkv.weight": (2 * N_EMBD, N_EMBD),
    "attn_gate.weight": (N_EMBD, N_EMBD),
    "ssm_conv1d.weight": (2 * N_EMBD, CONV),
    "ssm_dt.bias": (RANK,),
    "ssm_a": (RANK,),
    "ssm_norm.weight": (HEAD_DIM,),
    "ssm_out.weight": (N_EMBD, N_EMBD),
}


def mamba(inner: int, normed: bool = False) -> Shapes:
    """The first Mamba's mixer; `normed`: with Jamba's norms."""
    shapes: Shapes = {
        "ssm_in.weight": (2 * inner, N_EMBD),
        "ssm_conv1d.weight": (inner, CONV),
        "ssm_conv1d.bias": (inner,),
        "ssm_x.weight": (RANK + 2 * STATE, inner),
        "ssm_dt.weight": (inner, RANK),
        "ssm_dt.bias": (inner,),
        "ssm_a": (inner, STATE),
        "ssm_d": (inner,),
        "ssm_out.weight": (N_EMBD, inner),
    }
    norms: Shapes = {"ssm_dt_norm.weight": (RANK,), **named(".weight", "ssm_b_norm ssm_c_norm", STATE)}
    return shapes | norms if normed else shapes


def mamba2(inner: int) -> Shapes:
    mixed = inner + 2 * STATE
    return {
        "ssm_in.weight": (inner + mixed + RANK, N_EMBD),
        "ssm_conv1d.weight": (mixed, CONV),
        "ssm_conv1d.bias": (mixed,),
        "ssm_dt.bias": (RANK,),
        "ssm_a": (RANK, 1),
        "ssm_d": (RANK, 1),
        "ssm_norm.weight": (1, inner),
        "ssm_out.weight": (N_EMBD, inner),
    }


PLAMO_NORMS: Shapes = {**named("", "post_attention_norm post_ffw_norm", N_EMBD), **FFN_NORM}
PLAMO_MLP = PLAMO_NORMS | {"ffn_up.weight": (2 * N_FF, N_EMBD), "ffn_down.weight": (N_EMBD, N_FF)}
PLAMO_MAMBA: Shapes = {
    "ssm_in.weight": (2 * N_EMBD, N_EMBD),
    "ssm_conv1d.weight": (N_EMBD, CONV),
    "ssm_x.weight": (64 + 2 * STATE, N_EMBD),
    "ssm_dt.weight": (RANK, 64),
    "ssm_dt.bias": (RANK,),
    **named("", "ssm_a ssm_d", RANK),
    "ssm_out.weight": (N_EMBD, N_EMBD),
    "ssm_dt_norm": (64,),
    **named("", "ssm_b_norm ssm_c_norm", STATE),
}
PLAMO_ATTENTION: Shapes = {
    "attn_qkv.weight": (3 * N_EMBD, N_EMBD),
    **named(".weight", "attn_q_norm attn_k_norm", N_HEAD, HEAD_DIM),
    "attn_output.weight": (N_EMBD, N_EMBD),
}
RWKV: Shapes = {
    **named(".weight", "attn_norm attn_norm_2 time_mix_ln", N_EMBD),
    **named(".bias", "attn_norm attn_norm_2 time_mix_ln", N_EMBD),
    **named(".weight", "time_mix_key time_mix_value time_mix_receptance time_mix_output", N_EMBD, N_EMBD),
    "channel_mix_lerp_k.weight": (1, 1, N_EMBD),
    "channel_mix_key.weight": (N_FF, N_EMBD),
    "channel_mix_value.weight": (N_EMBD, N_FF),
}
RWKV6: Shapes = RWKV | {
    "time_mix_w1.weight": (5 * LORA, N_EMBD),
    "time_mix_w2.weight": (5, N_EMBD, LORA),
    "time_mix_lerp_x.weight": (1, 1, N_EMBD),
    "time_mix_lerp_fused.weight": (5, 1, 1, N_EMBD),
    "time_mix_first.weight": (N_HEAD, HEAD_DIM),
    "time_mix_decay.weight": (N_EMBD,),
    "time_mix_decay_w1.weight": (LORA, N_EMBD),
    "time_mix_decay_w2.weight": (N_EMBD, LORA),
    "time_mix_gate.weight": (N_EMBD, N_EMBD),
    "channel_mix_lerp_r.weight": (1, 1, N_EMBD),
    "channel_mix_receptance.weight": (N_EMBD, N_EMBD),
}
RWKV7: Shapes = RWKV | {
    **named(".weight", "time_mix_w0 time_mix_a0 time_mix_v0 time_mix_k_k time_mix_k_a time_mix_r_k", N_EMBD),
    **named(".weight", "time_mix_w1 time_mix_a1 time_mix_v1 time_mix_g1", LORA, N_EMBD),
    **named(".weight", "time_mix_w2 time_mix_a2 time_mix_v2 time_mix_g2", N_EMBD, LORA),
    "time_mix_lerp_fused.weight": (6, 1, 1, N_EMBD),
}
KIMI_DELTA: Shapes = {
    **named(".weight", "ssm_conv1d_q ssm_conv1d_k ssm_conv1d_v", 1, N_EMBD, 1, CONV),
    **named(".weight", "attn_q attn_k attn_v attn_output", N_EMBD, N_EMBD),
    "ssm_beta.weight": (N_HEAD, N_EMBD),
    "ssm_a": (N_HEAD, 1),
    "ssm_dt.bias": (N_EMBD,),
    "ssm_norm.weight": (HEAD_DIM,),
}
LATENT_ATTENTION: Shapes = {  # keys of 32 numbers without positions and 32 with
    "attn_q.weight": (N_EMBD, N_EMBD),
    "attn_kv_a_mqa.weight": (HEAD_DIM + 32, N_EMBD),
    "attn_kv_a_norm.weight": (HEAD_DIM,),
    "attn_k_b.weight": (N_HEAD, HEAD_DIM, 32),
    "attn_v_b.weight": (N_HEAD, HEAD_DIM, HEAD_DIM),
    "attn_output.weight": (N_EMBD, N_EMBD),
}


@dataclass(frozen=True)
class Toy:
    """An architecture's layers, and its metadata beside what all have."""

    layers: tuple[Shapes, ...]
    keys: Keys
    more: Shapes | None = None
    output_norm: str = "output_norm"


def ssm(inner: int = N_EMBD, state: int = STATE, groups: int = 1) -> Keys:
    return {
        "ssm.conv_kernel": CONV, "ssm.inner_size": inner, "ssm.state_size": state, "ssm.time_step_rank": RANK,
        "ssm.group_count": groups,
    }  # fmt: skip


MOE: Keys = {"expert_count": N_EXPERT, "expert_used_count": 2, "expert_feed_forward_length": EXPERT_FF}
QWEN = ssm(state=HEAD_DIM, groups=2) | {"full_attention_interval": 2, "rope.dimension_count": HEAD_DIM}
BETA_ALPHA = named(".weight", "ssm_beta ssm_alpha", RANK, N_EMBD)
QWEN_EXPERTS = NORM | POST_NORM | EXPERTS | SHARED | SHARED_GATE
SECOND: Keys = {"attention.head_count_kv": [0, N_HEAD]}  # the second layer is attention
KIMI: Keys = MOE | {
    "attention.head_count_kv": [0, 1], "attention.key_length": HEAD_DIM + 32, "attention.key_length_mla": HEAD_DIM,
    "attention.value_length_mla": HEAD_DIM, "attention.kv_lora_rank": HEAD_DIM, "rope.dimension_count": 32,
    "ssm.conv_kernel": CONV, "kda.head_dim": HEAD_DIM, "expert_shared_count": 1, "leading_dense_block_count": 1,
    "expert_gating_func": 2,
}  # fmt: skip
KIMI_MLP, KIMI_EXPERTS = NORM | FFN_NORM | MLP, NORM | FFN_NORM | EXPERTS | PROBS | SHARED
RWKV_NORMS: Shapes = {
    "token_embd_norm.weight": (N_EMBD,), "token_embd_norm.bias": (N_EMBD,), "output_norm.bias": (N_EMBD,),
}  # fmt: skip
RWKV_KEYS: Keys = {"wkv.head_size": HEAD_DIM, "token_shift_count": 2, "attention.layer_norm_epsilon": 1e-5}

TOYS: dict[str, Toy] = {
    "qwen35": Toy(
        (NORM | POST_NORM | DELTA_NET | BETA_ALPHA | MLP, NORM | POST_NORM | GATED_ATTENTION | MLP),
        QWEN | {"rope.dimension_sections": SECTIONS},
    ),
    "qwen35moe": Toy(
        (QWEN_EXPERTS | DELTA_NET | BETA_ALPHA, QWEN_EXPERTS | GATED_ATTENTION),
        QWEN | MOE | {"rope.dimension_sections": SECTIONS, "expert_shared_feed_forward_length": EXPERT_FF},
    ),
    "qwen3next": Toy(
        (QWEN_EXPERTS | DELTA_NET | {"ssm_ba.weight": (2 * RANK, N_EMBD)}, QWEN_EXPERTS | GATED_ATTENTION),
        QWEN | MOE | {"expert_shared_feed_forward_length": EXPERT_FF},
    ),
    "lfm2": Toy(
        (NORM | SHORT_CONV | FFN_NORM | MLP, NORM | ATTENTION | QK_NORM | FFN_NORM | MLP),
        SECOND | {"shortconv.l_cache": CONV},
        output_norm="token_embd_norm",
    ),
    "lfm2moe": Toy(
        (NORM | SHORT_CONV | FFN_NORM | MLP, NORM | ATTENTION | QK_NORM | FFN_NORM | EXPERTS | PROBS),
        SECOND | MOE | {"shortconv.l_cache": CONV, "leading_dense_block_count": 1, "expert_gating_func": 2},
        output_norm="token_embd_norm",
    ),
    "falcon-h1": Toy((NORM | ATTENTION | mamba2(N_EMBD) | {"ffn_norm": (N_EMBD,)} | MLP,) * 2, ssm()),
    "granitehybrid": Toy(
        (NORM | mamba2(2 * N_EMBD) | FFN_NORM | MLP, NORM | ATTENTION | FFN_NORM | MLP),
        SECOND | ssm(2 * N_EMBD) | {"embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 2.0},
    ),
    "mamba": Toy((NORM | mamba(2 * N_EMBD),) * 2, ssm(2 * N_EMBD)),
    "mamba2": Toy((NORM | mamba2(N_EMBD),) * 2, ssm()),
    "jamba": Toy(
        (NORM | mamba(2 * N_EMBD, normed=True) | FFN_NORM | MLP, NORM | ATTENTION | FFN_NORM | MLP),
        SECOND | ssm(2 * N_EMBD),
    ),
    "nemotron_h": Toy(
        (
            NORM | mamba2(N_EMBD),
            NORM | ATTENTION,
            NORM | {"ffn_up.weight": (N_FF, N_EMBD), "ffn_down.weight": (N_EMBD, N_FF)},
        ),
        ssm()
        | {
            "attention.head_count_kv": [0, N_HEAD, 0],
            "feed_forward_length": [0, 0, N_FF],
            "attention.layer_norm_epsilon": 1e-5,
        },
    ),
    "plamo2": Toy((NORM | PLAMO_MAMBA | PLAMO_MLP, NORM | PLAMO_ATTENTION | PLAMO_MLP), SECOND | ssm(groups=0)),
    "rwkv6": Toy((RWKV6,) * 2, RWKV_KEYS | {"time_mix_extra_dim": LORA, "time_decay_extra_dim": LORA}, RWKV_NORMS),
    "rwkv7": Toy(
        (RWKV7,) * 2,
        RWKV_KEYS | {f"attention.{part}_lora_rank": LORA for part in ("decay", "iclr", "value_residual_mix", "gate")},
        RWKV_NORMS,
    ),
    "kimi-linear": Toy(
        (
            KIMI_MLP
            | KIMI_DELTA
            | named(".weight", "ssm_f_a ssm_g_a", HEAD_DIM, N_EMBD)
            | named(".weight", "ssm_f_b ssm_g_b", N_EMBD, HEAD_DIM),
            KIMI_EXPERTS | LATENT_ATTENTION,
        ),
        KIMI,
    ),
    "bailingmoe3": Toy(
        (
            KIMI_MLP | KIMI_DELTA | named(".weight", "ssm_f_a ssm_g_a", N_EMBD, N_EMBD),
            KIMI_EXPERTS | LATENT_ATTENTION | {"attn_gate.weight": (N_HEAD, N_EMBD)},
        ),
        KIMI | {"kda.gate_lower_bound": -0.2},
    ),
}


def write_hybrid(path: Path, architecture: str, head_type: Quant = Quant.F32, seed: int = 0) -> Path:
    """Write a loadable model of one of TOYS, with the vocabulary, the template and the head of `write_model`'s."""
    toy, rng = TOYS[architecture], np.random.default_rng(seed)
    names, types, merges = vocabulary()
    writer = gguf.GGUFWriter(path, architecture)
    keys: Keys = {
        "context_length": 512, "embedding_length": N_EMBD, "block_count": len(toy.layers),
        "feed_forward_length": N_FF, "attention.head_count": N_HEAD, "attention.head_count_kv": N_HEAD,
        "attention.key_length": HEAD_DIM, "attention.value_length": HEAD_DIM, "vocab_size": len(names),
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0,
    }  # fmt: skip
    for key, value in (keys | toy.keys).items():
        if isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{key}", value)
        else:
            writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_name(f"toy {architecture}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(names.index("<|endoftext|>"))
    writer.add_eos_token_id(names.index("<|im_end|>"))
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, scale in (("token_embd.weight", 8.0), ("output.weight", 4.0)):
        rows = _values(name, (len(names), N_EMBD), rng) * np.float32(scale)
        if name == "output.weight":
            rows[np.isin(names, ENDS)] = 0
        raw = head_type if head_type not in (Quant.F32, Quant.F16) else None
        writer.add_tensor(name, quantize(rows, head_type), raw_dtype=raw)
    shapes: Shapes = {f"{toy.output_norm}.weight": (N_EMBD,)} | (toy.more or {})
    for i, layer in enumerate(toy.layers):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    for name, shape in shapes.items():
        writer.add_tensor(name, _values(name, shape, rng))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# Mean and standard deviation by name: what decides how fast a state fades, mixes of two tokens, and norms.
NEAR = {
    "time_mix_decay$": (-3.0, 0.5), "time_mix_w0$": (-2.0, 0.5), "_lerp_": (0.5, 0.2), "_k_k$": (0.8, 0.1),
    "_k_a$": (1.0, 0.1), "ssm_d$": (1.0, 0.3), "norm": (1.0, 0.1), "_ln$": (1.0, 0.1),
}  # fmt: skip


def _values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    values, bare = rng.standard_normal(shape), name.removesuffix(".weight")
    if bare.endswith("ssm_a"):
        values = -0.1 * np.exp(values)
    elif bare.endswith(".bias"):
        values *= 0.1
    elif near := next((near for pattern, near in NEAR.items() if re.search(pattern, bare)), None):
        values = near[0] + near[1] * values
    else:
        values /= np.sqrt(shape[-1])
    return values.astype(np.float32)
