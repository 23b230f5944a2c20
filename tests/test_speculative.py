"""The loop on real llama.cpp with toy models in F32, where floating point cannot blur a comparison."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from llamabase.errors import EngineError, VocabularyMismatch
from llamabase.llama.context import Context
from llamabase.sampling.settings import Sampling
from runner.draft.contracts import NoDrafter, Round
from runner.draft.reading import COMPARED, shared
from runner.exact import Law, check_prompt, plain_tokens, replay
from runner.exact import main as exact
from runner.loop import speculative
from runner.loop.engine import Engine
from runner.loop.record import Record
from runner.loop.weights import LoadOptions

GREEDY = Sampling(temp=0)
PROMPTS = ("the king and the sea", "a", "once more into the <|im_start|>house<|im_end|> of tea")
DRAFTERS = ("target", "good-trimmed", "wrong", "wrong-trimmed", "tiny-trimmed", "spec-trimmed")


def tokens_of(rounds: list[Round]) -> list[int]:
    return [token for round_ in rounds for token in round_.tokens]


def run(engine: Engine, text: str, n: int = 48, draft_max: int = 3, **settings: object) -> list[Round]:
    chosen = settings.pop("sampling", GREEDY)
    return list(engine.rounds(engine.model.tokenize(text), chosen, max_tokens=n, draft_max=draft_max, **settings))


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("draft_max", [1, 3, 8])
def test_greedy_text_is_plain_greedy_whatever_the_drafter(engines, name: str, draft_max: int) -> None:
    """Also with drafters made to be wrong, and with one that can draft almost nothing."""
    engine = engines(name)
    for prompt in PROMPTS:
        ids = engine.model.tokenize(prompt)
        engine.reader.keep([], 0)
        plain = plain_tokens(engine.context, ids, 48, lambda token: False)
        engine.reader.settle()
        rounds = run(engine, prompt, draft_max=draft_max)
        assert tokens_of(rounds) == plain
        assert len(set(plain)) > 5  # a text of one repeated token would prove little


def test_a_good_drafter_is_accepted_and_a_wrong_one_is_not(engines) -> None:
    rates = {}
    for name in ("target", "good-trimmed", "wrong"):
        rounds = run(engines(name), PROMPTS[0])
        rates[name] = sum(r.accepted for r in rounds) / sum(len(r.drafted) for r in rounds)
    assert rates["target"] == 1.0
    assert 0.2 < rates["good-trimmed"] <= 1.0
    assert rates["wrong"] < 0.1


@pytest.mark.parametrize("n", [0, 1, COMPARED - 1, COMPARED, COMPARED + 1, 2 * COMPARED + 7])
def test_what_a_cache_shares_with_a_text(n: int) -> None:
    """Wherever they part, also at the edges of the pieces that are compared."""
    held = list(range(n))
    for m in {*range(0, n, 100), *range(max(n - 3, 0), n), *range(COMPARED - 2, min(COMPARED + 2, n))}:
        assert shared(held, [*range(m), -1, *range(m + 1, n + 5)], n + 5) == m
    for text in (range(n), range(n + 5), range(n // 2)):
        assert shared(held, [*text], n + 5) == min(n, len(text))
        assert shared(held, [*text], n // 3) == min(n // 3, len(text))


def test_broken_acceptance_is_seen(engines, monkeypatch) -> None:
    """The exactness tests above can fail: with every draft accepted, the text is the wrong drafter's."""
    engine = engines("wrong")
    plain = tokens_of(run(engine, PROMPTS[0], draft_max=0, drafter=NoDrafter()))
    monkeypatch.setattr(speculative, "accept", lambda p_at, drafts, *_: (len(drafts), int(p_at(len(drafts)).ids[0])))
    assert tokens_of(run(engine, PROMPTS[0])) != plain


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temp=0, repeat_penalty=1.3, frequency_penalty=0.2),
        Sampling(temp=0, grammar="root ::= [a-z ]{1,60}"),
        Sampling(temp=0, logit_bias={65: 3.0}, presence_penalty=0.5),
        Sampling(temp=0.9, top_k=60, repeat_penalty=1.1),
        Sampling(temp=1.2, top_k=0, top_p=1, min_p=0, typical_p=0.9),
    ],
    ids=["penalties", "grammar", "bias", "sampled", "typical"],
)
@pytest.mark.parametrize("name", ["good-trimmed", "wrong"])
def test_replay_holds_with_the_whole_chain(toys, sampling: Sampling, name: str) -> None:
    """Teacher-forced, with penalties, a grammar, a bias, sampled; a state that forgets what was said is seen."""
    law = Law(sampling, seed=3)
    with Engine(LoadOptions(toys["target"], toys[name], n_ctx=256)) as engine:
        ids = engine.model.tokenize(PROMPTS[0])
        with Context(engine.model, 256, n_outputs=40) as context:
            found = check_prompt(engine, context, "x", ids, 32, 3, law)
            assert (found.replay_faults, found.parts_at) == (0, None)
            assert found.tokens > 5
            assert float(found.gaps.max()) < 1e-3
            plain = check_prompt(engine, context, "x", ids, 32, 3)
            assert plain.replay_faults == 0
            rounds = list(engine.rounds(ids, sampling, max_tokens=32, draft_max=3, seed=law.seed))
            assert replay(context, ids, rounds, law) == 0
            if not sampling.greedy:
                assert replay(context, ids, rounds, Law(sampling, seed=4)) > 0
            assert replay(context, ids, rounds) > 0  # without the chain the same rounds are not the argmax


