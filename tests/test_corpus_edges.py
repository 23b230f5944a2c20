"""What `corpus count` reads: only what the assistant says, whatever the template does; no file is lost silently."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.__main__ import main
from corpus.count import count
from corpus.prompts import load_prompts
from corpus.sources import LeftOut, SourceReader
from llamabase.errors import FileFormatError
from llamabase.files import read_text
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.template import ChatTemplate
from runner.chat.__main__ import _given

from .toy import CHAT_TEMPLATE, write_model

# The shapes of real templates, in a few lines each.
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}" + CHAT_TEMPLATE
)
DEEPSEEK_R1 = """\
{%- for m in messages if m.role == 'system' %}{{ m.content }}{% endfor -%}
{%- for m in messages -%}
{%- if m.role == 'user' %}<|User|>{{ m.content }}{% endif -%}
{%- if m.role == 'assistant' and m.content is not none -%}
<|Assistant|>{{ m.content.split('</think>')[-1] }}<|endoftext|>
{%- elif m.role == 'assistant' -%}
<|Assistant|>{% for c in m.tool_calls %}<call>{{ c.function.name + '\n' + c.function.arguments }}</call>{% endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|Assistant|><think>\n{% endif -%}"""
QWEN35 = """\
{%- if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('No user query') }}{% endif -%}
{%- for m in messages -%}
<|im_start|>{{ m.role + '\n' }}
{%- if m.role == 'assistant' -%}
  {%- set content, reasoning = m.content, m.reasoning_content | default('') -%}
  {%- if '</think>' in content -%}
    {%- set reasoning = content.split('</think>')[0].split('<think>')[-1] -%}
    {%- set content = content.split('</think>')[-1].lstrip() -%}
  {%- endif -%}
  {%- if loop.last %}{{ '<think>\n' + reasoning.strip() + '\n</think>\n\n' }}{% endif -%}
  {{ content }}
  {%- for c in m.tool_calls -%}
    <tool_call><function={{ c.function.name }}>
    {%- for key, value in c.function.arguments | items -%}
      <parameter={{ key }}>{{ value if value is string else value | tojson }}</parameter>
    {%- endfor -%}
    </function></tool_call>
  {%- endfor -%}
{%- else -%}{{ m.content }}{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif -%}"""
GEMMA = """\
{%- set first, talk = '', messages -%}
{%- if messages[0].role == 'system' %}{% set first, talk = messages[0].content, messages[1:] %}{% endif -%}
{%- for m in talk -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif -%}
<start>{{ ('model' if m.role == 'assistant' else m.role) + '\n' + (first + '\n' if loop.first else '') }}
{{- (m.content | trim) + '<end>\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<start>model\n' }}{% endif -%}"""
MISTRAL = """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' -%}
{%- for m in messages if m.role != 'system' -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif -%}
{%- if m.role == 'user' %}[INST]{{ system + '\n\n' if loop.last }}{{ m.content }}[/INST]
{%- elif m.tool_calls %}[TOOL_CALLS]
{%- for c in m.tool_calls %}{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}</s>
{%- else %} {{ m.content }}</s>{% endif -%}
{%- endfor -%}"""
PAIRS = """\
{%- for m in messages if m.role == 'assistant' -%}
Q: {{ messages[loop.index0 * 2].content }} A: {{ m.content }};
{%- endfor -%}"""
SYSTEM_LAST = CHAT_TEMPLATE.replace("{% endfor %}", "{% endfor %}{{ messages[0]['content'] }}")
CLOSED_THINK = """\
{%- for m in messages if m.role == 'user' %}Q: {{ m.content }}{% endfor -%}
{%- for m in messages if m.role == 'assistant' -%}
<a>{{ '<think>' + m.reasoning_content if m.reasoning_content }}</think>{{ m.content }}</a>
{%- endfor -%}
{%- if add_generation_prompt %}<a></think>{% endif -%}"""
ADVISED = "{% if messages %}Be helpful.{% endif %}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
TEMPLATES = {
    "chatml": CHAT_TEMPLATE,
    "default system": DEFAULT_SYSTEM,
    "deepseek r1": DEEPSEEK_R1,
    "qwen3.5": QWEN35,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "pairs": PAIRS,
    "system last": SYSTEM_LAST,
    "closed think": CLOSED_THINK,
    "advised": ADVISED,
    "none": None,
}

Texts = Callable[[str, list[dict[str, Any]]], tuple[list[str], list[str]]]


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTemplate]:
    def template(source: str | None) -> ChatTemplate:
        file = GGUFFile(write_model(tmp_path_factory.mktemp("template") / "m.gguf", template=source))
        return ChatTemplate(file, Vocabulary(file))

    return {name: template(source) for name, source in TEMPLATES.items()}


@pytest.fixture
def texts(templates: dict[str, ChatTemplate], tmp_path_factory: pytest.TempPathFactory) -> Texts:
    """Counted texts of a conversation, and the reasons if it is left out."""
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"

    def read(name: str, messages: list[dict[str, Any]]) -> tuple[list[str], list[str]]:
        path.write_text(json.dumps({"messages": messages}))
        bad: list[str] = []
        return [
            found.text for found in SourceReader(template=templates[name], left_out=LeftOut(bad)).documents(str(path))
        ], bad

    return read


def say(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


def call(arguments: Any = '{"city": "Paris", "days": 3}') -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return say("assistant", None, tool_calls=[{"id": "abcdefghi", "type": "function", "function": function}])


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("chatml", ["the king<|im_end|>", "the sea<|im_end|>"]),
        ("default system", ["the king<|im_end|>", "the sea<|im_end|>"]),
        ("deepseek r1", ["the king<|endoftext|>", "the sea<|endoftext|>"]),
        ("qwen3.5", ["\n</think>\n\nthe king<|im_end|>", "\n</think>\n\nthe sea<|im_end|>"]),
        ("gemma", ["the king<end>", "the sea<end>"]),
        ("mistral", ["the king</s>", "the sea</s>"]),
        ("pairs", ["the king;", "the sea;"]),
    ],
)
def test_an_answer_is_cut_out_of_every_template(texts: Texts, name: str, wanted: list[str]) -> None:
    talk = [say("user", "who?"), say("assistant", "the king"), say("user", "where?"), say("assistant", "the sea")]
    assert texts(name, talk) == (wanted, [])
    if name != "pairs":
        assert texts(name, [say("system", "be brief"), *talk]) == (wanted, [])


def test_reasoning_is_what_the_assistant_says(texts: Texts) -> None:
    """Also in a content from which the template drops it; the tag that the prompt opens is not counted again."""
    inside = [say("user", "who?"), say("assistant", "<think>\na queen\n</think>\n\nthe king")] * 2
    assert texts("deepseek r1", inside)[0] == ["<think>\na queen\n</think>\n\nthe king<|endoftext|>"] * 2
    beside = [say("user", "who?"), say("assistant", "the king", reasoning_content="a queen")] * 2
    assert texts("qwen3.5", inside) == texts("qwen3.5", beside) == (["a queen\n</think>\n\nthe king<|im_end|>"] * 2, [])


def test_a_tag_is_not_cut_in_two(texts: Texts) -> None:
    """The prompt's tag and the answer's begin alike."""
    talk = [say("user", "who?"), say("assistant", "the king", reasoning_content="a queen")]
    assert texts("closed think", talk) == (["<think>a queen</think>the king</a>"], [])


def test_what_the_template_itself_says_first_is_not_the_assistants(texts: Texts) -> None:
    """It renders nothing for a prompt without messages."""
    assert texts("advised", [say("assistant", "the king"), say("user", "who?")]) == (["the king"], [])


@pytest.mark.parametrize("arguments", ['{"city": "Paris", "days": 3}', {"city": "Paris", "days": 3}])
def test_calls_are_what_the_assistant_says(texts: Texts, arguments: Any) -> None:
    """Templates that read the arguments, write JSON of them, or print them as text are all given what they expect."""
    talk = [say("user", "rain?"), call(arguments)]
    assert texts("deepseek r1", talk) == (['<call>weather\n{"city": "Paris", "days": 3}</call>'], [])
    assert texts("mistral", talk) == (['[TOOL_CALLS]weather {"city": "Paris", "days": 3}</s>'], [])
    parameters = "<parameter=city>Paris</parameter><parameter=days>3</parameter>"
    called = f"\n</think>\n\n<tool_call><function=weather>{parameters}</function></tool_call><|im_end|>"
    assert texts("qwen3.5", talk) == ([called], [])
    old = [talk[0], say("assistant", None, function_call=talk[1]["tool_calls"][0]["function"])]
    assert texts("qwen3.5", old) == ([called], [])


@pytest.mark.parametrize(
    ("name", "talk", "reason"),
    [
        ("chatml", [say("user", "rain?"), call()], "leaves out a part of an answer"),
        ("system last", [say("system", "be brief"), say("assistant", "yes")], "writes other messages among"),
        ("mistral", [say("assistant", "the king")], "roles must alternate"),
        ("qwen3.5", [say("assistant", "the king")], "No user query"),
        ("chatml", [say("user", "who?"), say("model", "the king")], "no message is the assistant's"),
        ("chatml", [say("user", "who?"), {"content": "the king"}], "a message has no role"),
        ("chatml", [say("user", "who?"), say("assistant", 5)], "a content is neither text nor a list"),
        ("chatml", [say("user", "who?"), say("assistant", [{"type": "image_url"}])], "is not text"),
    ],
)
def test_a_conversation_that_cannot_be_cut_is_named(texts: Texts, name: str, talk: Any, reason: str) -> None:
    found, bad = texts(name, talk)
    assert found == [] and len(bad) == 1
    assert "chat.jsonl, line 1: its messages cannot be rendered" in bad[0] and reason in bad[0]


def test_contents_in_parts_and_fields_that_are_null(texts: Texts) -> None:
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "king"}]
    picture = [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "who?"}]
    talk = [say("user", picture), say("assistant", parts, tool_calls=None, reasoning_content=None)]
    assert texts("qwen3.5", talk) == (["\n</think>\n\nthe king<|im_end|>"], [])
    assert texts("chatml", [say("developer", "be brief"), say("assistant", None)]) == (["<|im_end|>"], [])
    assert texts("chatml", [say("user", "who?"), say("assistant", "the \ud800")]) == (["the ?<|im_end|>"], [])


ROLES = st.sampled_from(["user", "assistant", "system", "tool"])
ORDERS = st.one_of(
    st.lists(ROLES, min_size=1, max_size=6),
    st.tuples(st.sampled_from([[], ["system"]]), st.integers(1, 3)).map(lambda t: t[0] + ["user", "assistant"] * t[1]),
)
FORMS = ["{}", " {}\n", "<{}", "<think>\n{}\n</think>\n\n{}", "<think>{}</think>{}", "{}</think> {}", "\n{} < {} > {}"]


@pytest.mark.parametrize("name", TEMPLATES)
@given(ORDERS, st.data())
@settings(max_examples=150, deadline=None)
def test_every_word_of_the_assistant_and_of_nobody_else(
    templates: dict[str, ChatTemplate], tmp_path_factory: pytest.TempPathFactory, name: str, order: list[str], data: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "words.jsonl"
    talk, words = [], {True: [], False: []}
    for i, role in enumerate(order):
        said = [f"word{i}x{j}y" for j in range(3)]
        form = data.draw(st.sampled_from(FORMS))
        words[role == "assistant"] += said[: form.count("{}")]
        talk.append(say(role, form.format(*said)))
    path.write_text(json.dumps({"messages": talk}))
    bad: list[str] = []
    found = [
        document.text for document in SourceReader(template=templates[name], left_out=LeftOut(bad)).documents(str(path))
    ]
    if bad:
        assert found == []
    else:
        assert [word for word in words[True] if word not in "".join(found)] == []
        assert [word for word in words[False] if word in "".join(found)] == []
        assert len(found) == order.count("assistant")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["count", *map(str, args)])


def read(path: Path, **more: Any) -> list[str]:
    return [document.text for document in SourceReader(**more).documents(str(path))]


ROW = '{"text": "naïve 猫"}\n{"text": "tea"}\n'
CHAT = [say("user", "who?"), say("assistant", "naïve 猫"), say("user", "and?"), say("assistant", "tea")]
SHAREGPT = [{"from": "human", "value": "who?"}, {"from": "gpt", "value": "naïve 猫"}, {"from": "gpt", "value": "tea"}]


@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", ROW),
        ("a.NDJSON", ROW.replace("\n", "\r\n")),
        ("a.csv", "text,n\nnaïve 猫,1\ntea,2\n"),
        ("a.CSV", "text\r\nnaïve 猫\r\ntea\r\n"),
        ("a.json", json.dumps(["naïve 猫", "tea"])),
        ("a.Json", json.dumps([{"text": "naïve 猫"}, {"text": "tea"}], ensure_ascii=False)),
        ("a.json", ROW),
        ("a.json", json.dumps({"messages": CHAT}, indent=1)),
        ("a.json", json.dumps([{"messages": CHAT[:2]}, {"messages": CHAT[2:]}])),
        ("a.json", json.dumps(CHAT, ensure_ascii=False)),
        ("a.json", json.dumps([{"id": "1", "conversations": SHAREGPT}])),
        ("a.jsonl", json.dumps({"conversations": SHAREGPT})),
        ("a.json", json.dumps(SHAREGPT)),
    ],
)
def test_marks_and_capitals_and_forms_of_json(tmp_path: Path, name: str, text: str, mark: bytes) -> None:
    encoding = {b"": "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}.get(mark, "utf-8")
    (tmp_path / name).write_bytes(mark + text.encode(encoding))
    assert read(tmp_path / name) == ["naïve 猫", "tea"]


def test_other_json_is_text_and_what_is_no_json_is_named(tmp_path: Path) -> None:
    for text in ('{"name": "tea", "version": 1}', "[1, 2]", "[]", "5"):
        (tmp_path / "a.json").write_text(text)
        assert read(tmp_path / "a.json") == [text]
    (tmp_path / "a.json").write_text('[{"messages": [{"role": "user"')
    with pytest.raises(FileFormatError, match=r"a\.json: is not JSON; leave it out"):
        read(tmp_path / "a.json")
    (tmp_path / "a.json").write_text('[{"text": "tea"}, 5]')
    with pytest.raises(FileFormatError, match=r"a\.json, item 2: is not a JSON object"):
        read(tmp_path / "a.json")


def test_a_field_may_hold_a_conversation_or_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"chosen": CHAT}) + "\n" + json.dumps({"chosen": 5}) + "\n")
    bad: list[str] = []
    assert read(path, field="chosen", left_out=LeftOut(bad)) == ["naïve 猫", "tea"]
    assert bad == [f"{path}, line 2: its field 'chosen' is not text"]


def test_parquet_with_conversations(tmp_path: Path) -> None:
    """Its rows have every field of every message, most of them null."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"conversations": [*SHAREGPT, say("assistant", "sea")]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.Parquet")
    assert read(tmp_path / "a.Parquet") == ["naïve 猫", "tea", "sea"]


