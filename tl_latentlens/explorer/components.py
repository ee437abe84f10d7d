"""What the explore page uses of Dash and its server; where they are missing, an error names the extra that has them."""

from tl_latentlens.views.optional import missing_extra

try:
    from dash import ALL, ClientsideFunction, Dash, Input, Output, State, ctx, dcc, html, no_update, set_props
    from flask import abort, request
    from werkzeug.serving import make_server
except ImportError as error:
    raise missing_extra("the explore page needs dash", "explore") from error

__all__ = [
    "ALL", "ClientsideFunction", "Dash", "Input", "Output", "State", "abort", "ctx", "dcc", "html", "make_server", "no_update",
    "request", "set_props",
]  # fmt: skip
