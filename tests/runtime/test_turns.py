"""Turn formats: what templates of every kind make of a conversation, and what ends an answer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cvxq.lean.tokenizer import LeanTokenizer
from cvxq.thinking import USUAL_MARKS, Marks
from cvxq.turns import ChatError, turn_format

Tokenizer = Callable[[str | None], LeanTokenizer]
TextOf = Callable[[str | None, list[dict[str, str]]], str]

TURNS = [
    {"role": "user", "content": "Hi "},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Why?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
PARTS = CHATML.replace(
    "{{ m.content }}",
    "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}",
)
OPEN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def text_of(character_tokenizer: Tokenizer) -> TextOf:
    """Return a function that gives the prompt of messages as text."""

    def prompt(template: str | None, messages: list[dict[str, str]]) -> str:
        tokenizer = character_tokenizer(template)
        return tokenizer.decode(turn_format(tokenizer).encode(messages))

    return prompt


def test_plain_turns_end_where_the_answer_begins(
    character_tokenizer: Tokenizer, text_of: TextOf
) -> None:
    form = turn_format(character_tokenizer(None))
    assert text_of(None, [SYSTEM, *TURNS]) == (
        "<s>Be brief.\nUser: Hi\nAssistant: Hello.\nUser: Why?\nAssistant:"
    )
    assert form.stop == ("\nUser:",)


def test_template_is_used_and_brings_its_own_special_tokens(text_of: TextOf) -> None:
    assert text_of(OPEN, TURNS) == "<user>Hi <assistant>Hello.<user>Why?"


def test_tools_are_shown_where_the_template_shows_them(character_tokenizer: Tokenizer) -> None:
    shown = "{% for tool in tools or [] %}[{{ tool.function.name }}]{% endfor %}" + OPEN
    tools = [{"type": "function", "function": {"name": "now", "parameters": {}}}]
    tokenizer = character_tokenizer(shown)
    form = turn_format(tokenizer)
    assert form.has_tools
    assert tokenizer.decode(form.encode(TURNS[:1], tools=tools)) == "[now]<user>Hi "
    assert tokenizer.decode(form.encode(TURNS[:1])) == "<user>Hi "
    for template in (OPEN, None):
        assert not turn_format(character_tokenizer(template)).has_tools


def test_a_template_gets_further_variables(character_tokenizer: Tokenizer) -> None:
    tokenizer = character_tokenizer("{% if short is true %}Briefly: {% endif %}" + OPEN)
    form = turn_format(tokenizer)
    assert tokenizer.decode(form.encode(TURNS[:1], short=True)) == "Briefly: <user>Hi "
    assert tokenizer.decode(form.encode(TURNS[:1])) == "<user>Hi "


def test_refusal_of_a_template_is_one_error(text_of: TextOf) -> None:
    template = "{{ raise_exception('not today') }}"
    with pytest.raises(ChatError, match="template refuses these turns: not today"):
        text_of(template, TURNS)


def test_content_comes_in_parts_where_a_template_loops_over_them(text_of: TextOf) -> None:
    assert text_of(PARTS, [SYSTEM, *TURNS]) == text_of(CHATML, [SYSTEM, *TURNS])


@pytest.mark.parametrize("content", ["{{ m.content[0]['text'] }}", "{{ m.content[0].text + '' }}"])
def test_content_comes_in_parts_where_a_template_takes_the_first(
    text_of: TextOf, content: str
) -> None:
    template = CHATML.replace("{{ m.content }}", content)
    assert text_of(template, TURNS) == text_of(CHATML, TURNS)


def test_content_is_a_string_where_a_template_takes_both(text_of: TextOf) -> None:
    both = "{% if m.content is string %}{{ m.content }}{% else %}parts{% endif %}"
    assert text_of(CHATML.replace("{{ m.content }}", both), TURNS) == text_of(CHATML, TURNS)


def test_a_template_that_loses_the_words_is_an_error(text_of: TextOf) -> None:
    with pytest.raises(ChatError, match="leaves out what the user says"):
        text_of(CHATML.replace("m.content", "m.words"), TURNS)


@pytest.mark.parametrize(
    "loop",
    [
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}",
        "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}",
    ],
)
def test_a_system_text_without_a_role_goes_before_the_first_message(
    character_tokenizer: Tokenizer, text_of: TextOf, loop: str
) -> None:
    form = turn_format(character_tokenizer(loop + OPEN))
    assert not form.has_system
    assert text_of(loop + OPEN, [SYSTEM, *TURNS]) == (
        "<user>Be brief.\n\nHi <assistant>Hello.<user>Why?"
    )
    assert text_of(loop + OPEN, TURNS) == "<user>Hi <assistant>Hello.<user>Why?"
    assert turn_format(character_tokenizer(OPEN)).has_system


@pytest.mark.parametrize(
    ("template", "special", "stop"),
    [
        (CHATML, "<|end|>", ()),
        (PARTS, "<|end|>", ()),
        ("{% for m in messages %}{{ m.content }} [END]{% endfor %}", "[END]", ()),
        # no token of this vocabulary
        (CHATML.replace("<|end|>", "<|im_end|>"), None, ("<|im_end|>",)),
        # only the next turn's beginning ends an answer
        (OPEN.replace("<{{ m.role }}>", "<|start|>{{ m.role }}\n"), "<|start|>", ()),
        # words that belong to no mark might be an answer's
        (OPEN.replace("<{{ m.role }}>", "\n{{ m.role }}: "), None, ()),
        ("{{ messages[0].content }}", None, ()),
    ],
)
def test_what_closes_an_answer_ends_it(
    character_tokenizer: Tokenizer, template: str, special: str | None, stop: tuple[str, ...]
) -> None:
    tokenizer = character_tokenizer(template)
    form = turn_format(tokenizer)
    found = [] if special is None else [tokenizer.codec.token_id(special)]
    assert (sorted(form.end_ids), form.stop) == (found, stop)


def thoughtful(field: str, marks: tuple[str, str]) -> str:
    thought = f"{marks[0]}\n{{{{ m.{field} }}}}\n{marks[1]}\n\n"
    return CHATML.replace(
        "{{ m.content }}",
        f"{{% if m.{field} is defined %}}{thought}{{% endif %}}{{{{ m.content }}}}",
    )


def test_marks_of_thinking_are_what_the_template_writes(character_tokenizer: Tokenizer) -> None:
    strange = ("<|channel|>musing", "<|end|><|start|>assistant<|channel|>answer")
    form = turn_format(character_tokenizer(thoughtful("reasoning_content", strange)))
    assert form.thinking == (Marks(*strange), USUAL_MARKS)
    assert (
        turn_format(character_tokenizer(thoughtful("thinking", strange))).thinking == form.thinking
    )
    assert turn_format(character_tokenizer(CHATML)).thinking == (USUAL_MARKS,)


@pytest.mark.parametrize("begun", ["<T>\n", "<T>\n\n</T>\n\n"])
def test_marks_of_thinking_may_stand_in_the_prompt(
    character_tokenizer: Tokenizer, begun: str
) -> None:
    template = thoughtful("reasoning_content", ("<T>", "</T>"))
    template = template.replace("assistant\n{% endif %}", f"assistant\n{begun}{{% endif %}}")
    form = turn_format(character_tokenizer(template))
    assert form.thinking == (Marks("<T>", "</T>"), USUAL_MARKS)


def test_known_marks_count_where_the_template_only_cuts_them_off(
    character_tokenizer: Tokenizer,
) -> None:
    cut = "{{ m.content.split('[/THINK]')[-1] }}{# [THINK] #}"
    form = turn_format(character_tokenizer(CHATML.replace("{{ m.content }}", cut)))
    assert form.thinking == (Marks("[THINK]", "[/THINK]"), USUAL_MARKS)


def test_earlier_thinking_is_handed_to_the_template(text_of: TextOf) -> None:
    template = thoughtful("reasoning_content", ("<think>", "</think>"))
    turns = [TURNS[0], {**TURNS[1], "reasoning_content": "hm"}, TURNS[2]]
    assert "assistant\n<think>\nhm\n</think>\n\nHello.<|end|>" in text_of(template, turns)
    assert text_of(CHATML, turns) == text_of(CHATML, TURNS)