BAD_FILES = {
    "latin1.txt": ("naïve tea\n" * 3000).encode("latin-1"),
    "one.txt": b"the sea\n" * 30_000 + b"\xff\n",
    "marked.txt": codecs.BOM_UTF16_LE + b"odd",
    "wide.txt": "the sea".encode("utf-16-le"),
    "last.jsonl": b'{"text": "the sea"}\n' * 5000 + b'{"text": "\xe9"}\n',
    "cut.json": b'[{"text": "the',
    "picture.png": b"\x89PNG\xff",
}
GOOD_FILES = {
    "a.txt": b"the king\n" * 60,
    "b.TXT": codecs.BOM_UTF16_BE + ("the king\n" * 60).encode("utf-16-be"),
    "c.csv": codecs.BOM_UTF8 + b"text\n" + b"the king\n" * 60,
}


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_files_of_a_folder_that_are_not_text_are_named_and_not_counted(tmp_path: Path, toys: Any) -> None:
    good, mixed = fill(tmp_path / "good", GOOD_FILES), fill(tmp_path / "mixed", GOOD_FILES | BAD_FILES)
    left_out = LeftOut()
    found = count([mixed], toys["target"], left_out=left_out)
    assert [line.split(":")[0] for line in left_out.files] == [str(mixed / name) for name in sorted(BAD_FILES)]
    wanted = count([good], toys["target"])
    assert found.counts.tolist() == wanted.counts.tolist() and found.ids.tolist() == wanted.ids.tolist()
    done = run(mixed, "--tokenizer", toys["target"], "-o", tmp_path / "c.npz")
    assert done.exit_code == 0, done.output
    said = " ".join(done.stderr.split())
    assert f"Warning: {len(BAD_FILES)} files were left out; the first: {mixed}/cut.json: is not JSON" in said
    for name in BAD_FILES:
        done = run(mixed / name, "--tokenizer", toys["target"], "-o", tmp_path / "d.npz")
        assert done.exit_code == 1 and f"{mixed / name}: is " in done.stderr.replace("\n", "")
    none = fill(tmp_path / "none", {"latin1.txt": BAD_FILES["latin1.txt"]})
    done = run(none, "--tokenizer", toys["target"], "-o", tmp_path / "d.npz")
    said = " ".join(done.stderr.split())
    assert done.exit_code == 1 and "1 file was left out" in said and "is not UTF-8 text (byte 0xef)" in said
    assert "no text to count" in said and not (tmp_path / "d.npz").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_cluster_says_what_it_leaves_out(tmp_path: Path, toys: Any) -> None:
    distributed = pytest.importorskip("distributed")
    rows = {"x.jsonl": b'{"text": "the king"}\n{\n', "y.jsonl": b"{\n[1]\n"}
    folder = fill(tmp_path / "mixed", GOOD_FILES | BAD_FILES | rows)
    common = [folder, "--skip-bad", "--tokenizer", toys["target"], "-o"]
    local = run(*common, tmp_path / "local.npz")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as made:
        done = run(*common, tmp_path / "dask.npz", "--dask", made.scheduler_address)
    assert done.exit_code == 0, done.output
    said = [" ".join(result.stderr.split()).split("Warning: ")[1:] for result in (local, done)]
    assert len(said[1]) == 2
    assert said[1][0].startswith(f"{len(BAD_FILES)} files were left out; the first: {folder}/cut.json")
    assert said[1][1].startswith(f"3 rows were left out; the first: {folder}/x.jsonl, line 2")
    assert said[0][0] == said[1][0]
    assert (tmp_path / "dask.npz").read_bytes() == (tmp_path / "local.npz").read_bytes()


@pytest.mark.parametrize("mark", [codecs.BOM_UTF8, codecs.BOM_UTF16_LE])
def test_schemas_grammars_and_prompts_are_read_over_a_mark(tmp_path: Path, mark: bytes, monkeypatch: Any) -> None:
    text = '{"prompt": "naïve tea"}\r\n'
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(mark + text.encode("utf-8" if mark == codecs.BOM_UTF8 else "utf-16-le"))
    assert read_text(path) == '{"prompt": "naïve tea"}\n'  # schemas and grammars are read so
    assert load_prompts(path)[0].messages == [say("user", "naïve tea")]
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert _given(None, path) == '{"prompt": "naïve tea"}'
