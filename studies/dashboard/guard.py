"""A guard around a web application on this machine: who may ask, for what, and what goes out."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, urlencode

__all__ = ["Guard"]

Environ = dict[str, Any]
Application = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]

READING = ("GET", "HEAD", "OPTIONS")

_HEADERS = [
    ("Referrer-Policy", "no-referrer"),  # the address of the first page holds the token
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
]


class Guard:
    """A WSGI application that lets only its owner's browser through.

    A request needs a ``Host`` of this server (else 421: a page of another site that was pointed
    here by its own name); the token, once in the address and then in a cookie (else 401); a method
    that reads, or, where writing is allowed, an ``Origin`` of this server (else 403).  Answers
    carry no ``Access-Control-Allow-Origin``, and artifacts no right to run scripts.

    Args:
        application: what is guarded.
        token: the secret.
        port: of the server.
        write: whether requests may change something.
    """

    def __init__(self, application: Application, token: str, port: int, write: bool) -> None:
        self._application, self._token, self._write = application, token, write
        self._hosts = {f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")}
        self._cookie = f"bilevel-{port}"  # cookies do not tell the ports of a host apart

    def __call__(self, environ: Environ, start: Callable[..., Any]) -> Iterable[bytes]:
        """Answer a request; see `Guard`."""
        if environ.get("HTTP_HOST", "").lower() not in self._hosts:
            return _refuse(start, "421 Misdirected Request", "This server has another name.")
        given = dict(parse_qsl(environ.get("QUERY_STRING", "")))
        if "token" in given and self._is_token(given["token"]):
            return self._admit(environ, start, given)
        if not self._is_token(self._from_cookie(environ)):
            return _refuse(
                start, "401 Unauthorized", "Open the address that the command line printed."
            )
        if (method := environ["REQUEST_METHOD"]) not in READING:
            if not self._write:
                return _refuse(start, "403 Forbidden", f"{method}: the dashboard only reads.")
            origin = environ.get("HTTP_ORIGIN", "")
            if origin.lower() not in {f"http://{host}" for host in self._hosts}:
                return _refuse(start, "403 Forbidden", f"{method} from another site.")
        return self._application(environ, self._filtered(environ, start))

    def _is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self._token.encode())

    def _from_cookie(self, environ: Environ) -> str:
        try:
            morsel = SimpleCookie(environ.get("HTTP_COOKIE", "")).get(self._cookie)
        except CookieError:
            return ""
        return "" if morsel is None else morsel.value

    def _admit(
        self, environ: Environ, start: Callable[..., Any], given: dict[str, str]
    ) -> Iterable[bytes]:
        """Take the token out of the address and into a cookie."""
        del given["token"]
        query = f"?{urlencode(given)}" if given else ""
        cookie = f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Lax"
        path = "/" + environ.get("PATH_INFO", "/").lstrip("/\\")  # never another host
        headers = [("Location", path + query), ("Set-Cookie", cookie), ("Content-Length", "0")]
        start("303 See Other", [*headers, *_HEADERS])
        return [b""]

    def _filtered(self, environ: Environ, start: Callable[..., Any]) -> Callable[..., Any]:
        def filtered(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            kept = [
                (name, value)
                for name, value in headers
                if not name.lower().startswith("access-control-")
            ]
            kept += _HEADERS
            if environ.get("PATH_INFO", "").startswith("/artifacts/"):
                kept.append(("Content-Security-Policy", "sandbox"))
            return start(status, kept, *rest)

        return filtered


def _refuse(start: Callable[..., Any], status: str, reason: str) -> Iterable[bytes]:
    body = f"{reason}\n".encode()
    headers = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))]
    start(status, [*headers, *_HEADERS])
    return [body]
