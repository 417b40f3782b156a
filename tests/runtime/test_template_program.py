"""Chat templates render as transformers renders them, and can do no more than there."""

from __future__ import annotations

from typing import Any

import pytest
from cvxq.template_program import render_chat
from jinja2.exceptions import SecurityError, TemplateError
from transformers import PreTrainedTokenizerFast

MESSAGES = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "Wie heißt du?\n"},
    {"role": "assistant", "content": " I am “cvxq”. ", "reasoning_content": "\nWho am I?\n"},
    {"role": "user", "content": "  ok"},
    {"role": "assistant", "content": "<think>\nwell\n</think>\n\nGood. "},
    {"role": "user", "content": "<r>ok</r>"},
]
IN_PARTS = [
    {**message, "content": [{"type": "text", "text": message["content"]}]} for message in MESSAGES
]

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}\n"
        "    {%- if loop.first and message['role'] != 'system' %}{{ 'none' }}{% endif %}\n"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama": (
        "{{ bos_token }}{% set ns = namespace(system='', n=0) %}"
        "{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content | trim %}"
        "{% elif m.role == 'user' %}{% set ns.n = ns.n + 1 %}"
        "[INST] {% if ns.n == 1 and ns.system %}<<SYS>>{{ ns.system }}<</SYS>>{% endif %}"
        "{{ m.content.strip() }} [/INST]"
        "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "training marks": (
        "{% set who = 'outside' %}{% for m in messages %}\n"
        "  {% if m.role == 'assistant' %}\n"
        "    {% generation %}{% set who = 'inside' %}{{ m.content + who }}{% endgeneration %}\n"
        "  {% else %}{{ m.content }}{{ who }}\n  {% endif %}\n{% endfor %}"
    ),
    "filters": (
        "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}"
        "{{ dict(b=1, a='<ü>') | tojson(sort_keys=true, ensure_ascii=true) }}"
        "{{ tools is none }}{{ documents is none }}{{ pad_token is defined }}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}"
        "{% if loop.index > 3 %}{% break %}{% endif %}{{ m.content }}|{% endfor %}"
        "{%- macro shout(x) -%}{{ x | upper }}!{%- endmacro -%}{{ shout(messages[-1].content) }}"
    ),
    "thinking": (
        "{%- set ns = namespace(multi=true, last=messages | length - 1) %}"
        "{%- for m in messages[::-1] %}{% set index = messages | length - 1 - loop.index0 %}"
        "{%- if ns.multi and m.role == 'user' and m.content is string and not ("
        "m.content.startswith('<r>') and m.content.endswith('</r>')) %}"
        "{%- set ns.multi = false %}{% set ns.last = index %}{% endif %}{% endfor %}{{ ns.last }}"
        "{%- for m in messages %}{% set thought = '' %}"
        "{%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}"
        "{%- elif '</think>' in m.content %}"
        "{%- set thought = m.content.split('</think>')[0].rstrip('\n').split('<think>')[-1] %}"
        "{%- endif %}{{ thought.strip('\n') }}|{{ m.thinking }}|"
        "{{ m.content.rsplit('</think>', 1)[-1].lstrip('\n') }}{% endfor %}"
    ),
    "parts": (
        "{% for m in messages[1:] %}{% if m['content'] is string %}{{ m['content'] | trim }}"
        "{% elif m['content'] is iterable %}{% for part in m['content'] %}"
        "{{ part['text'] if part['type'] == 'text' else raise_exception('only texts') }}"
        "{% endfor %}{% endif %}{{ loop.previtem.role if loop.previtem is defined }}{% endfor %}"
    ),
    "settings": (
        "{%- if not date_string is defined %}{% if strftime_now is defined %}"
        "{%- set date_string = strftime_now('%d %b %Y') %}{% else %}"
        "{%- set date_string = '26 Jul 2024' %}{% endif %}{% endif %}{{ date_string }}"
        "{%- if not tools is defined %}{% set tools = none %}{% endif %}{{ tools is none }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}never{% endif %}"
        "{%- set roles = messages | map(attribute='role') | list %}{{ roles | tojson }}"
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
        "{%- for key, value in messages[0] | items %}{{ key ~ '=' ~ value }}{% endfor %}"
        "{%- macro turn(role, text='none') %}{{ role }}: {{ text }}{% endmacro %}"
        "{{ turn('user', text=messages[-1].content) }}{{ caller is defined }}"
    ),
    "date": "{{ strftime_now('%Y-%m') | length }} {{ messages | length }}",
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def of_transformers(template: str, prompt: bool, messages: Any = MESSAGES) -> Any:
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL)
    tokenizer.chat_template = template
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_texts_equal_those_of_transformers(name: str, prompt: bool) -> None:
    template = TEMPLATES[name]
    assert render_chat(template, MESSAGES, SPECIAL, prompt) == of_transformers(template, prompt)


def test_contents_in_parts_equal_those_of_transformers() -> None:
    template = TEMPLATES["parts"]
    assert render_chat(template, IN_PARTS, SPECIAL, True) == of_transformers(
        template, True, IN_PARTS
    )


def test_a_template_may_refuse() -> None:
    template = "{{ raise_exception('turns must alternate') }}"
    with pytest.raises(TemplateError, match="turns must alternate"):
        render_chat(template, MESSAGES, SPECIAL, True)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(_x=1) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(template: str) -> None:
    with pytest.raises(SecurityError):
        render_chat(template, MESSAGES, SPECIAL, True)
