"""Every error that a caller of the stack can see, each once, with its HTTP status and its code.

Code raises from here and never builds a response; only ``llama_stack.server`` turns an error into HTTP, as one
RFC 9457 problem document with an OpenAI-shaped ``error`` member. Anything that is not a ``StackError`` is our own bug:
it is logged in full and answered 500 without its text. The tree::

    StackError
    ├── RequestError                       the caller must change the request
    │   ├── MalformedJsonError             400  the body is not JSON that we can carry
    │   │   └── NestingTooDeepError
    │   ├── UnauthenticatedError           401
    │   ├── ForbiddenError                 403
    │   │   └── CrossOriginError
    │   ├── NotFoundError                  404  no such resource
    │   │   ├── ModelNotFoundError
    │   │   ├── BlobNotFoundError
    │   │   └── RouteNotFoundError
    │   ├── MethodNotAllowedError          405
    │   ├── RequestTimeoutError            408
    │   ├── ConflictError                  409
    │   │   └── AlreadyExistsError
    │   ├── TooLargeError                  413
    │   ├── UnsupportedMediaError          415
    │   ├── MisdirectedError               421  the Host header is not one of ours
    │   ├── InvalidRequestError            422  well-formed, but not valid
    │   │   ├── ContextLengthError
    │   │   ├── UnreadableDocumentError
    │   │   └── UrlNotAllowedError
    │   ├── HeadersTooLargeError           431
    │   └── RateLimitedError               429
    ├── ServiceError                       the stack or something behind it cannot serve now
    │   ├── NotProvidedError               501  the provider lacks this operation
    │   ├── UpstreamError                  502
    │   ├── UnavailableError               503
    │   │   ├── OverloadedError
    │   │   ├── DrainingError
    │   │   ├── ProviderUnavailableError
    │   │   ├── EngineRestartedError
    │   │   ├── StoreBusyError
    │   │   ├── StoreUnavailableError
    │   │   └── StoreFailedError           until a restart
    │   ├── DeadlineExceededError          504
    │   ├── StorageFullError               507
    │   └── BlobCorruptError               500  what was stored is damaged
    └── SetupError                         the operator must change something before the stack starts
        ├── DistributionError              the YAML; carries every fault found
        ├── PluginError                    an installed plugin; names package, cause and remedy
        │   ├── PluginLoadError
        │   ├── NotInstalledError
        │   ├── DuplicateProviderError
        │   └── ContractMismatchError
        ├── ProviderStartError             a required provider did not start
        ├── CheckpointError                a model folder that cannot be loaded
        └── StoreError                     the store cannot be opened
            ├── StoreTooNewError
            ├── MigrationChangedError
            └── MigrationFailedError
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar


@dataclass(frozen=True, slots=True)
class FieldFault:
    """One thing wrong with one part of a request."""

    pointer: str
    """Where, as an RFC 6901 JSON pointer into the body, or ``?name`` for a query parameter."""
    code: str
    detail: str
    limit: float | None = None


class StackError(Exception):
    """Base of every error that reaches a caller. ``detail`` is written for that caller and may be shown to it."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    title: ClassVar[str] = "Internal error"
    kind: ClassVar[str] = "server_error"
    """OpenAI's ``error.type``."""

    def __init__(
        self,
        detail: str,
        *,
        param: str | None = None,
        faults: Sequence[FieldFault] = (),
        retry_after_seconds: int | None = None,
        extra: dict[str, Any] | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.param = param
        self.faults = tuple(faults)
        self.retry_after_seconds = retry_after_seconds
        self.extra = extra or {}
        """Members that this error adds to its problem document, such as ``existing_matches``."""
        self.request_id = request_id
        """The request that it answered, as the server's log names it; set on errors that came over HTTP."""

    @property
    def retriable(self) -> bool:
        """Whether the same request may succeed later."""
        return self.status in (408, 429, 502, 503, 504, 507)

    @staticmethod
    def revive(code: str, detail: str, **details: Any) -> StackError:
        """Rebuild the error that a server described, so that a client catches the class that the provider raised.

        An unknown code becomes a plain ``StackError`` that keeps the code and, given ``status=``, the status.
        """
        status = details.pop("status", 500)
        found = _by_code().get(code)
        unknown = {"status": status, "code": code, "title": code, "__module__": "unknown"}  # not one of ours, next time
        kind: type[StackError] = found or type("UnknownStackError", (StackError,), unknown)
        error = kind.__new__(kind)
        StackError.__init__(error, detail, **details)
        return error


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the known word closest to ``word``, or an empty string when none is close."""
    matches = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def listed(names: Iterable[str]) -> str:
    """The names sorted and joined by commas, or ``none``."""
    return ", ".join(sorted(names)) or "none"


class RequestError(StackError):
    """The caller must change the request before it can succeed."""

    status = 400
    code = "bad_request"
    title = "Bad request"
    kind = "invalid_request_error"


class MalformedJsonError(RequestError):
    """The body is not JSON, or is JSON that cannot be carried faithfully: NaN, lone surrogates, duplicate keys."""

    code = "malformed_json"
    title = "Malformed JSON"


class NestingTooDeepError(MalformedJsonError):
    """The body is nested deeper than the server reads."""

    code = "nesting_too_deep"
    title = "JSON nested too deep"


class UnauthenticatedError(RequestError):
    """No key, or one that is not known here."""

    status = 401
    code = "unauthenticated"
    title = "Not authenticated"
    kind = "authentication_error"


class ForbiddenError(RequestError):
    """The caller is known and may not do this, or a browser sent the request from another site."""

    status = 403
    code = "forbidden"
    title = "Forbidden"
    kind = "permission_error"


class CrossOriginError(ForbiddenError):
    """A browser sent the request on behalf of another site."""

    code = "cross_origin"
    title = "Foreign origin"


class NotFoundError(RequestError):
    """The request names a resource that does not exist here."""

    status = 404
    code = "not_found"
    title = "Resource not found"
    kind = "not_found_error"


class ModelNotFoundError(NotFoundError):
    """The request names a model that no provider of this distribution serves."""

    code = "model_not_found"
    title = "Model not found"

    def __init__(self, model: str, served: Iterable[str]) -> None:
        served = list(served)
        super().__init__(
            f"model {model!r} is not served here; served: {listed(served)}{nearest(model, served)}", param="model"
        )


class BlobNotFoundError(NotFoundError):
    """No blob of this digest is stored."""

    code = "blob_not_found"
    title = "Blob not found"

    def __init__(self) -> None:
        super().__init__("no blob of this digest is stored")


class RouteNotFoundError(NotFoundError):
    """No operation lives at this path."""

    code = "route_not_found"
    title = "No such route"


class MethodNotAllowedError(RequestError):
    """The path exists, but not with this method; ``allowed`` goes into the Allow header."""

    status = 405
    code = "method_not_allowed"
    title = "Method not allowed"

    def __init__(self, method: str, path: str, allowed: Iterable[str]) -> None:
        self.allowed = sorted(allowed)
        super().__init__(f"{method} is not allowed on {path}; allowed: {listed(self.allowed)}")


class RequestTimeoutError(RequestError):
    """The request did not arrive in the time that the server waits for one."""

    status = 408
    code = "request_timeout"
    title = "Request too slow"


class ConflictError(RequestError):
    """The request contradicts the state of the resource it names."""

    status = 409
    code = "conflict"
    title = "Conflict"
    kind = "conflict_error"


class AlreadyExistsError(ConflictError):
    """A resource of this id exists with other contents (spec rule G10: the same contents would have been a success)."""

    code = "already_exists"
    title = "Resource already exists"

    def __init__(self, what: str, resource: str, *, param: str) -> None:
        super().__init__(
            f"{what} {resource!r} exists with other contents; delete it first or choose another id",
            param=param,
            extra={"existing_matches": False},
        )


class TooLargeError(RequestError):
    """The body, or a list in it, is larger than the server takes."""

    status = 413
    code = "too_large"
    title = "Request too large"


class UnsupportedMediaError(RequestError):
    """The body has a content type or an encoding that the operation does not read."""

    status = 415
    code = "unsupported_media"
    title = "Unsupported media type"


class MisdirectedError(RequestError):
    """The Host header names a host that this server does not answer for."""

    status = 421
    code = "misdirected"
    title = "Misdirected request"


class InvalidRequestError(RequestError):
    """The request is well-formed and means nothing valid: schema, limits, combinations."""

    status = 422
    code = "validation"
    title = "Invalid request"


class ContextLengthError(InvalidRequestError):
    """The prompt does not fit the model's context; nothing was cut."""

    code = "context_length_exceeded"
    title = "Prompt too long"

    def __init__(self, prompt_tokens: int, context_tokens: int, *, pointer: str | None = None) -> None:
        detail = (
            f"the prompt has {prompt_tokens} tokens and the context holds {context_tokens}, one of them for the "
            f"answer; shorten the prompt by at least {prompt_tokens + 1 - context_tokens}"
        )
        super().__init__(
            detail,
            faults=() if pointer is None else [FieldFault(pointer, self.code, detail, context_tokens)],
            extra={"prompt_tokens": prompt_tokens, "context_tokens": context_tokens},
        )


class UrlNotAllowedError(InvalidRequestError):
    """A URL in the request points where the distribution does not allow the stack to read."""

    code = "url_not_allowed"
    title = "URL not allowed"


class UnreadableDocumentError(InvalidRequestError):
    """A document whose text cannot be had: its media type is not read here, or its bytes are not of it."""

    code = "document_unreadable"
    title = "Document cannot be read"


class RateLimitedError(RequestError):
    """This key has spent its rate; ``retry_after_seconds`` says when it has some again."""

    status = 429
    code = "rate_limited"
    title = "Too many requests"
    kind = "rate_limit_error"


class HeadersTooLargeError(RequestError):
    """The request's headers are larger than the server reads."""

    status = 431
    code = "headers_too_large"
    title = "Headers too large"


class ServiceError(StackError):
    """The request is fine; the stack, or something behind it, cannot serve it now."""


class NotProvidedError(ServiceError):
    """The provider that would serve this operation does not implement it."""

    status = 501
    code = "not_implemented"
    title = "Operation not provided"


class UpstreamError(ServiceError):
    """Something behind the stack (a remote provider, a URL) failed."""

    status = 502
    code = "upstream_error"
    title = "Upstream failed"


class UnavailableError(ServiceError):
    """The stack cannot take the request now; the same request may succeed later."""

    status = 503
    code = "not_ready"
    title = "Not ready"

    def __init__(self, detail: str, *, retry_after_seconds: int = 1, **details: Any) -> None:
        super().__init__(detail, retry_after_seconds=retry_after_seconds, **details)


class OverloadedError(UnavailableError):
    """A bounded queue is full."""

    code = "overloaded"
    title = "Overloaded"


class DrainingError(UnavailableError):
    """The server is shutting down and takes no new work."""

    code = "draining"
    title = "Shutting down"


class ProviderUnavailableError(UnavailableError):
    """The provider of this API did not start; the detail gives its reason, and it is being retried."""

    code = "provider_unavailable"
    title = "Provider unavailable"


class EngineRestartedError(UnavailableError):
    """The engine behind the request failed and restarts; the request may be sent again."""

    code = "engine_restarted"
    title = "Engine restarted"


class StoreBusyError(UnavailableError):
    """Other requests, or another process, held the store for longer than a request waits; nothing was applied."""

    code = "store_busy"
    title = "Store busy"


class StoreUnavailableError(UnavailableError):
    """The database cannot be reached, or broke off; a change that was being committed may be applied or not."""

    code = "store_unavailable"
    title = "Store unavailable"


class StoreFailedError(UnavailableError):
    """The store could not make a change durable, and takes no other until the process is restarted."""

    code = "store_failed"
    title = "Store failed"

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; no write is taken until the server is restarted", retry_after_seconds=30)


class DeadlineExceededError(ServiceError):
    """The request's deadline passed before the first byte of an answer."""

    status = 504
    code = "deadline_exceeded"
    title = "Deadline exceeded"


class StorageFullError(ServiceError):
    """The store has no room left; nothing of the request was applied."""

    status = 507
    code = "storage_full"
    title = "Storage full"


class BlobCorruptError(ServiceError):
    """The bytes of a stored blob are no longer those that were put."""

    code = "blob_corrupt"
    title = "Stored data damaged"

    def __init__(self, digest: str) -> None:
        super().__init__(f"blob {digest[:12]} is damaged on the disk; restore it from a backup, or put it again")


class SetupError(StackError):
    """The operator must change something before the stack can start."""

    code = "setup"
    title = "Setup error"


class DistributionError(SetupError):
    """The distribution is refused. ``problems`` holds each fault as one printable line."""

    code = "distribution_invalid"
    title = "Invalid distribution"

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class PluginError(SetupError):
    """An installed plugin cannot be used."""

    code = "plugin"
    title = "Plugin fault"


class PluginLoadError(PluginError):
    """A plugin that could not be loaded. It is reported, and stops a start only when the distribution uses it."""

    code = "plugin_load"
    title = "Plugin not loaded"

    def __init__(self, plugin: str, package: str, version: str, cause: str, remedy: str) -> None:
        self.plugin, self.package, self.version, self.cause, self.remedy = plugin, package, version, cause, remedy
        super().__init__(f"plugin {plugin!r} of {' '.join((package, version)).strip()}: {cause}; {remedy}")


class NotInstalledError(PluginError):
    """A name that no installed plugin declares, or none that can be loaded."""

    code = "not_installed"
    title = "Not installed"

    def __init__(self, what: str, remedy: str) -> None:
        self.what, self.remedy = what, remedy
        super().__init__(f"{what}; {remedy}")


class DuplicateProviderError(PluginError):
    """Two packages declare the same thing under the same name."""

    code = "duplicate_provider"
    title = "Declared twice"

    def __init__(self, what: str, first: str, second: str) -> None:
        super().__init__(f"{what} is declared by {first} and by {second}; uninstall one or deny it under 'plugins:'")


class ContractMismatchError(PluginError):
    """A provider does not keep the contract of its API; ``problems`` names each method and what is wrong with it."""

    code = "contract_mismatch"
    title = "Contract not kept"

    def __init__(self, provider: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"provider {provider!r} does not keep its contract: " + "; ".join(self.problems))


class ProviderStartError(SetupError):
    """A provider that the distribution requires did not start."""

    code = "provider_start"
    title = "Provider did not start"


class CheckpointError(SetupError):
    """A checkpoint is refused; the detail says what was found, what is missing and where."""

    status = 422
    code = "checkpoint_invalid"
    title = "Invalid checkpoint"
    kind = "invalid_request_error"


class StoreError(SetupError):
    """The store cannot be opened or is not ours."""

    code = "store"
    title = "Store cannot be used"


class StoreTooNewError(StoreError):
    """A newer version wrote the store; it was not touched."""

    code = "store_too_new"
    title = "Store too new"

    def __init__(self, owner: str, *, found: int, known: int) -> None:
        self.owner = owner
        self.found = found
        self.known = known
        super().__init__(
            f"the store's tables of {owner!r} are at migration {found} and this version knows {known}; "
            "nothing was changed. Install the version that wrote them, or name another store"
        )


class MigrationChangedError(StoreError):
    """A migration that the store has applied reads differently in the installed version; nothing was changed."""

    code = "migration_changed"
    title = "Migration changed"

    def __init__(self, owner: str, number: int, description: str) -> None:
        super().__init__(
            f"migration {number} of {owner!r} ({description}) was edited after this store applied it; "
            "nothing was changed. Put it back as it was released, and make the change a new migration"
        )


class MigrationFailedError(StoreError):
    """A migration could not be applied; none of it was, and those before it stay."""

    code = "migration_failed"
    title = "Migration failed"

    def __init__(self, owner: str, number: int, description: str, cause: str) -> None:
        super().__init__(f"migration {number} of {owner!r} ({description}) failed and was undone: {cause}")


def _by_code() -> dict[str, type[StackError]]:
    found: dict[str, type[StackError]] = {}
    pending: list[type[StackError]] = [StackError]
    while pending:
        error = pending.pop()
        if error.__module__ == __name__:
            found.setdefault(error.code, error)
        pending.extend(error.__subclasses__())
    return found
