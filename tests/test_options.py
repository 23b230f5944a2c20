"""The sampler flags as llama.cpp names them: what they become, and what is refused."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from gguf_trim.pairs.prepare import Prepared
from llamabase.cli.command import OneCommand
from llamabase.llama.context import Cache, ContextParams
from llamabase.llama.model import ModelParams
from llamabase.sampling.settings import Sampling
from runner.chat.__main__ import main as chat
from runner.loop.weights import LoadOptions, Weights
from runner.options import Models, limit_of, model_options, sampling_options
from runner.serve.requests import Common


def parsed(*arguments: str) -> Sampling:
    found = []

    @click.command(cls=OneCommand)
    @sampling_options
    def command(sampling: Sampling, seed: int | None, draft_max: int) -> None:
        found.append(sampling)

    done = CliRunner().invoke(command, list(arguments))
    assert done.exit_code == 0, done.output
    return found[0]


def seed_of(*arguments: str) -> tuple[int | None, int | None]:
    """The seed and the draft length."""
    found = []

    @click.command(cls=OneCommand)
    @sampling_options
    def command(sampling: Sampling, seed: int | None, draft_max: int | None) -> None:
        found.append((seed, draft_max))

    done = CliRunner().invoke(command, list(arguments))
    assert done.exit_code == 0, done.output
    return found[0]


def test_defaults_are_llama_cpps() -> None:
    assert parsed() == Sampling() == Sampling(0.8, 40, 0.95, 0.05, 1.0, 1.0, 64, 0.0, 0.0, {}, "")


def test_every_flag_arrives(tmp_path: Path) -> None:
    found = parsed(
        *("--typical", "0.9", "--repeat-penalty", "1.1", "--repeat-last-n", "-1", "--presence-penalty", "0.5"),
        *("--frequency-penalty", "-0.25", "-l", "5+1.5", "--logit-bias", "6-inf", "-l", "5-0.5", "-l", "7-2e1"),
        *("--grammar", 'root ::= "a"'),
    )
    bias = {5: 1.0, 6: -math.inf, 7: -20.0}
    assert found == Sampling(0.8, 40, 0.95, 0.05, 0.9, 1.1, -1, 0.5, -0.25, bias, 'root ::= "a"')


def test_the_samplers_of_llama_cpp_by_its_flags() -> None:
    found = parsed(
        *("--top-nsigma", "1.5", "--xtc-probability", "0.5", "--xtc-threshold", "0.2", "--dynatemp-range", "0.4"),
        *("--dynatemp-exp", "2", "--dry-multiplier", "0.8", "--dry-base", "1.5", "--dry-allowed-length", "3"),
        *("--dry-penalty-last-n", "32", "--temperature", "0.5", "--typical-p", "0.9", "--mirostat", "0"),
    )
    assert found == Sampling(
        0.5,
        typical_p=0.9,
        top_n_sigma=1.5,
        xtc_probability=0.5,
        xtc_threshold=0.2,
        dynatemp_range=0.4,
        dynatemp_exponent=2.0,
        dry_multiplier=0.8,
        dry_base=1.5,
        dry_allowed_length=3,
        dry_penalty_last_n=32,
    )
    breakers = ["--dry-sequence-breaker", r"\n\n", "--dry-sequence-breaker", "é"]
    assert parsed(*breakers).dry_sequence_breakers == ("\n\n", "é")
    assert parsed(*breakers, "--dry-sequence-breaker", "none").dry_sequence_breakers == ()


def found_by(*arguments: str) -> Models:
    """The models that model options describe."""
    found: list[Models] = []

    @click.command(cls=OneCommand)
    @model_options
    def command(models: Callable[[], Models]) -> None:
        found.append(models())

    done = CliRunner().invoke(command, ["--target", "t.gguf", "--draft", "d.gguf", *arguments])
    assert done.exit_code == 0, done.output
    return found[0]


def own(models: Models) -> tuple[int | None, int | None]:
    """The drafter's threads and layers on the GPU."""
    assert models.draft is not None
    options = models.of_drafter(models.draft, models.n_ctx)
    return options.how.n_threads, options.model.n_gpu_layers


