"""Programs that a file may carry: chat templates and tokenizers that ask for too much."""

from __future__ import annotations

from random import Random
from typing import Any

from tests.fuzz.corpus import TEMPLATES
from tests.fuzz.json_mutations import copied

_HUGE = (10**5, 10**9, 10**12, 2**63)
_PIECES = (
    "{{% for a in range({n}) %}}{{% for b in range({n}) %}}x{{% endfor %}}{{% endfor %}}",
    "{{% for a in range(99999) %}}{{% for b in range(99999) %}}{{% endfor %}}{{% endfor %}}",
    "{{{{ 'a' * {n} }}}}",
    "{{{{ messages | string * {n} }}}}",
    "{{{{ '%{n}d' % 1 }}}}",
    "{{{{ 'x'.ljust({n}) }}}}{{{{ 'x' | center({n}) }}}}",
    "{{{{ 9 ** (9 ** 9) }}}}",
    "{{{{ (2 ** {n}) | string }}}}",
    "{{% set ns = namespace(t='ab') %}}{{% for i in range(60) %}}"
    "{{% set ns.t = ns.t ~ ns.t %}}{{% endfor %}}{{{{ ns.t | length }}}}",
    "{{% macro f(n) %}}{{{{ f(n - 1) ~ f(n - 1) if n else 'x' }}}}{{% endmacro %}}{{{{ f(40) }}}}",
    "{{% macro f() %}}{{{{ f() }}}}{{% endmacro %}}{{{{ f() }}}}",
    "{{% set x %}}{{{{ x }}}}{{{{ x }}}}{{% endset %}}{{{{ x }}}}",
    "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}",
    "{{{{ messages.__class__ }}}}{{{{ cycler.__init__.__globals__ }}}}",
    "{{% include '/etc/passwd' %}}{{% import 'os' as o %}}",
    "{{{{ lipsum(n={n}) }}}}",
    "{{{{ raise_exception('no\\nwith a line') }}}}",
    "{{{{ strftime_now('%Y' * 100000) }}}}{{{{ strftime_now(3) }}}}",
    "{{{{ messages[{n}].content }}}}{{{{ undefined.field }}}}",
    "{{{{ messages | map(attribute='content') | join('-') | indent({n}) }}}}",
    "{{{{ range({n}) | list | tojson(indent={n}) }}}}",
    "{{{{ [[1] * 9999] * 99999 | length }}}}",
    "{{{{ 'a,' * 999999 | replace('a', 'b' * 999999) }}}}",
    "{{{{ '\\ud800' }}}}{{{{ '\\x00' }}}}",
    "{{%- generation -%}}{{{{ 1 / 0 }}}}{{%- endgeneration -%}}",
    "{{{{ messages.append(messages) }}}}{{{{ messages.clear() }}}}",
    "{{{{ loop.cycle() }}}}{{% break %}}{{% continue %}}",
)


def any_template(rng: Random) -> str:
    """Return a template: one that works, with parts that loop, swell, fail or break rules."""
    text = rng.choice(TEMPLATES)
    for _ in range(rng.choice([0, 1, 1, 2])):
        piece = rng.choice(_PIECES).format(n=rng.choice(_HUGE))
        at = rng.choice([0, len(text), rng.randrange(len(text) + 1)])
        text = text[:at] + piece + text[at:]
    if rng.random() < 0.2:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(["{{", "%}", "\x00", "{% raw %}", "(" * 9999]) + text[at:]
    return text


def hostile_tokenizer(document: Any, rng: Random) -> Any:
    """Return a tokenizer.json with a part that swells, backtracks or names what is not there."""
    made = copied(document)
    if not isinstance(made, dict):
        return made
    swelling = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 200}
    empty = {"type": "Replace", "pattern": {"Regex": ""}, "content": "abcdefgh" * 50}
    backtracking = {
        "type": "Split",
        "pattern": {"Regex": "(e|e|h|[a-z])*([a-z ]*)*$0"},
        "behavior": "Isolated",
        "invert": False,
    }
    how = rng.randrange(8)
    if how == 0:
        made["normalizer"] = {"type": "Sequence", "normalizers": [swelling] * rng.choice([1, 9])}
    elif how == 1:
        made["normalizer"] = {"type": "Sequence", "normalizers": [empty] * rng.choice([1, 9])}
    elif how == 2:
        made["pre_tokenizer"] = backtracking
    elif how == 3:
        made["decoder"] = {"type": "Sequence", "decoders": [swelling] * rng.choice([1, 20])}
    elif how == 4:
        made["truncation"] = {
            "direction": "Right",
            "max_length": rng.choice([0, 2**40]),
            "strategy": "LongestFirst",
            "stride": rng.choice([0, 5, 2**63]),
        }
    elif how == 5:
        made["padding"] = {
            "strategy": {"Fixed": rng.choice([10**5, 2**40])},
            "direction": "Left",
            "pad_to_multiple_of": rng.choice([None, 0, 2**40]),
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "e",
        }
    elif how == 6:
        made["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA" * 64}
    elif isinstance(made.get("added_tokens"), list):
        token = {"id": rng.choice([0, 7, 2**31, 2**32 - 1]), "content": rng.choice(["", "e", "ee"])}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        made["added_tokens"].append({**token, **flags, "special": rng.random() < 0.5})
    return made
