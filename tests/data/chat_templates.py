"""Chat templates that treat conversations as those of well-known model families do.

They are written for these tests: short, with the same marks, order, defaults and losses.
"""

# ruff: noqa: E501, RUF001 (templates are long, and some families write full-width marks)

from typing import Any, NamedTuple

from tests.conftest import make_tokenizer


class Family(NamedTuple):
    """A template, its special tokens, and the token that ends an answer."""

    template: str
    special: tuple[str, ...]
    end: str


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IM = ("<|im_start|>", "<|im_end|>")

SMOLLM = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The calls of a message as lines of JSON.
CALLS = (
    "{% for call in m.tool_calls or [] %}{% set f = call.function or call %}{{ '\n' if m.content "
    'or not loop.first }}<tool_call>\n{"name": "{{ f.name }}", "arguments": '
    "{{ f.arguments | tojson }}}\n</tool_call>{% endfor %}"
)
TOOLS = "{% if tools %}\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n</tools>{% endif %}"

QWEN25 = (
    "{% set first = messages[0] %}<|im_start|>system\n"
    "{{ first.content if first.role == 'system' else 'You are an assistant made by a cloud.' }}"
    + TOOLS
    + "<|im_end|>\n{% for m in messages %}{% if not (loop.first and m.role == 'system') %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}" + CALLS + "<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

QWEN3 = (
    "{% if messages[0].role == 'system' or tools %}<|im_start|>system\n"
    "{{ messages[0].content if messages[0].role == 'system' }}" + TOOLS + "<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=-1) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}"
    "{% set said = m.content %}{% if not thought and '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought.strip('\n') }}\n"
    "</think>\n\n{{ said.lstrip('\n') }}{% else %}{{ said }}{% endif %}" + CALLS + "<|im_end|>\n"
    "{% elif not (loop.first and m.role == 'system') %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)

LLAMA3 = (
    "{{ bos_token }}{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') "
    "%}{% endif %}<|start_header_id|>system<|end_header_id|>\n\nToday: {{ date_string }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}{% if tools %}"
    "{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}{% endif %}<|eot_id|>"
    "{% for m in messages %}{% if not (loop.first and m.role == 'system') %}<|start_header_id|>"
    '{{ m.role }}<|end_header_id|>\n\n{% if m.tool_calls %}{"name": "{{ m.tool_calls[0].function'
    '.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}{% else %}'
    "{{ m.content | trim }}{% endif %}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

R1 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% elif m.role == "
    "'assistant' %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>THINK{% endif %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role "
    "}}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' "
    "%}{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}"
    "{% endif %}{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}[INST] "
    "{{ system if loop.last or turns | length == loop.index + 1 }}{{ m.content }}[/INST]{% else %} "
    "{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)

PHI = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)

GRANITE = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = "
    "messages[1:] %}{% else %}{% set system = 'Today is ' + strftime_now('%B %d, %Y') + '.' %}"
    "{% set turns = messages %}{% endif %}<|start_of_role|>system<|end_of_role|>{{ system }}"
    "<|end_of_text|>\n{% if tools %}<|start_of_role|>tools<|end_of_role|>{{ tools | tojson }}"
    "<|end_of_text|>\n{% endif %}{% for m in turns %}<|start_of_role|>{{ m.role }}<|end_of_role|>"
    "{{ m.content }}<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)

ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

HARMONY = (
    "<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}<|end|>"
    "{% if messages[0].role in ['system', 'developer'] or tools %}<|start|>developer<|message|>"
    "{% if messages[0].role in ['system', 'developer'] %}{{ messages[0].content }}{% endif %}"
    "{% for tool in tools or [] %}\n{{ tool.function | tojson }}{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
    "{% elif m.role == 'assistant' %}{% if '<|channel|>' in m.content %}"
    "{{ raise_exception('channels belong into fields of their own') }}{% endif %}{% if m.thinking and "
    "loop.last %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "{% if m.tool_calls %}<|start|>assistant to=functions.{{ m.tool_calls[0].function.name }}"
    "<|channel|>commentary json<|message|>{{ m.tool_calls[0].function.arguments | tojson }}<|call|>"
    "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)

PARTS = (
    "{% for m in messages %}{{ m.role | capitalize }}:{% for part in m.content %}"
    "{% if part.type == 'image' %}<image>{% elif part.type == 'text' %} {{ part.text }}{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)

HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>", "<｜end｜>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
ROLES = ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>")
CHANNELS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")

FAMILIES = {
    "ChatML": Family(CHATML, IM, "<|im_end|>"),
    "SmolLM2": Family(SMOLLM, IM, "<|im_end|>"),
    "Qwen 2.5": Family(QWEN25, IM, "<|im_end|>"),
    "Qwen 3": Family(QWEN3, IM, "<|im_end|>"),
    "Llama 3": Family(LLAMA3, HEADERS, "<|eot_id|>"),
    "DeepSeek R1 distill": Family(R1.replace("THINK", ""), DEEPSEEK, "<｜end｜>"),
    "DeepSeek R1 distill, later": Family(R1.replace("THINK", "<think>\n"), DEEPSEEK, "<｜end｜>"),
    "Gemma": Family(GEMMA, TURNS, "<end_of_turn>"),
    "Mistral": Family(MISTRAL, ("[INST]", "[/INST]"), "<|eos|>"),
    "Phi 4": Family(PHI, (*IM, "<|im_sep|>"), "<|im_end|>"),
    "Granite": Family(GRANITE, ROLES, "<|end_of_text|>"),
    "Zephyr": Family(ZEPHYR, (), "<|eos|>"),
    "GPT-OSS (Harmony)": Family(HARMONY, CHANNELS, "<|return|>"),
    "Content parts (SmolVLM)": Family(PARTS, ("<end_of_utterance>",), "<end_of_utterance>"),
}


def tokenizer_of(family: str) -> Any:
    """A tokenizer with a family's template and special tokens."""
    template, special, end = FAMILIES[family]
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.eos_token = end
    tokenizer.chat_template = template
    return tokenizer
