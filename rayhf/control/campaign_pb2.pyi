from rayhf.service import chat_pb2 as _chat_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("run", "state", "reason", "advice", "holder", "epoch", "algorithm", "takes_labels", "iteration", "iterations", "phase", "progress_age_s", "eta_s", "versions", "commit", "health", "faults", "fault_count", "models", "takes_thumbs")
    class VersionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class HealthEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class ModelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RUN_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ADVICE_FIELD_NUMBER: _ClassVar[int]
    HOLDER_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ALGORITHM_FIELD_NUMBER: _ClassVar[int]
    TAKES_LABELS_FIELD_NUMBER: _ClassVar[int]
    ITERATION_FIELD_NUMBER: _ClassVar[int]
    ITERATIONS_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_AGE_S_FIELD_NUMBER: _ClassVar[int]
    ETA_S_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    COMMIT_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    FAULT_COUNT_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    TAKES_THUMBS_FIELD_NUMBER: _ClassVar[int]
    run: str
    state: str
    reason: str
    advice: str
    holder: str
    epoch: int
    algorithm: str
    takes_labels: bool
    iteration: int
    iterations: int
    phase: str
    progress_age_s: float
    eta_s: float
    versions: _containers.ScalarMap[str, float]
    commit: str
    health: _containers.ScalarMap[str, float]
    faults: _containers.RepeatedScalarFieldContainer[str]
    fault_count: int
    models: _containers.ScalarMap[str, str]
    takes_thumbs: bool
    def __init__(self, run: _Optional[str] = ..., state: _Optional[str] = ..., reason: _Optional[str] = ..., advice: _Optional[str] = ..., holder: _Optional[str] = ..., epoch: _Optional[int] = ..., algorithm: _Optional[str] = ..., takes_labels: _Optional[bool] = ..., iteration: _Optional[int] = ..., iterations: _Optional[int] = ..., phase: _Optional[str] = ..., progress_age_s: _Optional[float] = ..., eta_s: _Optional[float] = ..., versions: _Optional[_Mapping[str, float]] = ..., commit: _Optional[str] = ..., health: _Optional[_Mapping[str, float]] = ..., faults: _Optional[_Iterable[str]] = ..., fault_count: _Optional[int] = ..., models: _Optional[_Mapping[str, str]] = ..., takes_thumbs: _Optional[bool] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Event(_message.Message):
    __slots__ = ("time", "epoch", "kind", "message")
    TIME_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    time: str
    epoch: int
    kind: str
    message: str
    def __init__(self, time: _Optional[str] = ..., epoch: _Optional[int] = ..., kind: _Optional[str] = ..., message: _Optional[str] = ...) -> None: ...

class PauseRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UnpauseRequest(_message.Message):
    __slots__ = ("from_healthy",)
    FROM_HEALTHY_FIELD_NUMBER: _ClassVar[int]
    from_healthy: bool
    def __init__(self, from_healthy: _Optional[bool] = ...) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Done(_message.Message):
    __slots__ = ("message",)
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    message: str
    def __init__(self, message: _Optional[str] = ...) -> None: ...

class AddPromptsRequest(_message.Message):
    __slots__ = ("prompts", "source")
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    prompts: _containers.RepeatedCompositeFieldContainer[NewPrompt]
    source: str
    def __init__(self, prompts: _Optional[_Iterable[_Union[NewPrompt, _Mapping]]] = ..., source: _Optional[str] = ...) -> None: ...

class NewPrompt(_message.Message):
    __slots__ = ("messages", "answer")
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[_chat_pb2.Message]
    answer: str
    def __init__(self, messages: _Optional[_Iterable[_Union[_chat_pb2.Message, _Mapping]]] = ..., answer: _Optional[str] = ...) -> None: ...

class PairsRequest(_message.Message):
    __slots__ = ("count",)
    COUNT_FIELD_NUMBER: _ClassVar[int]
    count: int
    def __init__(self, count: _Optional[int] = ...) -> None: ...

class PairsReply(_message.Message):
    __slots__ = ("pairs",)
    PAIRS_FIELD_NUMBER: _ClassVar[int]
    pairs: _containers.RepeatedCompositeFieldContainer[Pair]
    def __init__(self, pairs: _Optional[_Iterable[_Union[Pair, _Mapping]]] = ...) -> None: ...

class Pair(_message.Message):
    __slots__ = ("pair_id", "messages", "first", "second", "certainty")
    PAIR_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    SECOND_FIELD_NUMBER: _ClassVar[int]
    CERTAINTY_FIELD_NUMBER: _ClassVar[int]
    pair_id: str
    messages: _containers.RepeatedCompositeFieldContainer[_chat_pb2.Message]
    first: str
    second: str
    certainty: float
    def __init__(self, pair_id: _Optional[str] = ..., messages: _Optional[_Iterable[_Union[_chat_pb2.Message, _Mapping]]] = ..., first: _Optional[str] = ..., second: _Optional[str] = ..., certainty: _Optional[float] = ...) -> None: ...

class CompletionsRequest(_message.Message):
    __slots__ = ("count",)
    COUNT_FIELD_NUMBER: _ClassVar[int]
    count: int
    def __init__(self, count: _Optional[int] = ...) -> None: ...

class CompletionsReply(_message.Message):
    __slots__ = ("completions",)
    COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    completions: _containers.RepeatedCompositeFieldContainer[SingleCompletion]
    def __init__(self, completions: _Optional[_Iterable[_Union[SingleCompletion, _Mapping]]] = ...) -> None: ...

class SingleCompletion(_message.Message):
    __slots__ = ("completion_id", "messages", "completion", "certainty")
    COMPLETION_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_FIELD_NUMBER: _ClassVar[int]
    CERTAINTY_FIELD_NUMBER: _ClassVar[int]
    completion_id: str
    messages: _containers.RepeatedCompositeFieldContainer[_chat_pb2.Message]
    completion: str
    certainty: float
    def __init__(self, completion_id: _Optional[str] = ..., messages: _Optional[_Iterable[_Union[_chat_pb2.Message, _Mapping]]] = ..., completion: _Optional[str] = ..., certainty: _Optional[float] = ...) -> None: ...

class LabelRequest(_message.Message):
    __slots__ = ("labels", "source")
    LABELS_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    labels: _containers.RepeatedCompositeFieldContainer[CompletionLabel]
    source: str
    def __init__(self, labels: _Optional[_Iterable[_Union[CompletionLabel, _Mapping]]] = ..., source: _Optional[str] = ...) -> None: ...

class CompletionLabel(_message.Message):
    __slots__ = ("pair_id", "verdict", "completion_id")
    PAIR_ID_FIELD_NUMBER: _ClassVar[int]
    VERDICT_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_ID_FIELD_NUMBER: _ClassVar[int]
    pair_id: str
    verdict: str
    completion_id: str
    def __init__(self, pair_id: _Optional[str] = ..., verdict: _Optional[str] = ..., completion_id: _Optional[str] = ...) -> None: ...
