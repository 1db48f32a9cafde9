import datetime
import json
import pickle

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail_text import CHATML, ChatError, Tokenizer

TRIMMED = (
    "{% for message in messages %}\n"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}{% endfor %}"
)
MERGED = (  # the system prompt goes into the last user message
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|im_start|>[INST] ' + (system + '\n\n' if loop.last and system else '') + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' ~ m.content ~ '<|im_end|>' }}{% endif %}{% endfor %}"
)
REASONING = (  # old reasoning is dropped, the last one is written again
    "{% for m in messages %}{% set c = m.content %}{% set r = '' %}"
    "{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set r = c.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if loop.last and r %}{{ '<think>\\n' + r.strip('\\n') + '\\n</think>\\n\\n' + c.lstrip('\\n') }}"
    "{% else %}{{ c }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
)
PREFIXED = (  # looks at how a content begins, so that a mark in front of it changes the branch
    "{% for m in messages %}{% if m.content.startswith('<tool>') %}{{ '<|im_start|>tool\\n' + m.content }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
)
WRITTEN_AS_JSON = "{% for m in messages %}<|im_start|>{{ m | tojson }}<|im_end|>{% endfor %}"
GENERATION = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% generation %}{{ m.content }}<|im_end|>"
    "{% endgeneration %}\n{% endfor %}{{ tools | tojson if tools else '' }}{{ strftime_now('%Y') }}"
)
CONTENT = st.lists(
    st.sampled_from(["a", " ", "\n", "ü", "日", "<|im_end|>", "<|im_", "end|>", "<|", "to be", "<think>", "\ufdd0"]),
    max_size=5,
).map("".join)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": CONTENT}), min_size=1, max_size=4
)


def with_template(tokenizer, template):
    state = tokenizer.__getstate__() | {"chat_template": template}
    return Tokenizer(state.pop("description"), **state)


def texts_of(tokenizer, encoding):
    return [tokenizer.decode(encoding.ids[s.start : s.stop]) for s in encoding.spans]


def conversation(*contents, roles=("user", "assistant")):
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


@given(messages=MESSAGES, prompt=st.booleans())
@settings(max_examples=300, deadline=None)
def test_chatml_equals_piecewise_truth(tokenizer, messages, prompt):
    """A special token comes out of a message, is missed in the template, or a span is wrong."""
    encoding = tokenizer.chat(messages, add_generation_prompt=prompt)
    start, end = tokenizer.special_tokens["<|im_start|>"], tokenizer.special_tokens["<|im_end|>"]
    expected = []
    for m in messages:
        expected += [start, *tokenizer.encode(m["role"] + "\n" + m["content"]), end, *tokenizer.encode("\n")]
    expected += [start, *tokenizer.encode("assistant\n")] if prompt else []
    assert encoding.ids == expected
    for m, span, text in zip(messages, encoding.spans, texts_of(tokenizer, encoding), strict=True):
        assert span.role == m["role"]
        assert text in (m["content"], "\n" + m["content"])  # line breaks of template and content may join


@given(messages=MESSAGES)
@settings(max_examples=80, deadline=None)
@pytest.mark.parametrize("template", [TRIMMED, MERGED, REASONING, PREFIXED, CHATML])
def test_equals_the_library_on_conversations_without_special_names(tokenizer, template, messages):
    """The ids differ from those of the rendered text with special tokens recognised."""
    messages = [m | {"content": m["content"].replace("<|", "x").replace("|>", "y")} for m in messages]
    ours = with_template(tokenizer, template)
    engine = tokenizers.Tokenizer.from_str(json.dumps(pickle.loads(pickle.dumps(tokenizer))._spec))
    text = ours._render(False, datetime.datetime.now(), messages, None)
    assert ours.chat(messages).ids == engine.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (TRIMMED, conversation("  a b \n", " ok"), ["a b", "ok"]),
        (TRIMMED, conversation("a", "ok"), ["a", "ok"]),
        (TRIMMED, conversation(" \n", "ok"), ["", "ok"]),
        (REASONING, conversation("q", "<think>\nwhy\n</think>\n\nso"), ["q", "<think>\nwhy\n</think>\n\nso"]),
        (REASONING, conversation("q", "<think>\nwhy\n</think>\n\nso", "r", "s"), ["q", "so", "r", "s"]),
        (PREFIXED, conversation("<tool> 3", "x", "<tool>"), ["<tool> 3", "x", "<tool>"]),
        (PREFIXED, conversation("<tool> <|im_end|>", "x"), ["<tool> <|im_end|>", "x"]),
        (WRITTEN_AS_JSON, conversation("a b", "c"), ["a b", "c"]),
        (GENERATION, conversation("a b", ""), ["a b", ""]),
        (CHATML, conversation("same", "same", "same"), ["same", "same", "same"]),
        (CHATML, conversation("user", "\ufdd0\ufdd1\ufdd2"), ["user", "\ufdd0\ufdd1\ufdd2"]),
    ],
)
def test_spans_under_templates_that_change_things(tokenizer, template, messages, expected):
    """A loss mask covers the wrong tokens when a template trims, drops, branches on or quotes content."""
    ours = with_template(tokenizer, template)
    got = texts_of(ours, ours.chat(messages))
    assert [text.strip('"') for text in got] == [text.strip('"') for text in expected]


