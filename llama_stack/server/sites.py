"""Which hosts this server answers for, and which sites' pages may call it.

A browser carries out requests for any page that is open in it, so that being on loopback proves nothing: a page of
another site may post to it, or may have made its own name point here (DNS rebinding). Both are told by headers that a
page cannot choose: ``Host``, ``Origin`` and ``Sec-Fetch-Site``.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from ..errors import CrossOriginError, MisdirectedError
from .errors import Headers
from .exchange import Exchange

ANY_HOST = "*"
"""Written under ``server.allowed_hosts``: answer for every name, because something in front checks it."""

_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_HOST = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[a-z0-9_](?:[a-z0-9_.-]{0,252}[a-z0-9_])?)(:[0-9]{1,5})?")
_METHODS = b"GET, POST, DELETE"
_REQUEST_HEADERS = b"authorization, content-type, idempotency-key, x-deadline-ms, x-request-id"
_REPLY_HEADERS = b"x-request-id, retry-after"
_PREFLIGHT_SECONDS = b"600"


class Sites:
    """The hosts and origins of one server."""

    def __init__(self, host: str, allowed_hosts: Iterable[str], allowed_origins: Iterable[str]) -> None:
        names = {*_LOOPBACK, bracketed(host), *(bracketed(name) for name in allowed_hosts)}
        self._any_host = ANY_HOST in names
        self._hosts = frozenset(name.lower() for name in names)
        self._origins = frozenset(origin.lower().encode() for origin in allowed_origins)

    def check(self, exchange: Exchange) -> None:
        """Refuse a request for another host, or from a page of another site.

        Raises ``MisdirectedError`` or ``CrossOriginError``. Lets a page of an allowed origin read the answer.
        """
        host = exchange.headers.get(b"host")
        if not (self._any_host or self._is_ours(host, exchange)):
            raise MisdirectedError(
                "this server does not answer for the host that the request names; "
                "the operator lists its names under server.allowed_hosts"
            )
        origin = exchange.headers.get(b"origin")
        if origin is None:
            if exchange.headers.get(b"sec-fetch-site") == b"cross-site":
                raise CrossOriginError("the request comes from a page of another site")
        elif origin.lower() in self._origins:
            exchange.standard_headers += [
                (b"access-control-allow-origin", origin),
                (b"access-control-expose-headers", _REPLY_HEADERS),
                (b"vary", b"origin"),
            ]
        elif host is None or origin.lower().partition(b"://")[2] != host.lower():
            raise CrossOriginError(
                "the request comes from a page of another site; the operator lists those that may call this server "
                "under server.allowed_origins"
            )

    def preflight(self, exchange: Exchange) -> Headers | None:
        """The answer to a browser that asks before it sends (Fetch standard, CORS-preflight), or ``None``."""
        if exchange.method != "OPTIONS" or b"access-control-request-method" not in exchange.headers:
            return None
        return [
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-allow-headers", _REQUEST_HEADERS),
            (b"access-control-max-age", _PREFLIGHT_SECONDS),
        ]

    def _is_ours(self, host: bytes | None, exchange: Exchange) -> bool:
        if host is None:  # only HTTP/1.0 may leave it out, and no browser speaks that
            return bool(exchange.scope["http_version"] == "1.0")
        text = host.decode("latin-1").lower()
        if text in self._hosts:
            return True
        found = _HOST.fullmatch(text)
        return found is not None and found[1] in self._hosts


def bracketed(host: str) -> str:
    """The host as it stands in a URL: an IPv6 address in brackets."""
    try:
        return f"[{ipaddress.IPv6Address(host)}]"
    except ValueError:
        return host
