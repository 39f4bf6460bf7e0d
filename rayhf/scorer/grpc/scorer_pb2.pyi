from rayhf.service import chat_pb2 as _chat_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]

class Source(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SOURCE_UNSPECIFIED: _ClassVar[Source]
    SOURCE_PAIRWISE: _ClassVar[Source]
    SOURCE_POINTWISE: _ClassVar[Source]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason
SOURCE_UNSPECIFIED: Source
SOURCE_PAIRWISE: Source
SOURCE_POINTWISE: Source

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("version", "names", "pairwise")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    PAIRWISE_FIELD_NUMBER: _ClassVar[int]
    version: str
    names: _containers.RepeatedScalarFieldContainer[str]
    pairwise: bool
    def __init__(self, version: _Optional[str] = ..., names: _Optional[_Iterable[str]] = ..., pairwise: _Optional[bool] = ...) -> None: ...

class ScoreRequests(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[ScoreRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[ScoreRequest, _Mapping]]] = ...) -> None: ...

class ScoreRequest(_message.Message):
    __slots__ = ("prompt", "completions")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    COMPLETIONS_FIELD_NUMBER: _ClassVar[int]
    prompt: Prompt
    completions: _containers.RepeatedCompositeFieldContainer[Completion]
    def __init__(self, prompt: _Optional[_Union[Prompt, _Mapping]] = ..., completions: _Optional[_Iterable[_Union[Completion, _Mapping]]] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("prompt_id", "messages", "answer", "row", "source")
    PROMPT_ID_FIELD_NUMBER: _ClassVar[int]
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    ANSWER_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    prompt_id: str
    messages: _containers.RepeatedCompositeFieldContainer[_chat_pb2.Message]
    answer: str
    row: str
    source: str
    def __init__(self, prompt_id: _Optional[str] = ..., messages: _Optional[_Iterable[_Union[_chat_pb2.Message, _Mapping]]] = ..., answer: _Optional[str] = ..., row: _Optional[str] = ..., source: _Optional[str] = ...) -> None: ...

class Completion(_message.Message):
    __slots__ = ("text", "finish_reason", "thinking")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    THINKING_FIELD_NUMBER: _ClassVar[int]
    text: str
    finish_reason: FinishReason
    thinking: str
    def __init__(self, text: _Optional[str] = ..., finish_reason: _Optional[_Union[FinishReason, str]] = ..., thinking: _Optional[str] = ...) -> None: ...

class ScoreReply(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[Outcomes]
    def __init__(self, results: _Optional[_Iterable[_Union[Outcomes, _Mapping]]] = ...) -> None: ...

class Outcomes(_message.Message):
    __slots__ = ("outcomes",)
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    outcomes: _containers.RepeatedCompositeFieldContainer[Outcome]
    def __init__(self, outcomes: _Optional[_Iterable[_Union[Outcome, _Mapping]]] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("scored", "invalid", "failed", "skipped")
    SCORED_FIELD_NUMBER: _ClassVar[int]
    INVALID_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    scored: Scored
    invalid: Invalid
    failed: Failed
    skipped: Skipped
    def __init__(self, scored: _Optional[_Union[Scored, _Mapping]] = ..., invalid: _Optional[_Union[Invalid, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ..., skipped: _Optional[_Union[Skipped, _Mapping]] = ...) -> None: ...

class Skipped(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Scored(_message.Message):
    __slots__ = ("value", "parts", "replies")
    class PartsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    VALUE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    REPLIES_FIELD_NUMBER: _ClassVar[int]
    value: float
    parts: _containers.ScalarMap[str, float]
    replies: _containers.RepeatedCompositeFieldContainer[JudgeReply]
    def __init__(self, value: _Optional[float] = ..., parts: _Optional[_Mapping[str, float]] = ..., replies: _Optional[_Iterable[_Union[JudgeReply, _Mapping]]] = ...) -> None: ...

class JudgeReply(_message.Message):
    __slots__ = ("text", "part", "against", "left_out")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    AGAINST_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    text: str
    part: str
    against: int
    left_out: bool
    def __init__(self, text: _Optional[str] = ..., part: _Optional[str] = ..., against: _Optional[int] = ..., left_out: _Optional[bool] = ...) -> None: ...

class Invalid(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Failed(_message.Message):
    __slots__ = ("reason", "transient")
    REASON_FIELD_NUMBER: _ClassVar[int]
    TRANSIENT_FIELD_NUMBER: _ClassVar[int]
    reason: str
    transient: bool
    def __init__(self, reason: _Optional[str] = ..., transient: _Optional[bool] = ...) -> None: ...

class CompareReply(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[Comparison]
    def __init__(self, results: _Optional[_Iterable[_Union[Comparison, _Mapping]]] = ...) -> None: ...

class Comparison(_message.Message):
    __slots__ = ("compared", "invalid", "failed")
    COMPARED_FIELD_NUMBER: _ClassVar[int]
    INVALID_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    compared: Compared
    invalid: Invalid
    failed: Failed
    def __init__(self, compared: _Optional[_Union[Compared, _Mapping]] = ..., invalid: _Optional[_Union[Invalid, _Mapping]] = ..., failed: _Optional[_Union[Failed, _Mapping]] = ...) -> None: ...

class Compared(_message.Message):
    __slots__ = ("win", "source", "replies")
    WIN_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    REPLIES_FIELD_NUMBER: _ClassVar[int]
    win: _containers.RepeatedScalarFieldContainer[float]
    source: Source
    replies: _containers.RepeatedCompositeFieldContainer[JudgeReplies]
    def __init__(self, win: _Optional[_Iterable[float]] = ..., source: _Optional[_Union[Source, str]] = ..., replies: _Optional[_Iterable[_Union[JudgeReplies, _Mapping]]] = ...) -> None: ...

class JudgeReplies(_message.Message):
    __slots__ = ("replies",)
    REPLIES_FIELD_NUMBER: _ClassVar[int]
    replies: _containers.RepeatedCompositeFieldContainer[JudgeReply]
    def __init__(self, replies: _Optional[_Iterable[_Union[JudgeReply, _Mapping]]] = ...) -> None: ...