@pytest.mark.parametrize("fault", ["no rewind", "rows mixed up"])
def test_replay_finds_faults_of_the_loop(toys, monkeypatch, fault: str) -> None:
    """The exactness check by replay can fail: rejected drafts left in the cache, or rows taken in the wrong order."""
    with Engine(LoadOptions(toys["target"], toys["wrong-trimmed"], n_ctx=256)) as engine:
        ids = engine.model.tokenize(PROMPTS[0])
        with Context(engine.model, 256, n_outputs=40) as context:
            assert check_prompt(engine, context, "x", ids, 32, 3).replay_faults == 0
            if fault == "no rewind":
                monkeypatch.setattr(engine.context, "rewind", lambda n: n)
            else:
                honest = speculative._p_at
                monkeypatch.setattr(speculative, "_p_at", lambda logits, *rest: honest(logits[::-1], *rest))
            found = check_prompt(engine, context, "x", ids, 32, 3)
            assert found.replay_faults > 0
            # The noise is that of the text with the fault, which must not hide it.
            assert found.as_json(float(found.noise.max()))["beyond_noise"] > 0


@pytest.mark.parametrize("name", ["good-trimmed", "wrong", None])
def test_never_more_than_max_tokens(engines, name) -> None:
    engine = engines(name)
    full = tokens_of(run(engine, PROMPTS[0], n=12))
    for n in range(1, 12):
        rounds = run(engine, PROMPTS[0], n=n)
        assert tokens_of(rounds) == full[:n]
        assert [r.finish for r in rounds] == [None] * (len(rounds) - 1) + ["length"]
    assert run(engine, PROMPTS[0], n=0) == []


@pytest.mark.parametrize("name", ["target", "good-trimmed", "wrong", None])
def test_end_token_stops_also_inside_a_draft(engines, name, monkeypatch) -> None:
    """Wherever the end token falls in a round, it is the last token emitted and the cache holds nothing after it."""
    engine = engines(name)
    full = tokens_of(run(engine, PROMPTS[0], n=24))
    for end in dict.fromkeys(full):
        monkeypatch.setattr(engine.model, "is_end", lambda token, end=end: token == end)
        rounds = run(engine, PROMPTS[0], n=24)
        assert tokens_of(rounds) == full[: full.index(end) + 1]
        assert rounds[-1].finish == "stop"
        assert all(r.accepted <= len(r.tokens) for r in rounds)


@pytest.mark.parametrize("name", ["good-trimmed", "wrong", None])
def test_context_limit_stops_cleanly(toys, name) -> None:
    """Generation fills the context to the last place and stops; a prompt that does not fit is refused."""
    with Engine(LoadOptions(toys["target"], toys[name] if name else None, n_ctx=256)) as engine:
        for length in (253, 255, 256):
            prompt = (engine.model.tokenize("the sea and the tea ") * 60)[:length]
            rounds = list(engine.rounds(prompt, GREEDY, max_tokens=99, draft_max=3))
            assert len(tokens_of(rounds)) == 256 - length + 1
            assert rounds[-1].finish == "length"
        with pytest.raises(EngineError, match="257 tokens does not fit a context of 256"):
            list(engine.rounds([5] * 257, GREEDY, max_tokens=1, draft_max=3))
        assert len(tokens_of(run(engine, PROMPTS[0], n=5))) == 5


def test_empty_prompt(engines) -> None:
    with pytest.raises(ValueError, match="empty"):
        next(engines(None).rounds([], GREEDY, max_tokens=3))
    assert engines(None).prompt([]) != []  # the chat template, or BOS, gives something to begin with


def test_prompt_of_one_token(engines) -> None:
    for name in ("good-trimmed", None):
        assert len(tokens_of(list(engines(name).rounds([65], GREEDY, max_tokens=7)))) == 7