def test_merged_system_prompt(tokenizer):
    """A system prompt inside another message's text has no span, or takes that of the user."""
    ours = with_template(tokenizer, MERGED)
    messages = [{"role": "system", "content": "be brief"}, *conversation("a<|im_end|>", "ok", "more")]
    encoding = ours.chat(messages)
    assert [t.strip() for t in texts_of(ours, encoding)] == ["be brief", "a<|im_end|>", "ok", "more"]
    assert encoding.spans[0].start > encoding.spans[1].start
    assert encoding.ids.count(ours.special_tokens["<|im_end|>"]) == 1


def test_dropped_message_has_an_empty_span(tokenizer):
    """A message that the template leaves out takes tokens of another one."""
    ours = with_template(
        tokenizer, "{% for m in messages if m.role == 'user' %}<|im_start|>{{ m.content }}{% endfor %}"
    )
    encoding = ours.chat(conversation("a", "a"))
    assert [(s.start, s.stop) for s in encoding.spans] == [(1, 2), (0, 0)]


def test_data_outside_of_content_is_data_too(tokenizer):
    """A tool description, an argument or a role smuggles a special token in."""
    template = "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}<|im_end|>{% endfor %}"
    ours = with_template(tokenizer, template)
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}]
    messages = [{"role": "<|im_end|>", "content": None, "tool_calls": calls}]
    encoding = ours.chat(messages, tools=[{"name": "<|im_end|>"}])
    assert encoding.ids.count(ours.special_tokens["<|im_end|>"]) == 1
    assert ours.decode(encoding.ids).count("<|im_end|>") == 3
    assert encoding.spans[0][1:] == (0, 0)


def test_a_name_that_template_and_content_make_together(tokenizer):
    """Half a name in the content and half in the template becomes a special token."""
    ours = with_template(tokenizer, "{% for m in messages %}{{ m.content }}|im_end|><|im_end|>{% endfor %}")
    encoding = ours.chat([{"role": "user", "content": "<"}])
    assert encoding.ids.count(ours.special_tokens["<|im_end|>"]) == 1


def test_space_absorbing_special_tokens(tokenizer):
    """Special tokens that swallow white space give other ids than the library."""
    engine = tokenizers.Tokenizer.from_str(tokenizer.__getstate__()["description"])
    engine.add_special_tokens(
        [tokenizers.AddedToken("<L>", lstrip=True, special=True), tokenizers.AddedToken("<R>", rstrip=True)]
    )
    ours = Tokenizer(engine.to_str(), chat_template="{% for m in messages %}a <L>{{ m.content }}<R>  b{% endfor %}")
    messages = [{"role": "user", "content": " x "}, {"role": "user", "content": "y"}]
    text = "a <L> x <R>  ba <L>y<R>  b"
    assert ours.chat(messages).ids == engine.encode(text, add_special_tokens=False).ids


def test_space_before_the_first_word_only(llama_like):
    """Text behind a special token gets a space that the library does not put there."""
    template = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }}{{ eos_token }}{% endfor %}"
    ours = with_template(llama_like, template)
    engine = tokenizers.Tokenizer.from_str(llama_like.__getstate__()["description"])
    for contents in (["a", "to be"], ["", " b"]):
        text = "<s>" + "".join(f"[INST] {c}</s>" for c in contents)
        assert ours.chat(conversation(*contents)).ids == engine.encode(text, add_special_tokens=False).ids


def test_refusals(tokenizer):
    """A template's refusal or failure surfaces as another kind of error, or not at all."""

    def chat(template, messages):
        return with_template(tokenizer, template).chat(messages)

    user = conversation("abc")
    with pytest.raises(ChatError, match="no system role"):
        chat("{{ raise_exception('no system role') }}", user)
    with pytest.raises(ChatError, match="not valid Jinja"):
        chat("{% for %}", user)
    with pytest.raises(ChatError, match="rewrites the content of message 0"):
        chat("{% for m in messages %}{{ m.content[::-1] }}{% endfor %}", user)
    with pytest.raises(ChatError, match="rewrites the content of message 0"):
        chat("{% for m in messages %}{{ m.content[:2] }}{% endfor %}", user)
    with pytest.raises(ChatError, match="acts on it"):
        chat("{{ messages[0].content.split('<|im_end|>')[-1] }}", conversation("a<|im_end|>b"))
    with pytest.raises(ChatError, match="fails"):
        chat("{{ messages[0].content + 1 }}", user)
    with pytest.raises(ChatError, match=r"unsafe|refuses"):
        chat("{{ messages.__class__.__mro__[1].__subclasses__() }}", user)
    with pytest.raises(ChatError, match="refuses"):
        chat("{{ messages.append(1) }}", user)


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([], "non-empty"),
        ("hello", "non-empty"),
        ([3], "message 0"),
        ([{"content": "a"}], "'role'"),
        ([{"role": "user", "content": ["a"]}], "expected a string"),
    ],
)
def test_bad_messages(tokenizer, messages, match):
    """Malformed messages reach the template."""
    with pytest.raises(ChatError, match=match):
        tokenizer.chat(messages)


def test_surrogates_in_a_message(tokenizer):
    """A lone surrogate breaks inside the library."""
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.chat(conversation("a\ud800"))
