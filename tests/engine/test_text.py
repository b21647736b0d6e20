"""Encoding, streaming and chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lacewing.checkpoint import TokenizerFiles, open_source
from lacewing.checkpoint.vocab import build_tokenizer_json
from lacewing.engine.template import ChatTemplate
from lacewing.engine.text import Text
from lacewing.errors import CheckpointError, RequestError, UnsupportedModelError

BYTE_LETTERS = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]


def letters_of_bytes() -> list[str]:
    """Letter of byte 0, 1, ... in GPT-2's alphabet, written out a second time."""
    rest = iter(range(0x100, 0x200))
    return [chr(byte) if byte in BYTE_LETTERS else chr(next(rest)) for byte in range(256)]


def files(document: str, **changes: Any) -> TokenizerFiles:
    values: dict[str, Any] = {
        "tokenizer_json": document,
        "chat_template": None,
        "bos_token": None,
        "eos_token": None,
        "bos_token_id": None,
        "eos_token_ids": [],
        "add_bos": False,
    }
    return TokenizerFiles(**(values | changes))


def byte_level(**changes: Any) -> Text:
    """Token i is byte i; 256 is `<s>`, 257 `<|end|>` (both special), 258 an ordinary word."""
    document = build_tokenizer_json(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": [*letters_of_bytes(), "<s>", "<|end|>", "<tool call>"],
            "tokenizer.ggml.token_type": [1] * 256 + [3, 3, 4],
            "tokenizer.ggml.merges": [],
        }
    )
    return Text(files(document, **changes))


def sentencepiece(**changes: Any) -> Text:
    """Token i is byte i; 256 `<unk>`, 257 `<s>`, 258 `▁`, 259 `a`, 260 `▁a`."""
    document = build_tokenizer_json(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [f"<0x{i:02X}>" for i in range(256)]
            + ["<unk>", "<s>", "▁", "a", "▁a"],
            "tokenizer.ggml.scores": [0.0] * 258 + [-2.0, -3.0, -1.0],
            "tokenizer.ggml.token_type": [6] * 256 + [2, 3, 1, 1, 1],
        }
    )
    return Text(files(document, bos_token="<s>", bos_token_id=257, add_bos=True, **changes))


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf: Path) -> Text:
    return Text(open_source(smollm2_gguf).tokenizer)


def stream(text: Text, ids: list[int], **options: bool) -> list[str]:
    decoder = text.stream_decoder(**options)
    return [decoder.push(token) for token in ids] + [decoder.flush()]


# Encoding -------------------------------------------------------------------------------------


def test_bos_is_put_in_front_once() -> None:
    text = sentencepiece()
    assert text.encode("a") == [257, 260]
    assert text.encode("<s>a")[:2] != [257, 257]
    assert text.encode("a", add_special=False) == [260]
    assert text.encode("") == [257]
    assert byte_level().encode("a") == [ord("a")]


def test_special_tokens_in_a_text_are_special_tokens() -> None:
    assert byte_level().encode("a<|end|>") == [ord("a"), 257]


@pytest.mark.parametrize("bad", ["\ud800", b"bytes", None, 5])
def test_what_is_no_text_is_refused(bad: Any) -> None:
    with pytest.raises(RequestError, match="text to encode"):
        byte_level().encode(bad)


@pytest.mark.parametrize("document", ["", "{}", "[", '{"version": "1.0"}'])
def test_a_broken_tokenizer_is_refused(document: str) -> None:
    with pytest.raises(CheckpointError, match="tokenizer"):
        Text(files(document))