def test_the_models_in_llama_cpps_words() -> None:
    """Each flag by every name it has there, old and new; what is said of the drafter alone is the drafter's."""
    usual = found_by()
    assert (usual.n_ctx, usual.cache.flash, own(usual)) == (4096, None, (None, None))
    assert found_by("-c", "0").n_ctx == 0
    for layers, n in (("all", -1), ("auto", None), ("7", 7)):
        for flag in ("-ngl", "--gpu-layers", "--n-gpu-layers"):
            assert own(found_by(flag, layers)) == (None, n)
        for flag in ("-ngld", "--gpu-layers-draft", "--n-gpu-layers-draft", "--spec-draft-ngl"):
            assert own(found_by(flag, layers, "-ngl", "5")) == (None, 5 if n is None else n)
    for flag in ("-td", "--threads-draft", "--spec-draft-threads"):
        assert own(found_by("-t", "3", flag, "2")) == (2, None)
    assert own(found_by("-t", "3")) == (3, None)
    for word, wanted in (("on", True), ("1", True), ("off", False), ("false", False), ("auto", None)):
        found = found_by("-fa", word)
        assert found.cache.flash is found.cache_draft.flash is wanted
    for letter in "kv":
        for flag in (f"-ct{letter}d", f"--cache-type-{letter}-draft", f"--spec-draft-type-{letter}"):
            found = found_by(flag, "q8_0")
            assert (found.cache, vars(found.cache_draft)[{"k": "keys", "v": "values"}[letter]]) == (Cache(), "q8_0")
    assert found_by("--spec-draft-model", "other.gguf").draft == Path("other.gguf")


def test_where_weights_go_in_llama_cpps_words() -> None:
    """Each flag by every name it has there; the drafter's are those of its variants."""
    usual = found_by()
    assert (usual.model_params, usual.context_params) == (ModelParams(), ContextParams())
    of_drafter = "override_tensor_draft"
    same: dict[tuple[str, ...], tuple[str, str, object]] = {
        ("-dev", "--device"): ("none", "device", "none"),
        ("-devd", "--device-draft", "--spec-draft-device"): ("none", "device_draft", "none"),
        ("-sm", "--split-mode"): ("row", "split_mode", "row"),
        ("-ts", "--tensor-split"): ("3,1/2", "tensor_split", (3.0, 1.0, 2.0)),
        ("-mg", "--main-gpu"): ("1", "main_gpu", 1),
        ("-lm", "--load-mode"): ("mmap+mlock", "load_mode", "mmap+mlock"),
        ("-ot", "--override-tensor"): ("a=CPU,b=CPU", "override_tensor", "a=CPU,b=CPU"),
        ("-otd", "--override-tensor-draft", "--spec-draft-override-tensor"): ("a=CPU", of_drafter, "a=CPU"),
        ("-ncmoe", "--n-cpu-moe"): ("3", "n_cpu_moe", 3),
        ("-ncmoed", "--n-cpu-moe-draft", "--spec-draft-n-cpu-moe", "--spec-draft-ncmoe"): ("3", "n_cpu_moe_draft", 3),
        ("-b", "--batch-size"): ("64", "n_batch", 64),
        ("-ub", "--ubatch-size"): ("64", "n_ubatch", 64),
    }
    for flags, (text, field, value) in same.items():
        for flag in flags:
            assert found_by(flag, text) == replace(usual, **{field: value}), flag
    for flag in ("-cmoe", "--cpu-moe"):
        assert found_by(flag, "-ncmoe", "3") == replace(usual, n_cpu_moe=-1)
    for flag in ("-cmoed", "--cpu-moe-draft", "--spec-draft-cpu-moe"):
        assert found_by(flag) == replace(usual, n_cpu_moe_draft=-1)
    for flag in ("-nkvo", "--no-kv-offload"):
        assert found_by(flag) == replace(usual, offload_kqv=False)
    assert found_by("-nkvo", "-kvo") == found_by("-nkvo", "--kv-offload") == usual
    assert found_by("-ot", "a=CPU", "-ot", "b=CPU").override_tensor == "a=CPU,b=CPU"
    words = {"--no-mmap": "none", "--mmap": "mmap", "--mlock": "mmap+mlock", "--no-mmap --mlock": "mlock"}
    assert {text: found_by(*text.split()).load_mode for text in words} == words


