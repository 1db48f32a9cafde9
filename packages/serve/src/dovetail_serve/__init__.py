"""The OpenAI API over any engine and tokenizer that meet the contracts of `dovetail_protocols`."""

from dovetail_serve.app import create_app
from dovetail_serve.errors import ApiError
from dovetail_serve.options import ServeOptions
from dovetail_serve.server import Server, serve

__all__ = ["ApiError", "ServeOptions", "Server", "create_app", "serve"]
