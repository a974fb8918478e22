"""Chat templates compared with transformers' `apply_chat_template`, and the limits of untrusted templates."""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import SecurityError
from transformers import PreTrainedTokenizerFast

from server.model.text.template import ChatTemplate, TemplateError
from tests.kits.tiny import CHAT_TEMPLATE, tiny_tokenizer

NAMED = tiny_tokenizer().special_tokens_map
OF_A_HUB = """\
{%- if tools is not none or documents %}{{ raise_exception('no tools here') }}{% endif %}
{% macro header(role, last=false) -%}
    {{ '<|im_start|>' + role }}{{ '\\n' }}
{%- endmacro %}
{%- set ns = namespace(count=0, self='me', has_system=messages[0].role == 'system') %}
{% if not ns.has_system %}
    {{- header('system') + 'Today is ' + strftime_now('%Y') + '.' + eos_token + '\\n' }}
{% endif %}
{% for message in messages %}
    {# a comment #}
    {%- if message.role == 'tool' %}{% continue %}{% endif %}
    {%- if loop.index > 6 %}
        {%- break %}
    {%- endif %}
    {%- set ns.count = ns.count + 1 %}
    {{- header(message['role']) }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- message.content | trim }}{{ eos_token }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content.split('</think>')[-1] }}{{ eos_token }}
    {%- endif %}
    {{ '\\n' }}
{% endfor %}
{{ dict(count=ns.count, who=ns.self) | tojson }}{{ messages | tojson(indent=2, sort_keys=true) }}
{{ messages[-1].content[:5] | tojson(ensure_ascii=true, separators=(',', ':')) }}
{{ dict.fromkeys(['a', 'b'], 1) | tojson }}{{ dict([('k', 1)], j=2) }}
{%- for role, same in messages | groupby('role') %}{{ role }}: {{ same | length }}{% endfor %}
{{- bos_token ~ unk_token ~ pad_token ~ (cls_token is defined) ~ (thinking is defined) }}
{%- if add_generation_prompt %}{{ header('assistant') }}{% endif %}
"""
"""Features used by the templates of well-known models, all in one."""

MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": st.text()}
    ),
    min_size=1,
    max_size=8,
)


def by_transformers(
    template: str, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
) -> str:
    tokenizer = tiny_tokenizer()
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, OF_A_HUB], ids=["SmolLM2's", "of a hub"])
@given(messages=MESSAGES, add_generation_prompt=st.booleans())
def test_the_text_is_transformers_own(
    template: str, messages: list[dict[str, str]], add_generation_prompt: bool
) -> None:
    found = ChatTemplate(template, NAMED).render(messages, add_generation_prompt)
    assert found == by_transformers(template, messages, add_generation_prompt)


def test_template_of_a_hub_is_not_empty() -> None:
    """The test above would also pass if both rendered nothing."""
    turns = [("user", "Hi <b>"), ("assistant", " Ho "), ("tool", "hidden"), ("user", "é")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = ChatTemplate(OF_A_HUB, NAMED).render(messages, add_generation_prompt=True)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert lines[:4] == [
        "<|im_start|>system",
        f"Today is {datetime.now():%Y}.<|im_end|>",
        "<|im_start|>user",
        "Hi <b><|im_end|>",
    ]
    assert "Ho<|im_end|>" in lines
    assert '{"count": 3, "who": "me"}[' in lines
    assert '"content": "Hi <b>",' in lines
    assert '"\\u00e9"' in lines


def test_variables_set_in_an_assistants_part_stay_there() -> None:
    template = "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}"
    messages = [{"role": "user", "content": ""}]
    assert ChatTemplate(template, {}).render(messages, add_generation_prompt=False) == "21"
    assert by_transformers(template, messages) == "21"


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ raise_exception('no ' + messages[0].role) }}", "no user"),
        ("{{ messages[0].content", "unexpected end of template"),
        ("{% generation %}", "Unexpected end of template"),
        ("{{ messages[0].nothing.more }}", "has no attribute 'nothing'"),
    ],
)
def test_refused_templates(template: str, error: str) -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(TemplateError, match=re.escape(error)):
        ChatTemplate(template, {}).render(messages, add_generation_prompt=True)
    with pytest.raises(TemplateError, match=re.escape(error)):
        by_transformers(template, messages)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='system') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ dict.__class__ }}",
        "{{ dict.mro() }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ namespace(__class__=1) }}",
        "{{ namespace({'_a': 1}) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__module__ + '' }}",
        "{{ '{0.__class__}'.format(1) }}",
    ],
)
def test_untrusted_templates_are_sandboxed(template: str) -> None:
    """It is refused, or renders nothing."""

    def outcome(render: Callable[[], str]) -> str:
        try:
            return render()
        except TemplateError:
            return "refused"

    messages = [{"role": "user", "content": "hi"}]
    found = outcome(lambda: ChatTemplate(template, {}).render(messages, add_generation_prompt=True))
    assert found in ("", "refused")
    assert found == outcome(lambda: by_transformers(template, messages))


def test_messages_are_left_as_they_are() -> None:
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(SecurityError):
        ChatTemplate("{{ messages.clear() }}", {}).render(messages, add_generation_prompt=True)
    assert messages == [{"role": "user", "content": "hi"}]
