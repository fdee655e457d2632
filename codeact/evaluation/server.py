"""Generation by a server that speaks OpenAI's HTTP API: vLLM, SGLang, llama.cpp, ``transformers serve`` and others."""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import random
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from codeact.base.console import is_text, say, visible
from codeact.base.errors import InputError
from codeact.base.parsing import parse_json
from codeact.evaluation.generate import Completion, Request, first_stop
from codeact.evaluation.settings import GenerationSettings

_SECONDS = 600.0  # that a server may be silent: it answers when the whole text is there
_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # before another try
_LONGEST_WAIT = 60.0  # whatever a server asks for
_PASSING = {408, 409, 425, 429, 500, 502, 503, 504}
_MOST_BYTES = 1 << 26
_STOPS = 4  # that OpenAI's API takes; the text is cut at all of them here


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Another address would be sent the key too."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


class Server:
    """An OpenAI-compatible server.

    Proxies that the environment names are used, but never for this machine itself. The key is that of the variable
    CODEACT_API_KEY; those for other services stay here.

    Args:
        url: of its API, such as ``http://localhost:8000/v1``; without a path ``/v1`` is meant.

    Raises:
        InputError: that is no such address.
    """

    def __init__(self, url: str) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            known = parts.scheme in ("http", "https") and parts.port != 0 and not (parts.query or parts.fragment)
        except ValueError:
            known = False
        if not known or not parts.hostname:
            raise InputError(f"--server {url} is no address of a server; give one such as http://localhost:8000/v1")
        if parts.username is not None or parts.password is not None:
            raise InputError(
                "--server holds a name or password; leave it out, and set CODEACT_API_KEY to the server's key"
            )
        self.url = urllib.parse.urlunsplit(parts._replace(path=parts.path.rstrip("/") or "/v1"))
        self._key = os.environ.get("CODEACT_API_KEY", "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise InputError("CODEACT_API_KEY holds what no header can; set it to the server's key")
        direct = [urllib.request.ProxyHandler({})] if _is_here(parts.hostname) else []
        self._opener = urllib.request.build_opener(_NoRedirects(), *direct)
        self.ended = threading.Event()
        """Set: nothing is tried again."""

    def names(self) -> list[str]:
        """Names of the models that it lists; none where it has no such list.

        Raises:
            InputError: it is not there, or refuses the key.
        """
        try:
            answer = self._once("models", None, 30.0)
            return [str(model["id"]) for model in answer["data"]]
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise self._refused(error) from None
            return []
        except (OSError, http.client.HTTPException) as error:
            raise InputError(f"no server answers at {self.url}: {_reason(error)}; start it, or mend --server") from None
        except (ValueError, KeyError, TypeError):
            return []

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Post a request, again while the server is busy or not to be reached; returns its answer.

        Raises:
            InputError: it refused, or did not answer the last try either.
        """
        for wait in (*_WAITS, None):
            try:
                return self._once(path, body, _SECONDS)
            except urllib.error.HTTPError as error:
                if error.code not in _PASSING or wait is None:
                    raise self._refused(error) from None
                asked = error.headers.get("Retry-After", "")
                wait = max(wait, min(float(asked), _LONGEST_WAIT)) if asked.isdecimal() else wait  # noqa: PLW2901
            except (OSError, http.client.HTTPException) as error:
                if wait is None:
                    raise InputError(
                        f"no answer from {self.url}: {_reason(error)}; the same command goes on where it was"
                    ) from None
            except ValueError as error:
                raise InputError(f"{self.url}/{path} answered no JSON ({error}); is it an OpenAI API?") from None
            if self.ended.wait(wait * random.uniform(1.0, 1.25)):  # not all that wait at the same moment
                break
        raise InputError(f"{self.url} was no longer asked")

    def _once(self, path: str, body: dict[str, Any] | None, seconds: float) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "User-Agent": "codeact"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        with self._opener.open(request, timeout=seconds) as answer:
            content = answer.read(_MOST_BYTES + 1)
            if len(content) > _MOST_BYTES:
                raise ValueError(f"more than {_MOST_BYTES:,} bytes")
            if answer.length:  # what is missing; a read of so many bytes does not say so
                raise http.client.IncompleteRead(content, answer.length)
        value = parse_json(content)
        if not isinstance(value, dict):
            raise ValueError("no object")
        return value

    def _refused(self, error: urllib.error.HTTPError) -> InputError:
        with error:
            told = error.read(2000).decode(errors="replace")
        if error.code in (401, 403):
            remedy = "set CODEACT_API_KEY to the server's key"
        elif error.code in _PASSING:
            remedy = "the same command goes on where it was"
        elif 300 <= error.code < 400:
            remedy = f"it points to {error.headers.get('Location')}: give that as --server"
        else:
            remedy = "mend what it names"
        return InputError(f"{self.url} answers {error.code} {' '.join(visible(told).split())[:300]}; {remedy}")


class ServerGenerator:
    """Asks a server for every answer: in a chat, whose template it writes, or to go on with a text.

    Args:
        server: which.
        model: its name there; None: the only one that the server lists.
        parallel: requests at a time.

    Raises:
        InputError: the server is not there, or lists no model or several and no name is given.
    """

    apart = True
    tokenizer = None

    def __init__(self, server: Server, model: str | None, parallel: int) -> None:
        names = server.names()
        if model is None and len(names) != 1:
            listed = ", ".join(names[:10]) or "no model"
            raise InputError(f"{server.url} lists {listed}; say which by --model")
        self.model = model or names[0]
        if names and self.model not in names:
            say(f"{server.url} lists {', '.join(names[:10])}, and is asked for {self.model}")
        self._server, self._parallel = server, parallel
        # Not the address: a server may come back under another one.
        self.identity = {"model": self.model, "backend": "server"}

    def batch_size(self, longest: int) -> int:
        """No bound: the server decides which answers are computed together."""
        return 1 << 16

    def complete(
        self, requests: Sequence[Request], ends: set[int], settings: GenerationSettings
    ) -> Iterator[tuple[Request, Completion]]:
        """See ``codeact.evaluation.generate.Generator``.

        Raises:
            InputError: a request was refused, or not answered in spite of several tries.
        """
        waiting: SimpleQueue[Request] = SimpleQueue()
        answers: SimpleQueue[tuple[Request, Completion | Exception]] = SimpleQueue()
        for request in requests:
            waiting.put(request)
        for _ in range(min(self._parallel, len(requests))):
            # Daemons: a stopped command does not wait for texts that nobody will read.
            threading.Thread(target=self._work, args=(waiting, answers, settings), daemon=True).start()
        try:
            for _ in requests:
                request, answer = answers.get()
                if isinstance(answer, Exception):
                    raise answer
                yield request, answer
        except BaseException:
            self._server.ended.set()
            raise

    def _work(
        self,
        waiting: SimpleQueue[Request],
        answers: SimpleQueue[tuple[Request, Completion | Exception]],
        settings: GenerationSettings,
    ) -> None:
        with suppress(Empty):
            while not self._server.ended.is_set():
                request = waiting.get_nowait()
                try:
                    answers.put((request, self._answer(request, settings)))
                except Exception as error:  # it is raised where the answers are read
                    answers.put((request, error))
                    return

    def _answer(self, request: Request, settings: GenerationSettings) -> Completion:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
        }
        if settings.temperature:
            body["seed"] = request.seed(settings.seed) % (1 << 31)  # what all servers can hold
        if stops := request.prompt.stops[:_STOPS]:
            body["stop"] = list(stops)
        if settings.instruct:
            path, body["messages"] = "chat/completions", [{"role": "user", "content": request.prompt.text}]
        else:
            path, body["prompt"] = "completions", request.prompt.text
        answer = self._server.ask(path, body)
        try:
            choice = answer["choices"][0]
            text = (choice["message"]["content"] if settings.instruct else choice["text"]) or ""
            tokens = int((answer.get("usage") or {}).get("completion_tokens") or 0)
            if not isinstance(text, str):
                raise TypeError
        except (KeyError, IndexError, TypeError, ValueError, AttributeError):
            raise InputError(f"{self._server.url}/{path} gave no answer of OpenAI's form; mend --server") from None
        text = text if is_text(text) else text.encode(errors="replace").decode()
        cut = first_stop(text, request.prompt.stops)
        finish = "stop" if cut is not None else "length" if choice.get("finish_reason") == "length" else "end"
        return Completion(text=text[:cut], finish=finish, tokens=tokens)


def _is_here(host: str) -> bool:
    """Whether a host is this machine itself."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)
    return str(getattr(cause, "strerror", None) or cause or type(error).__name__)
