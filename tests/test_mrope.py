"""Models with M-RoPE or DeepStack (Qwen2-VL, Qwen3-VL and others made for images) as drafters: llama.cpp takes four
positions and further numbers for each embedding, which it gives token ids by itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quant
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gguf_trim.cut import lay_out, why_not, write
from gguf_trim.format.companion import EmbeddingTable, Trimmed
from gguf_trim.format.mtp import MtpBlock
from gguf_trim.prove import prove
from llamabase.errors import FileFormatError
from llamabase.gguf.reader import GGUFFile
from llamabase.llama.context import Context, ContextParams
from llamabase.llama.model import Model
from llamabase.sampling.settings import GREEDY, Sampling
from runner import TrimmedDraft
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

from .conftest import keep_spread, with_speculator
from .toy import MROPE, N_EMBD, write_model, write_mtp

# Keys for DeepStack by architecture, and how many layers use them.
DEEPSTACK = {
    "qwen3vl": ({"n_deepstack_layers": 2}, 3),
    "qwen3vlmoe": ({"n_deepstack_layers": 1}, 2),
    "granite": ({"deepstack_mapping": [0, 1, -1, 2], "embedding_scale": 3.0}, 4),
}
KINDS = (*MROPE, *(f"{name} with DeepStack" for name in DEEPSTACK), "hunyuan_vl without M-RoPE")
PROMPT = "tea and tea and the sea and tea and the"


def write_kind(path: Path, kind: str, type_: Quant = Quant.F32, seed: int = 0) -> Path:
    name, _, more = kind.partition(" with")
    keys, n_layer = DEEPSTACK[name] if more == " DeepStack" else ({"rope.dimension_sections": []} if more else {}, 1)
    return write_model(path, name, type_, seed, keys=keys, n_layer=n_layer)


@pytest.mark.parametrize("k", [288, 352])
@pytest.mark.parametrize("type_", [Quant.F32, Quant.Q8_0, Quant.Q4_0], ids=lambda type_: type_.name)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_is_its_source_bit_for_bit(tmp_path: Path, kind: str, type_: Quant, k: int) -> None:
    source = write_kind(tmp_path / "m.gguf", kind, type_)
    write(lay_out(source, keep_spread(k)), tmp_path / "t.gguf")
    found = prove(tmp_path / "t.gguf", source)
    assert found.ok and found.max_logit_difference == 0 and found.kept == k, found.differences
    assert found.positions > 100 and found.logit_range is not None and found.logit_range > 1


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    return {kind: write_kind(folder / f"{i}.gguf", kind, seed=1) for i, kind in enumerate(KINDS)}


PIECES = st.lists(st.tuples(st.integers(1, 12), st.booleans(), st.integers(0, 3)), min_size=1, max_size=6)


@pytest.mark.parametrize("kind", KINDS)
@given(pieces=PIECES, seed=st.integers(0, 99))
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_embeddings_and_ids_mix_in_any_pieces(
    files: dict[str, Path], kind: str, pieces: list[tuple[int, bool, int]], seed: int
) -> None:
    """Pieces of any length, as embeddings or ids, some taken back, in batches of 8: the same logits as ids alone."""
    path, rng = files[kind], np.random.default_rng(seed)
    table = EmbeddingTable(GGUFFile(path), 3.0 if kind.startswith("granite") else 1.0)
    how = ContextParams(1, n_batch=8)
    with Model(path) as model, Context(model, 96, how) as by_id, Context(model, 96, how) as mixed:
        for n, as_rows, back in pieces:
            ids = rng.integers(0, 600, n).tolist()
            expected = by_id.decode(ids, min(n, 3))
            found = mixed.decode(table.rows(ids) if as_rows else ids, min(n, 3))
            assert (found == expected).all()
            for context in (by_id, mixed):
                context.truncate(max(0, context.n_past - back))


@pytest.mark.parametrize("what", ["llama_model_rope_type", "llama_model_n_embd_inp"])
def test_verify_sees_positions_and_widths_that_are_wrong(tmp_path: Path, what: str) -> None:
    """In a process of its own, since llama.cpp then reads past the end of arrays."""
    source = write_kind(tmp_path / "m.gguf", "qwen3vl with DeepStack")
    write(lay_out(source, keep_spread(352)), tmp_path / "t.gguf")
    command = ["verify", str(tmp_path / "t.gguf"), "--source", str(source)]
    wrong = "2" if what == "llama_model_rope_type" else "llama_cpp.llama_model_n_embd(model)"
    for broken in (True, False):
        patch = f"llama_cpp.{what} = lambda model: {wrong}\n" if broken else ""
        code = f"import llama_cpp\n{patch}from gguf_trim.__main__ import main\nmain({command})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == broken, done.stderr
        assert ("the logit of token" in done.stderr) == broken and done.stdout.startswith("ok: ") != broken


DRAFTED = ("qwen2vl", "qwen3vl", "qwen3vl with DeepStack", "granite with DeepStack")
SAMPLINGS = {"greedy": GREEDY, "sampled": Sampling(temp=1.2, top_k=40, top_p=0.95)}


@pytest.fixture(scope="module")
def cuts(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Of each that drafts: its own cut, another's of other weights, and its cut to all its rows."""
    folder, found = tmp_path_factory.mktemp("cuts"), {}
    for i, kind in enumerate(DRAFTED):
        other = write_kind(folder / f"other-{i}.gguf", kind, seed=2)
        for name, source, k in (("good", files[kind], 320), ("wrong", other, 320), ("all", files[kind], 600)):
            found[kind, name] = folder / f"{name}-{i}.gguf"
            write(lay_out(source, keep_spread(k)), found[kind, name])
        with_speculator(found[kind, "good"], 32)
    return found