def test_an_unknown_decoder_is_refused_by_name() -> None:
    document = json.loads(byte_level()._files.tokenizer_json)
    document["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(UnsupportedModelError, match="WordPiece"):
        Text(files(json.dumps(document)))


# Decoding -------------------------------------------------------------------------------------


def test_a_character_comes_out_whole() -> None:
    ids = list("é🙂".encode())
    assert stream(byte_level(), ids) == ["", "é", "", "", "", "🙂", ""]


def test_an_unfinished_character_is_flushed_as_replacement() -> None:
    ids = list("a🙂".encode())[:-1]
    assert stream(byte_level(), ids) == ["a", "", "", "", "�"]


def test_bytes_of_no_character_do_not_hold_back_what_follows() -> None:
    assert stream(byte_level(), [0xFF, 0xC3, ord("a")]) == ["�", "", "�a", ""]


def test_a_real_replacement_character_is_not_held_back() -> None:
    assert "".join(stream(byte_level(), list("�a".encode()))) == "�a"


def test_special_tokens_are_hidden_unless_asked_for() -> None:
    text = byte_level()
    assert text.decode([256, ord("a"), 258, 257]) == "a<tool call>"
    assert text.decode([256, ord("a"), 257], skip_special=False) == "<s>a<|end|>"


def test_an_id_that_the_tokenizer_lacks_has_no_text() -> None:
    assert byte_level().decode([ord("a"), 5000, ord("b")]) == "ab"
    with pytest.raises(RequestError, match="token to decode"):
        byte_level().decode([-1])


def test_sentencepiece_takes_one_space_from_the_start() -> None:
    text = sentencepiece()
    assert text.decode([260, 260]) == "a a"
    assert text.decode([258, 260]) == " a"
    assert text.decode([257, 260]) == "a"
    assert text.decode([260, 260], continues=True) == " a a"


def test_sentencepiece_bytes_join_to_characters() -> None:
    assert stream(sentencepiece(), [259, 0xC3, 0xA9, 0xC3]) == ["a", "", "é", "", "�"]


@settings(max_examples=200)
@given(st.lists(st.integers(0, 300), max_size=40))
def test_any_stream_joins_to_decode_and_holds_back_less_than_a_character(ids: list[int]) -> None:
    for text in (byte_level_shared, sentencepiece_shared):
        pieces = stream(text, ids)
        assert "".join(pieces) == text.decode(ids)
        assert len(pieces[-1]) <= 1
        raw = b"".join(text._token_bytes(i) for i in ids if i not in text._special)
        expected = raw.decode("utf-8", "replace")
        assert "".join(pieces) in (expected, expected.removeprefix(" "))


@settings(max_examples=200)
@given(st.text(max_size=40).filter(lambda t: "<" not in t))
def test_any_text_survives_the_round_trip(text: str) -> None:
    assert byte_level_shared.decode(byte_level_shared.encode(text)) == text
    if "▁" not in text:  # SentencePiece's own sign for a space is one after the round trip
        assert sentencepiece_shared.decode(sentencepiece_shared.encode(text)) == text


byte_level_shared, sentencepiece_shared = byte_level(), sentencepiece()


def test_golden_texts_survive_the_round_trip(smollm2: Text, data_dir: Path) -> None:
    for line in (data_dir / "golden" / "tokens_smollm2.jsonl").read_text().splitlines():
        entry = json.loads(line)
        pieces = stream(smollm2, entry["ids"], skip_special=False)
        assert "".join(pieces) == entry["text"]
        assert not any("�" in piece for piece in pieces)


# Chat templates -------------------------------------------------------------------------------

USER = [{"role": "user", "content": "Hi"}]


def render(source: str, messages: Any = USER, **variables: Any) -> str:
    return ChatTemplate(source, "<s>", "</s>").render(messages, **variables)


def test_smollm2_writes_its_own_system_prompt(smollm2: Text) -> None:
    expected = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert smollm2.apply_chat_template(USER) == expected
    ids = smollm2.encode_chat(USER)
    assert ids[0] == smollm2.bos_token_id == 1
    assert smollm2.decode(ids, skip_special=False) == expected
    assert smollm2.apply_chat_template(USER, add_generation_prompt=False).endswith("<|im_end|>\n")


def test_a_model_without_template_says_what_to_do() -> None:
    with pytest.raises(RequestError, match="no chat template") as caught:
        byte_level().encode_chat(USER)
    assert caught.value.hint is not None
    assert "--raw" in caught.value.hint


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}", "<s>Hi</s>"),
        # A block tag takes its line with it: trim_blocks and lstrip_blocks.
        ("  {% if true %}\n  x\n  {% endif %}\ny", "  x\ny"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}kept{% endgeneration %}", "kept"),
        ("{{ {'b': '<é>', 'a': none} | tojson }}", '{"b": "<é>", "a": null}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ tools is none }}{{ documents is none }}", "TrueTrue"),
        ("{{ add_generation_prompt }}", "True"),
        ("{{ thinking }}", "off"),
        ("{{ unknown }}", ""),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user"),
        ("{{ messages | join(d=', ', attribute='role') }}", "user"),
        ("{{ ', '.join(['a', 'b']) }}{{ 'aa'.replace('a', 'b') }}", "a, bbb"),
        ("{{ '%s-%03d' % ('a', 4) }}{{ '%s!' | format('x') }}", "a-004x!"),
        ("{% set a, b = 1, 2 %}{{ a ~ b }}{{ (3, [4])[1][0] }}", "124"),
        ("{% set ns = namespace(n=0) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}", "1"),
        ("{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m('y') }}", "[y]"),
        ("{{ 'a\nb' | indent(2) }}", "a\n  b"),
        ("{{ messages[0].content | trim | upper }}{{ 'a b'.split(' ')[1].strip() }}", "HIb"),
    ],
)
def test_conventions_of_hugging_face(source: str, expected: str) -> None:
    assert render(source, thinking="off") == expected


