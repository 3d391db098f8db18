"""The errors of steer-vllm, as one small tree.

    SteerError
    ├── UserError                 the caller did something wrong (4xx)
    │   ├── InvalidIntervention   400  a field of the request is malformed or contradicts another
    │   ├── ScaleOutOfRange       400  a scale is not finite, above the limit, or overflows the model's dtype
    │   ├── TooManyInterventions  400  more components, segments or rank than configured
    │   ├── Unsupported           400  a request feature that would drop or blur the intervention
    │   ├── InvalidKey            401  no key or the wrong one
    │   ├── AdminRequired         403  the key may not do this
    │   ├── ModelNotFound         404  no such model, alias or intervention
    │   ├── ArtifactExists        409  the name is taken
    │   ├── BodyTooLarge          413  the request's body is above the limit
    │   └── ArtifactInvalid       422  the artifact is damaged or does not fit the base model
    ├── ServerError               the server cannot do it now (5xx)
    │   ├── NoRows                503  every table row is in use
    │   ├── EngineUnavailable     503  the engine does not answer
    │   └── HostMemoryFull        507  what is loaded takes all the memory that is meant for it
    ├── StartupRefused            the engine is not as the plugin needs it: nothing is served
    └── BenchmarkInvalid          a benchmark could not be run, or did not measure what it says

Every message says what was given, what was expected and where. Knows nothing of HTTP but the status numbers.
"""

from __future__ import annotations

from typing import ClassVar


class SteerError(Exception):
    """Base of all errors raised on purpose by steer-vllm."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class UserError(SteerError):
    """The caller gave something that cannot be honoured."""

    status = 400
    code = "invalid_request"


class InvalidIntervention(UserError):
    """A malformed or contradictory intervention in a request."""

    code = "invalid_intervention"


class ScaleOutOfRange(UserError):
    """A scale that is not finite, beyond the limit, or that overflows the model's dtype."""

    code = "scale_out_of_range"


class TooManyInterventions(UserError):
    """More components, segments or rank on one request than configured."""

    code = "too_many_interventions"


class Unsupported(UserError):
    """A feature that cannot be combined with an intervention exactly."""

    code = "unsupported_with_intervention"


class InvalidKey(UserError):
    """A missing or wrong API key."""

    status = 401
    code = "invalid_api_key"


class AdminRequired(UserError):
    """The operation needs the admin key."""

    status = 403
    code = "admin_required"


class ModelNotFound(UserError):
    """No model, alias or intervention of that name."""

    status = 404
    code = "model_not_found"


class ArtifactExists(UserError):
    """The name already points to another artifact."""

    status = 409
    code = "artifact_exists"


class BodyTooLarge(UserError):
    """The request body is above the configured limit."""

    status = 413
    code = "body_too_large"


class ArtifactInvalid(UserError):
    """A damaged artifact, or one that does not fit the base model."""

    status = 422
    code = "artifact_invalid"


class ServerError(SteerError):
    """The request is fine, the server cannot serve it now."""

    status = 503
    code = "overloaded"


class NoRows(ServerError):
    """Every row of a slot table is held by a request in flight."""

    code = "no_rows"


class EngineUnavailable(ServerError):
    """The engine did not answer, or answered that it failed."""

    code = "engine_unavailable"


class HostMemoryFull(ServerError):
    """No memory is left for another artifact, of what the configuration allows."""

    status = 507
    code = "host_memory_full"


class StartupRefused(SteerError):
    """vLLM, the model or a setting is not as the plugin needs it."""

    code = "startup_refused"


class BenchmarkInvalid(SteerError):
    """An engine under measurement failed, was disturbed, or did something else than its mode says."""

    code = "benchmark_invalid"


def by_code(code: str, message: str) -> SteerError:
    """The error of that code, for a message that crossed a process boundary.

    Errors: `EngineUnavailable` for a code that is not in the tree.
    """
    pending: list[type[SteerError]] = [SteerError]
    while pending:
        kind = pending.pop()
        if kind.code == code:
            return kind(message)
        pending.extend(kind.__subclasses__())
    return EngineUnavailable(message)