def test_numbers_that_stand_for_none() -> None:
    assert (limit_of("-1"), limit_of("-2"), limit_of("5")) == (sys.maxsize, sys.maxsize, 5)
    assert (seed_of("-s", "-1"), seed_of("-s", "7"), seed_of()) == ((None, None), (7, None), (None, None))
    assert seed_of("--spec-draft-n-max", "3") == seed_of("--draft-max", "3") == (None, 3)


def test_without_a_limit_an_answer_fills_the_context(toys: dict[str, Path]) -> None:
    """-c 0 is the model's 512 tokens, and -n -1 lets it say as many as are left of them."""
    asked = ["--target", str(toys["target"]), "--draft-max", "0", "--prompt", "x", "--json", "-fa", "off"]
    for limit in ("-1", "-2"):
        done = CliRunner().invoke(chat, [*asked, "-c", "0", "-n", limit])
        assert done.exit_code == 0, done.output
        record = json.loads(done.stdout.splitlines()[-1])
        assert (record["prompt_tokens"] + record["tokens"], record["finish_reason"]) == (513, "length")


def test_adaptive_p_does_nothing_while_its_target_is_negative() -> None:
    """As in llama.cpp; front-ends send it in every list of samplers."""
    found = parsed("--samplers", "top_k;adaptive-p;temperature")
    assert found.chain == ("top_k", "temperature")
    assert parsed("--sampler-seq", "kat").chain == ("top_k", "temperature")


def test_dry_looks_at_all_tokens_for_minus_one() -> None:
    assert "dry" in parsed("--dry-multiplier", "1", "--dry-penalty-last-n", "-1").chain
    assert "dry" not in parsed("--dry-multiplier", "1", "--dry-penalty-last-n", "0").chain


def test_the_order_of_samplers_by_names_and_letters() -> None:
    assert parsed("--samplers", "top-k;TYP;minp;Temp").samplers == ("top_k", "typ_p", "min_p", "temperature")
    assert parsed("--samplers", "").samplers == ()
    assert parsed("--sampler-seq", "kmt").samplers == ("top_k", "min_p", "temperature")
    assert parsed("--sampling-seq", "edskypmxt").samplers == Sampling().samplers


