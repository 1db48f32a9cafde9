"""Chat templates as Hugging Face writes them: sandboxed Jinja with the same filters, functions and tags."""

import datetime
import json
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from dovetail_text.errors import ChatError

__all__ = ["CHATML", "Renderer", "compile_template"]

CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""The ChatML template: each message between ``<|im_start|>role`` and ``<|im_end|>``."""

Renderer = Callable[..., str]


class _Generation(jinja2.ext.Extension):
    """Accepts ``{% generation %}...{% endgeneration %}`` and renders what stands between."""

    tags = {"generation"}  # noqa: RUF012 - the name and type that jinja2 prescribes

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def compile_template(source: str) -> Renderer:
    """Return a function of the template's variables that renders it.

    Raises:
        ChatError: the template is not valid Jinja; when called, the template refuses what it is given or fails.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ChatError(f"the chat template is not valid Jinja: {error}") from error

    def render(*, now: datetime.datetime, **variables: Any) -> str:
        try:
            return template.render(strftime_now=now.strftime, raise_exception=_raise_exception, **variables)
        except jinja2.TemplateError as error:
            raise ChatError(f"the chat template refuses the conversation: {error}") from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            raise ChatError(f"the chat template fails on the conversation: {error!r}") from error

    return render
