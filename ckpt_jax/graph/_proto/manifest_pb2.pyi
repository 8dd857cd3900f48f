from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Manifest(_message.Message):
    __slots__ = ("format_version", "parts", "checksum")
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    format_version: int
    parts: _containers.RepeatedCompositeFieldContainer[Part]
    checksum: int
    def __init__(self, format_version: _Optional[int] = ..., parts: _Optional[_Iterable[_Union[Part, _Mapping]]] = ..., checksum: _Optional[int] = ...) -> None: ...

class Part(_message.Message):
    __slots__ = ("name", "file", "nbytes", "digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    file: str
    nbytes: int
    digest: bytes
    def __init__(self, name: _Optional[str] = ..., file: _Optional[str] = ..., nbytes: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...