def test_grammars_and_schemas_from_files(tmp_path: Path) -> None:
    (tmp_path / "g.gbnf").write_text('root ::= "é"', encoding="utf-8")
    (tmp_path / "s.json").write_text('{"type": "boolean"}')
    assert parsed("--grammar-file", str(tmp_path / "g.gbnf")).grammar == 'root ::= "é"'
    schemas = [parsed("-jf", str(tmp_path / "s.json")), parsed("--json-schema-file", str(tmp_path / "s.json"))]
    schemas += [parsed("-j", '{"type": "boolean"}'), parsed("--json-schema", '{"type": "boolean"}')]
    assert len({found.guide for found in schemas}) == 1
    assert "boolean" in schemas[0].guide


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--typical", "nan"], 2, "typical_p=nan is not a number"),
        (["--repeat-penalty", "inf"], 2, "repeat_penalty=inf is not a number"),
        (["--repeat-penalty", "0"], 2, "repeat_penalty=0.0 must be greater than 0"),
        (["--presence-penalty", "1e300"], 2, "presence_penalty=1e+300 is not a number"),
        (["--repeat-last-n", "-2"], 2, "-2"),
        (["--repeat-last-n", "9" * 20, "--repeat-penalty", "2", "-n", "1"], 0, "1 token,"),
        (["-l", "5+1e39"], 2, "logit_bias of 5=1e+39 is not a number"),
        (["-l", "x+1"], 2, "--logit-bias x+1: is not TOKEN_ID(+/-)BIAS"),
        (["-l", "5"], 2, "is not TOKEN_ID"),
        (["-l", "5+one"], 2, "is not TOKEN_ID"),
        (["-l", "5+inf"], 2, "or -inf to ban"),
        (["-l", "5+nan"], 2, "or -inf to ban"),
        (["--mirostat", "2"], 2, "mirostat=2 is not supported: Mirostat follows its own draws"),
        (["--adaptive-target", "0.5"], 2, "adaptive_target=0.5 is not supported: adaptive_p follows its own draws"),
        (["--samplers", "top_k;topp;heat"], 2, "heat: is not a sampler; choose from penalties, dry"),
        (["--sampler-seq", "kz"], 2, "z: is not a sampler"),
        (["--samplers", "top_k", "--sampler-seq", "k"], 2, "give --samplers or --sampler-seq, not both"),
        (["--dry-penalty-last-n", "-2"], 2, "-2"),
        (["-fa", "maybe"], 2, "maybe is not on, off or auto"),
        (["-ngl", "many"], 2, "many"),
        (["-c", "7"], 2, "7"),
        (["-n", "0"], 2, "0"),
        (["-s", "-2"], 2, "-2"),
        (
            ["--spec-draft-p-min", "0.5"],
            2,
            "--spec-draft-p-min is not taken: a draft is worth its time or not by measured",
        ),
        (["--draft-min", "1"], 2, "--spec-draft-n-min is not taken: a round drafts as few tokens as pay"),
        (["--spec-type", "draft"], 2, "--spec-type is not taken: the file given as --model-draft"),
        (["--dry-multiplier", "1", "--dry-allowed-length", "9" * 20, "-n", "1"], 0, "1 token,"),
        (["-dev", "GPU7"], 2, "device 'GPU7': llama.cpp has no such device here; choose from"),
        (["-devd", "GPU7"], 2, "device 'GPU7': llama.cpp has no such device here"),
        (["-ot", "exps"], 2, "override_tensor 'exps': is not PATTERN=BUFFER"),
        (["-ts", "a,b"], 2, "a,b is not a list of proportions, such as 3,1"),
        (["-ts", "0"], 2, "is not a list of proportions"),
        (["-sm", "rows"], 2, "rows"),
        (["-lm", "mmap", "--mlock"], 2, "give --load-mode, or --mmap, --no-mmap and --mlock, not both"),
        (["-b", "0"], 2, "0"),
        (["-ncmoe", "-1"], 2, "-1"),
        (["-dev", "none", "-ub", "8", "-nkvo", "-lm", "none", "-cmoe", "-n", "1"], 0, "1 token,"),
        (["--grammar", "x", "-j", "{}"], 2, "give one of --grammar"),
        (["-j", "{"], 2, "the JSON schema is not JSON"),
        (["-j", '{"type": "circle"}'], 2, "cannot be obeyed"),
        (["--grammar-file", "absent"], 1, "absent: cannot be read as a grammar: No such file"),
        (["--grammar", "root ::= ("], 1, "the grammar cannot be used: expecting"),
        (["-l", "600+1"], 1, "has no token 600"),
        (["-l", "9" * 20 + "+1"], 1, f"has no token {'9' * 20}"),
    ],
)
def test_mistakes_get_one_sentence(toys: dict[str, Path], arguments: list[str], code: int, said: str) -> None:
    done = CliRunner().invoke(chat, ["--target", str(toys["target"]), "--prompt", "x", "-c", "256", *arguments])
    assert done.exit_code == code, done.output
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.output


def test_chat_answers_in_json(toys: dict[str, Path]) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["tea", "sea"]}}, "required": ["a"]}
    pair = ["--target", str(toys["target"]), "--draft", str(toys["good-trimmed"]), "-c", "256"]
    done = CliRunner().invoke(chat, [*pair, "--prompt", "x", "-j", json.dumps(schema), "--repeat-penalty", "1.1"])
    assert json.loads(done.stdout)["a"] in ("tea", "sea")


def test_costs_are_remembered_for_a_pair_however_it_is_named(toys) -> None:
    """A catalog's pair, the same files by path, and the Python API share what was measured."""
    options = LoadOptions(toys["target"], toys["good-trimmed"], n_ctx=64)
    named = Models(**vars(options), prepared=Prepared(toys["target"], toys["target"], toys["good-trimmed"]))
    with Weights(options) as one, Weights(named) as other:
        assert one._key == other._key
    with Weights(replace(options, n_ctx=128)) as another:
        assert another._key != one._key


def test_a_request_can_set_every_sampler_that_a_flag_can() -> None:
    assert {field.name for field in fields(Sampling)} - Common.model_fields.keys() == {"guide"}
