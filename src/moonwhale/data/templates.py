"""Renders chat templates within limits of time, memory and length. A checkpoint's template is a program.

transformers runs a template in Jinja's sandbox, which keeps it from files but not from loops without an end or texts
without a limit. The template that moonwhale writes is known and is rendered here. Every other one is rendered in a
process that can be ended. All of transformers' callers, TRL and lm-eval included, come through here.
"""

from functools import lru_cache

import jinja2
from transformers import tokenization_utils_base
from transformers.utils.chat_template_utils import _get_template_literal_text, render_jinja_template

from moonwhale.data.source import ROLES
from moonwhale.data.worker_process import WorkerProcess
from moonwhale.errors import one_line, printable

# `generation` encloses everything that the assistant has to produce, the end token of its message included, so that
# fine-tuning can put the loss on exactly that.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    f"{{% if message['role'] not in {ROLES} %}}"
    "{{ raise_exception('unknown role ' ~ message['role']) }}"
    "{% endif %}"
    "{{ '<|' ~ message['role'] ~ '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim ~ eos_token }}{% endgeneration %}"
    "{% else %}"
    "{{ message['content'] | trim ~ eos_token }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TIME_LIMIT = 3.0  # seconds for one batch of conversations
LONGEST_TEMPLATE = 1 << 17  # characters
GROWTH, ROOM = 64, 1 << 20  # a rendering has at most GROWTH times the request's characters, plus ROOM
OVER_LIMIT = "it takes too much time or memory"

_worker = WorkerProcess("moonwhale.data.templates", TIME_LIMIT)
_refused: set[str] = set()  # templates that exceeded a limit: they are not tried again


def render_within_limits(conversations: list, chat_template: str | None = None, **options) -> tuple[list, list]:
    """Does what transformers' `render_jinja_template` does, for templates from anywhere.

    Raises:
        jinja2.TemplateError: the template is wrong, refuses a conversation, or exceeds a limit.
    """
    if chat_template == CHAT_TEMPLATE:
        return render_jinja_template(conversations, chat_template=chat_template, **options)
    return tuple(_ask(chat_template, conversations, options))


@lru_cache  # as transformers' own: each rendering asks for it
def literal_text_within_limits(chat_template: str) -> str:
    """Does what transformers' `_get_template_literal_text` does: compiling a template computes its constants."""
    if chat_template == CHAT_TEMPLATE:
        return _get_template_literal_text(chat_template)
    return _ask(chat_template)


def _ask(template: str | None, *arguments) -> str | list:
    """Returns what the worker process makes of a template: its literal text or, with arguments, its renderings."""
    if not isinstance(template, str) or len(template) > LONGEST_TEMPLATE:
        raise jinja2.TemplateError(f"it is no text of at most {LONGEST_TEMPLATE:,} characters")
    if template in _refused:
        raise jinja2.TemplateError(OVER_LIMIT)
    try:
        reply = _worker.ask([template, *arguments])
    except (TypeError, ValueError, RecursionError) as error:
        raise jinja2.TemplateError(f"its input is no plain data: {one_line(error)}") from error
    if reply is None:
        _refused.add(template)
        raise jinja2.TemplateError(OVER_LIMIT)
    if "error" in reply:
        raise jinja2.TemplateError(reply["error"])
    return reply["result"]


def prepare() -> None:
    """Renders nothing once in the worker process, which imports what rendering needs."""
    render_jinja_template([[]], chat_template="")


def answer(request: list) -> dict:
    """Works in the worker process. Whatever a template raises, MemoryError included, is its error's text."""
    template, *arguments = request
    try:
        if not arguments:
            return {"result": _get_template_literal_text(template)}
        conversations, options = arguments
        rendered, spans = render_jinja_template(conversations, chat_template=template, **options)
        most = ROOM + GROWTH * len(str(conversations))
        if sum(map(len, rendered)) > most:
            return {"error": f"it writes more than {most:,} characters"}
        return {"result": [rendered, spans]}
    except jinja2.TemplateError as error:
        return {"error": printable(one_line(error), "")}
    except Exception as error:
        return {"error": printable(f"{type(error).__name__}: {one_line(error)}", "")}


tokenization_utils_base.render_jinja_template = render_within_limits
tokenization_utils_base._get_template_literal_text = literal_text_within_limits
