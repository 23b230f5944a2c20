"""Models of known shape and random weights: their sizes are the published ones, and llama.cpp takes them for models."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from gguf_trim.__main__ import main
from gguf_trim.cut import lay_out
from gguf_trim.format.memory_bound import step_bytes
from gguf_trim.keep import keep_listed
from gguf_trim.pairs import shapes
from gguf_trim.pairs.catalog import load_catalog
from gguf_trim.pairs.fetch import fetch
from gguf_trim.pairs.shapes import SHAPES, Shape, outline, types_of, write_shape
from gguf_trim.prove import prove
from llamabase.errors import EngineError, TrimError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.context import Context
from llamabase.llama.model import Model
from llamabase.llama.quantize import requantized
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import Sampling
from runner.draft.opening import DraftOptions, open_drafter

N_VOCAB = 2048
SMALL = Shape("small", "llama", N_VOCAB, 512, 2, 8, 2, 64, 768, True)
QUANTS = ("F16", "Q8_0", "Q4_0", "Q4_K_M")


@pytest.mark.parametrize(
    ("name", "n_params"),
    [
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3.1-8b", 8_030_261_248),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        # those of the whole model, MTP block included, less those of its vision tower
        ("qwen3.5-0.8b", 873_438_784 - 100_592_896),
        ("qwen3.5-2b", 2_274_069_824 - 331_416_576),
        ("qwen3.5-4b", 4_659_865_088 - 333_514_240),
        ("qwen3.5-9b", 9_653_104_368 - 456_010_480),
        ("qwen3.5-27b", 27_781_427_952 - 460_730_096),
        ("gemma-3-270m", 268_098_176),
        ("gemma-3-1b", 999_885_952),
        # 4,300,079,472 with 416,866,032 of the vision tower and 2,950,272 of its projector
        ("gemma-3-4b", 3_880_263_168),
        # 12,187,325,040 with the same vision tower and 4,424,832 of its projector
        ("gemma-3-12b", 11_766_034_176),
    ],
)
def test_parameters_are_those_of_the_model_cards(name: str, n_params: int) -> None:
    """A tied head counts once, RoPE factors do not count."""
    tensors = SHAPES[name].tensors
    assert sum(math.prod(size) for tensor, size in tensors.items() if tensor != "rope_freqs.weight") == n_params


@pytest.mark.parametrize(
    ("name", "quant", "mebibytes"),
    [
        ("llama-3.2-1b", "Q4_K_M", 762.81),
        ("llama-3.2-3b", "Q4_K_M", 1.87 * 1024),
        ("llama-3.1-8b", "Q4_K_M", 4.58 * 1024),
        ("qwen2.5-1.5b", "Q4_0", 885.97),
        ("qwen3-0.6b", "Q4_K_M", 372.65),
        ("qwen3.5-0.8b", "Q8_0", 763.78),
        ("qwen3.5-2b", "Q8_0", 1.86 * 1024),
        ("qwen3.5-4b", "Q8_0", 4.16 * 1024),
        ("qwen3.5-9b", "Q4_K_M", 5.23 * 1024),
        ("qwen3.5-27b", "Q4_K_M", 15.40 * 1024),
        ("gemma-3-4b", "Q4_K_M", 2.31 * 1024),
        ("gemma-3-12b", "Q4_K_M", 6.79 * 1024),
    ],
)
def test_sizes_are_those_that_llama_bench_prints_of_the_real_files(name: str, quant: str, mebibytes: float) -> None:
    """Those of Qwen3.5 were made without the MTP block, its last."""
    shape = SHAPES[name]
    pieces = [p for p in outline(shape, quant).pieces if not p.tensor.name.startswith(f"blk.{shape.n_layer}.")]
    digits = 0.005 * (1024 if mebibytes > 1000 else 1)  # printed in MiB or GiB, to two places
    assert sum(piece.n_bytes for piece in pieces) / 2**20 == pytest.approx(mebibytes, abs=digits)


def test_a_miniature_of_other_hyperparameters_would_choose_otherwise() -> None:
    """The mix depends on how many layers there are and on the row length, so both must reach llama.cpp."""
    name = "blk.2.ffn_down.weight"
    assert types_of(SHAPES["llama-3.2-1b"], "Q4_K_M")[name] != types_of(SHAPES["llama-3.2-3b"], "Q4_K_M")[name]
    q4, q8 = (types_of(SHAPES[x], "Q4_K_M")["token_embd.weight"].name for x in ("llama-3.2-1b", "qwen2.5-0.5b"))
    assert (q4, q8) == ("Q6_K", "Q8_0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    for quant in QUANTS:
        write_shape(SMALL, folder / f"{quant}.gguf", quant)
    return folder


def _logits(path: Path) -> np.ndarray:
    with Model(path) as model, Context(model, 128) as context:
        return context.decode([5, 300, 7, 1999, 900], 5).copy()


@pytest.mark.parametrize("quant", QUANTS)
def test_llama_cpp_loads_it_trims_and_drafts(folder: Path, tmp_path: Path, quant: str) -> None:
    path, trimmed = folder / f"{quant}.gguf", tmp_path / "trimmed.gguf"
    logits = _logits(path)
    assert logits.shape == (5, N_VOCAB)
    assert np.isfinite(logits).all()
    assert logits.std() > 0.01
    listed = tmp_path / "keep.txt"
    listed.write_text("\n".join(map(str, range(1024))))
    arguments = ["trim", str(path), "--keep", str(listed), "--k", "1024", "-o", str(trimmed)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert prove(trimmed, path).ok
    target = Vocabulary(GGUFFile(path))
    for drafter in (path, trimmed):
        opened = open_drafter(DraftOptions(drafter, 128), target)
        draft = opened.draft([5, 300, 7], 4, Sampling(temp=0), Noise(0))
        opened.close()
        assert len(draft) == 4


@pytest.mark.parametrize(
    ("architecture", "tied"),
    [
        *[("llama", False), ("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False), ("gemma3", True)],
        *[("qwen35", True), ("qwen35", False)],
    ],
)
def test_every_architecture_loads(tmp_path: Path, architecture: str, tied: bool) -> None:
    """Of qwen35 with an attention layer, the fourth; more heads of values than of keys, as in 4B and larger."""
    shape = replace(SMALL, architecture=architecture, tied=tied, n_layer=4, n_head_v=32)
    write_shape(shape, tmp_path / "x.gguf", "Q4_K_M")
    assert np.isfinite(_logits(tmp_path / "x.gguf")).all()
    assert ("output.weight" in GGUFFile(tmp_path / "x.gguf").tensors) is not tied


@pytest.mark.parametrize("quant", QUANTS)
def test_weights_are_ordinary_numbers(folder: Path, quant: str) -> None:
    """The deviation that was asked for, once llama.cpp itself has written the file out as F32."""
    file = GGUFFile(requantized(folder / f"{quant}.gguf", "F32", folder))
    for tensor in file.tensors.values():
        values = np.frombuffer(file.read(tensor), np.float32)
        if shapes._is_factor(tensor):
            assert (values == 1).all(), tensor.name
        else:
            assert values.std() == pytest.approx(shapes.DEVIATION, rel=0.05), tensor.name
            assert np.abs(values).max() < 8 * shapes.DEVIATION


@pytest.mark.parametrize("quant", QUANTS)
def test_types_are_what_quantising_the_whole_file_gives(folder: Path, tmp_path: Path, quant: str) -> None:
    """The miniature's answer, against llama.cpp's on the model itself."""
    assert _table(folder / f"{quant}.gguf") == _table(requantized(folder / "F16.gguf", quant, tmp_path))


def _table(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tensor.shape, tensor.type.name) for name, tensor in GGUFFile(path).tensors.items()}


def _sparse(shape: Shape, quant: str, path: Path) -> Path:
    """The file without its weights: all that a header tells, and no room taken."""
    output = outline(shape, quant)
    with open(path, "wb") as file:
        file.write(output.header)
        file.truncate(output.n_bytes)
    return path


def test_bytes_of_a_draft_step(tmp_path: Path) -> None:
    """Llama-3.2-1B in Q4_K_M: the head is 215 of 800 MB, and keeping 16,384 of 128,256 rows saves 188 of them."""
    path = _sparse(SHAPES["llama-3.2-1b"], "Q4_K_M", tmp_path / "1b.gguf")
    cut = lay_out(path, lambda vocabulary, has_row, _: keep_listed(vocabulary, has_row, list(range(16384)), 16384))
    full, row = step_bytes(GGUFFile(path)), 2048 // 256 * 210  # a Q6_K block of 256 numbers takes 210 bytes
    assert full - cut.step_bytes == (128256 - 16384) * row
    assert full / 2**20 == pytest.approx(762.81, abs=0.005)
    assert cut.step_bytes / full == pytest.approx(0.765, abs=0.001)


@pytest.mark.parametrize(("name", "n_vocab"), [("qwen2.5-7b", 151936), ("gemma-3-12b", 262144)])
def test_two_shapes_of_one_family_are_a_pair(tmp_path: Path, name: str, n_vocab: int) -> None:
    """Tables of different length too: Qwen2.5 pads to 151,936 rows or 152,064, Gemma 3 to 262,144 or 262,208."""
    assert SHAPES[name].n_vocab != n_vocab
    target = _sparse(SHAPES[name], "Q4_0", tmp_path / "target.gguf")
    write_shape(replace(SMALL, n_vocab=n_vocab), tmp_path / "small.gguf", "Q4_0")
    open_drafter(DraftOptions(tmp_path / "small.gguf", 64), Vocabulary(GGUFFile(target))).close()


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill, written = shapes._fill, []

    def interrupted(file, tensor, tile, advance) -> None:
        fill(file, tensor, tile, advance)
        written.append(tensor.name)
        if len(written) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "_fill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_shape(SMALL, tmp_path / "x.gguf", "Q4_0")
    assert len(written) == 5
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(TrimError, match=r"x\.gguf: needs \d+ MB and the disk has \d+ MB free"):
        write_shape(replace(SMALL, n_ff=1 << 31), tmp_path / "x.gguf", "Q4_0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("quant", ["Q4", "IQ2_XXS"])
def test_a_mix_that_cannot_be_made_is_refused(tmp_path: Path, quant: str) -> None:
    """IQ2_XXS needs an importance matrix, which random weights have none of."""
    with pytest.raises(EngineError, match=quant):
        write_shape(SMALL, tmp_path / "x.gguf", quant)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("size", ["0.5b", "1.5b"])
def test_the_default_pair_has_this_table(size: str) -> None:
    """Every tensor's shape and type, of files with a head of their own (a copy of the embedding).

    They were made when llama.cpp counted layers in the order of their names (blk.0, blk.1, blk.10 ...) where it now
    sorts them by number: so the layers that get the larger types stand elsewhere, as many of them.
    """
    file = fetch(load_catalog().models[f"qwen2.5-coder-{size}-instruct"])
    shape = replace(SHAPES[f"qwen2.5-{size}"], tied=False)
    by_name = sorted(range(shape.n_layer), key=str)
    renamed = {}
    for name, found in _table(file).items():
        block, _, rest = name.removeprefix("blk.").partition(".")
        renamed[f"blk.{by_name.index(int(block))}.{rest}" if name.startswith("blk.") else name] = found
    types = types_of(shape, "Q4_K_M")
    assert renamed == {name: (dims, types[name].name) for name, dims in shape.tensors.items()}
    assert sum(piece.n_bytes for piece in outline(shape, "Q4_K_M").pieces) == sum(
        t.n_bytes for t in GGUFFile(file).tensors.values()
    )


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "F16"])
def test_the_default_target_is_requantised(tmp_path: Path, quant: str) -> None:
    """To the types that the same model gets when quantised from the start; a head in Q6_K stays one under Q4_0."""
    source = fetch(load_catalog().models["qwen2.5-coder-1.5b-instruct"])
    path = requantized(source, quant, tmp_path)
    types = types_of(replace(SHAPES["qwen2.5-1.5b"], tied=False), quant)
    assert {name: tensor.type for name, tensor in GGUFFile(path).tensors.items()} == types
    with Model(path) as model, Context(model, 64) as context:
        assert np.isfinite(context.decode([9707, 11, 1879], 1)).all()