@pytest.fixture(scope="module")
def plain(files: dict[str, Path]) -> Iterator[Callable[[str, str], list[int]]]:
    """The text without a drafter."""
    engines: dict[str, Engine] = {}
    texts: dict[tuple[str, str], list[int]] = {}

    def get(kind: str, sampling: str) -> list[int]:
        if kind not in engines:
            engines[kind] = Engine(LoadOptions(files[kind], n_ctx=128, n_threads=1))
        if (kind, sampling) not in texts:
            texts[kind, sampling], _ = text_of(engines[kind], SAMPLINGS[sampling], 0)
        return texts[kind, sampling]

    yield get
    for engine in engines.values():
        engine.close()


def text_of(engine: Engine, sampling: Sampling, draft_max: int) -> tuple[list[int], list[bool]]:
    """Forty tokens, and of every draft whether it stood."""
    prompt = engine.model.tokenize(PROMPT)
    rounds = list(engine.rounds(prompt, sampling, max_tokens=40, draft_max=draft_max, seed=3))
    stood = [i < found.accepted for found in rounds for i in range(len(found.drafted))]
    return [token for found in rounds for token in found.tokens], stood


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("vocab", ["trim", "context", "spec"])
@pytest.mark.parametrize("kind", DRAFTED)
def test_the_text_is_the_plain_one(files, cuts, plain, kind: str, vocab: str, sampling: str) -> None:
    """With a drafter of the target's own weights, whose drafts stand if they are of its rows, and with another."""
    for name in ("good", "wrong"):
        if name == "wrong" and vocab == "spec":
            continue  # it has no speculator
        with Engine(LoadOptions(files[kind], cuts[kind, name], n_ctx=128, n_threads=1, vocab=vocab)) as engine:
            for draft_max in (1, 4):
                text, stood = text_of(engine, SAMPLINGS[sampling], draft_max)
                assert text == plain(kind, sampling) and len(stood) >= 20
                assert (sum(stood) >= 10) == (name == "good") and (vocab != "spec" or all(stood))


@pytest.mark.parametrize("kind", DRAFTED)
def test_a_cut_to_all_rows_drafts_what_its_source_does(files, cuts, kind: str) -> None:
    """As llama-cpp-python asks for drafts: of any text, which may begin like the one before."""
    rng = np.random.default_rng(5)
    texts = [rng.integers(0, 600, n).astype(np.intc) for n in (5, 30, 31)]
    texts += [np.append(texts[1][:20], texts[0]), texts[2]]
    with TrimmedDraft(files[kind], 6, n_threads=1) as whole, TrimmedDraft(cuts[kind, "all"], 6, n_threads=1) as cut:
        for text in texts:
            drafted = whole(text).tolist()
            assert cut(text).tolist() == drafted and len(drafted) == 6


def test_granites_scale_is_kept_in_the_file(files, cuts, tmp_path: Path) -> None:
    """Its graph scales embeddings of token ids only if it has DeepStack, and both if it has not."""
    assert Trimmed.open(cuts["granite with DeepStack", "all"]).file.get("gguf_trim.embedding_scale") == 3
    source = write_model(tmp_path / "m.gguf", "granite", keys={"embedding_scale": 3.0, "deepstack_mapping": [-1]})
    write(lay_out(source, keep_spread(352)), tmp_path / "t.gguf")
    assert Trimmed.open(tmp_path / "t.gguf").file.get("gguf_trim.embedding_scale") == 1
    assert prove(tmp_path / "t.gguf", source).max_logit_difference == 0


@pytest.mark.parametrize("n_blocks", [0, 1])
def test_a_hybrid_model_is_cut_rightly(tmp_path: Path, n_blocks: int) -> None:
    source = write_mtp(tmp_path / "m.gguf", "qwen35", n_blocks=n_blocks)
    write(lay_out(source, keep_spread(352)), tmp_path / "t.gguf")
    found = prove(tmp_path / "t.gguf", source)
    assert found.ok and found.max_logit_difference == 0, found.differences


def test_what_llama_cpp_would_end_the_process_over_is_refused(tmp_path: Path) -> None:
    """Embeddings for GLM-4 without M-RoPE; with it, an MTP block of GLM-4.5V's."""
    text = write_model(tmp_path / "glm4.gguf", "glm4", keys={"rope.dimension_sections": []})
    for file in (text, write_mtp(tmp_path / "glm4moe.gguf", "glm4moe")):
        with pytest.raises(FileFormatError, match=rf"{file.name}: architecture \w+ cannot be trimmed: .* embeddings"):
            lay_out(file, keep_spread(352))
        with Model(file) as model, Context(model, 32, ContextParams(1)) as context:
            assert context.decode([1, 2, 3]).shape == (1, 600)  # of token ids it is a model like any other
    assert MtpBlock.of(GGUFFile(tmp_path / "glm4moe.gguf")).n_embd == N_EMBD
    vision = GGUFFile(write_mtp(tmp_path / "vision.gguf", "glm4moe", mrope=True))
    assert why_not(vision) is None
    with pytest.raises(FileFormatError, match=r"vision\.gguf: its MTP block cannot draft: llama\.cpp ends the process"):
        MtpBlock.of(vision)