def test_a_template_may_refuse_the_messages() -> None:
    with pytest.raises(RequestError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize("messages", [[], "Hi", None, ["Hi"], [{"content": "Hi"}], [{"role": 1}]])
def test_messages_of_the_wrong_shape(messages: Any) -> None:
    with pytest.raises(RequestError, match="messages"):
        render("x", messages)


@pytest.mark.parametrize(
    "source",
    ["{{ messages[0].content.more.still }}", "{{ messages[0].content + 1 }}", "{{ 1 / 0 }}"],
)
def test_errors_of_the_template_on_these_messages(source: str) -> None:
    with pytest.raises(RequestError, match="fails on these messages"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ 'a' | nofilter }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% for a in [1] %}" * 50 + "{% endfor %}" * 50,
        "x" * 300_000,
    ],
    ids=["syntax", "filter", "brackets", "blocks", "long"],
)
def test_what_is_no_template(source: str) -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate(source, None, None)


@pytest.mark.parametrize(
    "expression",
    [
        "messages.__class__.__mro__",
        "''.__class__.__base__.__subclasses__()",
        "messages.append(1)",
        "messages[0].update({})",
        "raise_exception.__globals__.sys",
        "range.__init__.x",
        "'{0.__class__}'.format(1)",
    ],
)
def test_the_sandbox_holds(expression: str) -> None:
    with pytest.raises(CheckpointError, match="unsafe"):
        render("{{ " + expression + " }}")


GROW = "{%% set ns = namespace(s='aaaa') %%}{%% for i in range(99) %%}%s{%% endfor %%}{{ ns.s }}"
HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "product": "{{ 'x' * 10000000000 }}",
    "list product": "{{ [1] * 10000000000 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "squares": GROW.replace("'aaaa'", "9") % "{% set ns.s = ns.s * ns.s %}",
    "concat": GROW % "{% set ns.s = ns.s ~ ns.s %}",
    "plus": GROW % "{% set ns.s = ns.s + ns.s %}",
    "nested": GROW % "{% set ns.s = [ns.s, ns.s] %}",
    "nested dict": GROW % "{% set ns.s = {1: ns.s, 2: ns.s} %}",
    "nested dict()": GROW % "{% set ns.s = dict(a=ns.s, b=ns.s) %}",
    "nested namespace": GROW
    % "{% set n = namespace() %}{% set n.a = ns.s %}{% set n.b = ns.s %}{% set ns.s = n %}",
    "block": GROW % "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}",
    "varargs": "{% macro f(n) %}{{ f(n - 1, varargs, varargs) if n else varargs }}{% endmacro %}"
    "{{ f(90, 1) }}",
    "recursion": "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "width": "{{ '%1000000000d' % 1 }}",
    "width of star": "{{ '%*d' % (1000000000, 1) }}",
    "width of filter": "{{ '%1000000000d' | format(1) }}",
    "replace": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "replace filter": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "join": "{{ ('b' * 1000000).join(['a'] * 1000) }}",
    "join filter": "{{ (['a'] * 1000) | join('b' * 1000000) }}",
    "indent": "{{ ('\n' * 1000000) | indent(1000000) }}",
    "indent of json": "{{ messages | tojson(indent=1000000000) }}",
    "default": "{{ (([0] * 1000) | map('default', [1] * 100000, true) | list) | string }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_template_is_stopped(source: str) -> None:
    with pytest.raises(CheckpointError, match=r"chat template: (Limit|Recursion)Error"):
        render(source)


def test_the_watch_on_a_template_ends_with_it() -> None:
    import sys

    before = sys.gettrace()
    render("x")
    with pytest.raises(CheckpointError):
        render(HOSTILE["loops"])
    assert sys.gettrace() is before
