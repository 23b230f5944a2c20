"""Where weights go, how they are loaded, and in what batches they compute: each flag reaches llama.cpp, and no text
depends on it. What needs a GPU is skipped where there is none."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from llamabase.errors import EngineError, SettingError
from llamabase.llama import library
from llamabase.llama.context import F32, Context, ContextParams
from llamabase.llama.ggml import buffer_types, offloading
from llamabase.llama.model import Model, ModelParams
from runner import SpeculativeLM
from runner.loop.weights import LoadOptions

from .toy import write_model

ON = next(iter(offloading()), "")  # a device
needs_device = pytest.mark.skipif(not ON, reason="llama.cpp has no device here but the CPU")
WAYS = (("none", ON), (ON, "none"), (ON, ON))  # the target's and the drafter's


@contextmanager
def logged() -> Iterator[list[str]]:
    """What llama.cpp logs."""
    lines: list[str] = []
    keep = llama_cpp.llama_log_callback(lambda level, text, _: lines.append(text.decode("utf-8", "replace")))
    library.start()
    llama_cpp.llama_log_set(keep, None)
    try:
        yield lines
    finally:
        llama_cpp.llama_log_set(library._log, None)


def answer(target: Path, draft: Path | None, **how: Any) -> str:
    options = {"n_ctx": 128, "n_threads": 1, "cache": F32, "cache_draft": F32} | how
    with SpeculativeLM(target, draft, **options) as lm:
        done = lm.chat("the sea and the king", temperature=0, max_tokens=24, draft_max=3)
        assert draft is None or done.drafted
        return done.text


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("experts") / "moe.gguf", "qwen3vlmoe", n_layer=3)


@pytest.mark.parametrize(
    ("how", "layers"),
    [
        ({}, set()),
        ({"n_cpu_moe": -1}, {0, 1, 2}),
        ({"n_cpu_moe": 2}, {0, 1}),
        ({"override_tensor": r"blk\.1\..*exps=CPU,nothing=CPU"}, {1}),
    ],
)
def test_experts_stay_where_they_are_told_to(experts: Path, how: dict[str, Any], layers: set[int]) -> None:
    with logged() as lines, Model(experts, ModelParams(**how)):
        found = re.findall(r"tensor (\S+) .*buffer type overridden to CPU", "".join(lines))
    assert set(found) == {f"blk.{i}.ffn_{part}_exps.weight" for i in layers for part in ("gate", "up", "down")}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("mode", "mapped"), [("auto", True), ("mmap", True), ("mmap+mlock", True), ("none", False), ("mlock", False)]
)
def test_weights_are_mapped_or_read(tmp_path: Path, mode: str, mapped: bool) -> None:
    path = write_model(tmp_path / "mapped.gguf")
    with Model(path, ModelParams(load_mode=mode)):
        assert (str(path) in Path("/proc/self/maps").read_text()) == mapped
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_everything_reaches_llama_cpp(toys: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    models, contexts = [], []
    load, make = llama_cpp.llama_model_load_from_file, llama_cpp.llama_init_from_model

    def loaded(path: bytes, params: Any) -> Any:
        shares = [params.tensor_split[i] for i in range(3)] if params.tensor_split else None
        models.append((params.n_gpu_layers, params.split_mode, params.main_gpu, params.load_mode, shares))
        return load(path, params)

    def made(model: Any, params: Any) -> Any:
        contexts.append((params.n_batch, params.n_ubatch, params.offload_kqv, params.n_threads))
        return make(model, params)

    monkeypatch.setattr(llama_cpp, "llama_model_load_from_file", loaded)
    monkeypatch.setattr(llama_cpp, "llama_init_from_model", made)
    pair = toys["target"], toys["good-trimmed"]
    how: dict[str, Any] = {"split_mode": "row", "main_gpu": 1, "tensor_split": [3, 1], "device": "none"}
    how |= {"n_gpu_layers": 2, "load_mode": "none", "n_batch": 64, "n_ubatch": 32, "offload_kqv": False}
    SpeculativeLM(*pair, n_ctx=128, n_threads=1, **how).close()
    SpeculativeLM(*pair, n_ctx=128, n_threads=2, n_threads_draft=1).close()
    row, layer = llama_cpp.LLAMA_SPLIT_MODE_ROW, llama_cpp.LLAMA_SPLIT_MODE_LAYER
    first, second = (2, row, 1, llama_cpp.LLAMA_LOAD_MODE_NONE, [3, 1, 0]), (-1, layer, 0, -1, None)
    assert models == [first, first, second, second]
    assert contexts == [(64, 32, False, 1)] * 2 + [(128, 128, True, 2), (128, 128, True, 1)]


def test_what_is_said_of_one_models_tensors_and_devices_is_not_the_others() -> None:
    files = Path("t.gguf"), Path("d.gguf")
    options = LoadOptions(*files, device="none", tensor_split=(1,), main_gpu=1, override_tensor="a=CPU", n_cpu_moe=3)
    assert options.model_params == ModelParams(None, "none", "layer", (1,), 1, "auto", "a=CPU", 3)
    assert options.model_params_draft == ModelParams(None, "none", "layer", (1,), 1)
    others = {"device_draft": "none", "override_tensor_draft": "b=CPU", "n_cpu_moe_draft": 1, "n_gpu_layers_draft": 0}
    options = LoadOptions(*files, n_gpu_layers=5, main_gpu=1, tensor_split=(1,), load_mode="none", **others)
    assert options.model_params_draft == ModelParams(0, "none", "layer", (), 0, "none", "b=CPU", 1)


@pytest.mark.parametrize("name", ["spec-trimmed", "good-trimmed", "target"])
def test_a_text_is_the_same_in_any_batches(toys: dict[str, Path], name: str) -> None:
    wanted = answer(toys["target"], None)
    for n_batch, n_ubatch in ((2, 512), (None, 1), (64, 2), (7, 3), (None, 8)):
        assert answer(toys["target"], toys[name], n_batch=n_batch, n_ubatch=n_ubatch) == wanted


def test_one_token_at_a_time_with_drafts_by_cost(toys: dict[str, Path]) -> None:
    """Nothing can be verified then, and measuring has nothing but single tokens."""
    with SpeculativeLM(toys["target"], toys["spec-trimmed"], n_ctx=128, n_batch=1) as lm:
        done = lm.chat("the sea", temperature=0, max_tokens=8)
    assert (done.tokens, done.drafted) == (8, 0)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"device": "GPU7"}, "device 'GPU7': llama.cpp has no such device here; choose from"),
        ({"device": "none,GPU7"}, "device 'none'"),
        ({"device_draft": ""}, "device ''"),
        ({"split_mode": "rows"}, "split_mode='rows': choose one of none, layer, row, tensor"),
        ({"load_mode": "fast"}, "load_mode='fast': choose one of auto, none, mmap"),
        ({"tensor_split": "3,1"}, "tensor_split='3,1': is not a list of proportions"),
        ({"tensor_split": (0, 0)}, "is not a list of proportions"),
        ({"tensor_split": (1, float("nan"))}, "is not a list of proportions"),
        ({"tensor_split": (1,) * 99}, "tensor_split has 99 parts, and llama.cpp takes fewer than 16"),
        ({"override_tensor": "exps=GPU7"}, "override_tensor 'exps=GPU7': is not PATTERN=BUFFER with a buffer that"),
        ({"override_tensor_draft": "CPU"}, "override_tensor 'CPU': is not PATTERN=BUFFER"),
        ({"n_batch": 0}, "n_batch=0: a batch holds at least one token"),
        ({"n_ubatch": 0}, "n_ubatch=0: a batch"),
    ],
)
def test_what_is_not_here_is_refused_before_anything_is_loaded(how: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=re.escape(said)) as refused:
        SpeculativeLM("absent.gguf", "absent.gguf", **how)
    assert all(name in str(refused.value) for name in (offloading() if "GPU7" in how.get("device", "") else ()))


def test_llama_cpp_says_what_is_wrong_with_a_pattern(toys: dict[str, Path]) -> None:
    with pytest.raises(EngineError, match=r"target.gguf: llama.cpp cannot load it: .* regular expression"):
        Model(toys["target"], ModelParams(override_tensor="(=CPU"))


def test_the_cpu_is_not_a_device_to_offload_to() -> None:
    assert "CPU" in buffer_types() and "CPU" not in offloading()


@needs_device
@pytest.mark.parametrize(("device", "device_draft"), WAYS)
@pytest.mark.parametrize("name", ["target", "good-trimmed", "spec-trimmed"])
def test_a_pair_on_either_side(toys: dict[str, Path], device: str, device_draft: str, name: str) -> None:
    """The text is the target's own, wherever its drafter is, and each model is where it was sent."""
    wanted = answer(toys["target"], None, device=device)
    with logged() as lines:
        found = answer(toys["target"], toys[name], device=device, device_draft=device_draft)
    assert found == wanted
    placed = re.findall(r"layer +\d+ assigned to device (\w+)", "".join(lines))
    assert placed == [("CPU" if where == "none" else where) for where in (device, device_draft) for _ in range(2)]


@needs_device
def test_a_device_computes_what_the_cpu_does(toys: dict[str, Path]) -> None:
    ids = list(range(40))
    made = []
    for how in (ModelParams(device=ON), ModelParams(device="none"), ModelParams(override_tensor="ffn=CPU")):
        for offload in (True, False):
            with (
                Model(toys["target"], how) as model,
                Context(model, 64, ContextParams(1, F32, offload_kqv=offload)) as context,
            ):
                made.append(context.decode(ids).copy())
    assert all(abs(other - made[0]).max() < 0.01 * abs(made[0]).max() for other in made)
