from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Index(_message.Message):
    __slots__ = ("format_version", "shards", "layouts", "keys", "key", "layout", "shard", "stack", "row", "offset", "checksum")
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    LAYOUTS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    STACK_FIELD_NUMBER: _ClassVar[int]
    ROW_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    format_version: int
    shards: _containers.RepeatedCompositeFieldContainer[Shard]
    layouts: _containers.RepeatedCompositeFieldContainer[Layout]
    keys: _containers.RepeatedScalarFieldContainer[str]
    key: bytes
    layout: bytes
    shard: bytes
    stack: bytes
    row: bytes
    offset: bytes
    checksum: int
    def __init__(self, format_version: _Optional[int] = ..., shards: _Optional[_Iterable[_Union[Shard, _Mapping]]] = ..., layouts: _Optional[_Iterable[_Union[Layout, _Mapping]]] = ..., keys: _Optional[_Iterable[str]] = ..., key: _Optional[bytes] = ..., layout: _Optional[bytes] = ..., shard: _Optional[bytes] = ..., stack: _Optional[bytes] = ..., row: _Optional[bytes] = ..., offset: _Optional[bytes] = ..., checksum: _Optional[int] = ...) -> None: ...

class Shard(_message.Message):
    __slots__ = ("id", "directory", "stacks", "files_nbytes")
    ID_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    STACKS_FIELD_NUMBER: _ClassVar[int]
    FILES_NBYTES_FIELD_NUMBER: _ClassVar[int]
    id: str
    directory: str
    stacks: _containers.RepeatedCompositeFieldContainer[Stack]
    files_nbytes: int
    def __init__(self, id: _Optional[str] = ..., directory: _Optional[str] = ..., stacks: _Optional[_Iterable[_Union[Stack, _Mapping]]] = ..., files_nbytes: _Optional[int] = ...) -> None: ...

class Stack(_message.Message):
    __slots__ = ("rows", "row_nbytes", "chunk_nbytes")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    ROW_NBYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_NBYTES_FIELD_NUMBER: _ClassVar[int]
    rows: int
    row_nbytes: int
    chunk_nbytes: int
    def __init__(self, rows: _Optional[int] = ..., row_nbytes: _Optional[int] = ..., chunk_nbytes: _Optional[int] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("dtype", "shape", "start", "stop", "nbytes")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    start: _containers.RepeatedScalarFieldContainer[int]
    stop: _containers.RepeatedScalarFieldContainer[int]
    nbytes: int
    def __init__(self, dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., start: _Optional[_Iterable[int]] = ..., stop: _Optional[_Iterable[int]] = ..., nbytes: _Optional[int] = ...) -> None: ...