def test_second_turn_reads_only_what_is_new(engines, monkeypatch) -> None:
    engine = engines("good-trimmed")
    first = engine.model.tokenize(PROMPTS[0] * 4)
    answer = tokens_of(list(engine.rounds(first, GREEDY, max_tokens=20, draft_max=3)))
    calls: list[int] = []
    decode = engine.context.decode
    monkeypatch.setattr(engine.context, "decode", lambda x, *a: calls.append(len(x)) or decode(x, *a))
    second = [*first, *answer, *engine.model.tokenize(" and then")]
    reused = tokens_of(list(engine.rounds(second, GREEDY, max_tokens=20, draft_max=3)))
    assert calls[0] < len(second) - len(first)
    engine.reader.keep([], 0)
    assert reused == tokens_of(list(engine.rounds(second, GREEDY, max_tokens=20, draft_max=3)))


def test_stopping_in_the_middle_leaves_everything_usable(engines, monkeypatch) -> None:
    """Closed after any round, or interrupted inside any decode: the next answer is as if nothing had been."""
    engine = engines("good-trimmed")
    wanted = tokens_of(run(engine, PROMPTS[0]))
    for stop in range(6):
        rounds = engine.rounds(engine.model.tokenize(PROMPTS[2]), GREEDY, max_tokens=40, draft_max=3)
        for _ in range(stop):
            next(rounds)
        rounds.close()
        assert tokens_of(run(engine, PROMPTS[0])) == wanted
    for context in (engine.context, engine.drafter.reading.context):
        decode = context.decode
        for stop in range(8):
            left = [stop]

            def interrupted(*args, decode=decode, left=left):
                left[0] -= 1
                result = decode(*args)
                if left[0] < 0:
                    raise KeyboardInterrupt  # after llama.cpp has done its work, before anyone noted it
                return result

            monkeypatch.setattr(context, "decode", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(engine, PROMPTS[2])
            monkeypatch.setattr(context, "decode", decode)
            assert tokens_of(run(engine, PROMPTS[0])) == wanted


def test_wrong_pair_is_refused_with_both_names(toys) -> None:
    with pytest.raises(VocabularyMismatch, match=r"target\.gguf and .*foreign\.gguf.*token 256 is"):
        Engine(LoadOptions(toys["target"], toys["foreign"]))


def test_pair_with_more_padding_works(toys) -> None:
    """Tables of one family are padded to different lengths; neither side sees an id of the other's padding."""
    plain = None
    for target, draft in (("target", "other-padding"), ("other-padding", "target")):
        with Engine(LoadOptions(toys[target], toys[draft], n_ctx=256)) as engine:
            found = tokens_of(run(engine, PROMPTS[0], n=20))
            plain = tokens_of(run(engine, PROMPTS[0], n=20, draft_max=0))
            assert found == plain


@pytest.mark.parametrize("settings", [("-ctk", "q4_0", "-ctv", "q4_0"), ("--typical", "0.3")])
def test_the_check_reads_as_the_loop_does(toys, tmp_path, settings: tuple[str, ...]) -> None:
    """With its cache and its samplers: it once called what these do bugs."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"id": "p", "messages": [{"role": "user", "content": "tea and the king"}]}')
    pair = ["--target", str(toys["target"]), "--draft", str(toys["good-trimmed"]), "--draft-max", "3", "-c", "256"]
    done = CliRunner().invoke(exact, [*pair, "--prompts", str(prompts), "-n", "24", *settings])
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["tokens"] > 4 and found["replay_faults"] == 0
    assert CliRunner().invoke(exact, [*pair, "-n", "513"]).exit_code == 2


def test_record_adds_up(engines) -> None:
    engine = engines("good-trimmed")
    record = Record()
    pieces = engine.pieces(engine.model.tokenize(PROMPTS[0]), GREEDY, record, max_tokens=30, draft_max=3)
    text = "".join(piece for piece, _ in pieces)
    rounds = run(engine, PROMPTS[0], n=30)
    assert record.text == text
    assert record.token_ids == tokens_of(rounds)
    assert (record.tokens, record.rounds) == (30, len(rounds))
    assert record.drafted == sum(len(r.drafted) for r in rounds)
    assert record.accepted == sum(r.accepted for r in rounds) == record.tokens - record.rounds
    assert record.tau == pytest.approx(30 / len(rounds))
    assert record.seconds == pytest.approx(record.draft_seconds + record.verify_seconds + record.host_seconds)
    assert Record().tau == Record().acceptance_rate == Record().tokens_per_second == 0.0
