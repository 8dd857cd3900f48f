from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Index(_message.Message):
    __slots__ = ("format_version", "tables", "shards", "checksum")
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    format_version: int
    tables: _containers.RepeatedCompositeFieldContainer[Table]
    shards: _containers.RepeatedCompositeFieldContainer[Shard]
    checksum: int
    def __init__(self, format_version: _Optional[int] = ..., tables: _Optional[_Iterable[_Union[Table, _Mapping]]] = ..., shards: _Optional[_Iterable[_Union[Shard, _Mapping]]] = ..., checksum: _Optional[int] = ...) -> None: ...

class Table(_message.Message):
    __slots__ = ("keys", "layouts", "key", "layout", "offset")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    LAYOUTS_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[str]
    layouts: _containers.RepeatedCompositeFieldContainer[Layout]
    key: bytes
    layout: bytes
    offset: bytes
    def __init__(self, keys: _Optional[_Iterable[str]] = ..., layouts: _Optional[_Iterable[_Union[Layout, _Mapping]]] = ..., key: _Optional[bytes] = ..., layout: _Optional[bytes] = ..., offset: _Optional[bytes] = ...) -> None: ...

class Layout(_message.Message):
    __slots__ = ("dtype", "shape", "extent", "nbytes")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    EXTENT_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    extent: _containers.RepeatedScalarFieldContainer[int]
    nbytes: int
    def __init__(self, dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., extent: _Optional[_Iterable[int]] = ..., nbytes: _Optional[int] = ...) -> None: ...

class Entry(_message.Message):
    __slots__ = ("shard", "table")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    shard: Shard
    table: bytes
    def __init__(self, shard: _Optional[_Union[Shard, _Mapping]] = ..., table: _Optional[bytes] = ...) -> None: ...

class Shard(_message.Message):
    __slots__ = ("directory", "table", "starts", "nbytes", "chunk_nbytes", "block_nbytes", "file_nbytes", "compression", "stored_nbytes", "checksums", "digest")
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_NBYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCK_NBYTES_FIELD_NUMBER: _ClassVar[int]
    FILE_NBYTES_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    STORED_NBYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    directory: str
    table: int
    starts: _containers.RepeatedScalarFieldContainer[int]
    nbytes: int
    chunk_nbytes: int
    block_nbytes: int
    file_nbytes: int
    compression: str
    stored_nbytes: int
    checksums: bytes
    digest: bytes
    def __init__(self, directory: _Optional[str] = ..., table: _Optional[int] = ..., starts: _Optional[_Iterable[int]] = ..., nbytes: _Optional[int] = ..., chunk_nbytes: _Optional[int] = ..., block_nbytes: _Optional[int] = ..., file_nbytes: _Optional[int] = ..., compression: _Optional[str] = ..., stored_nbytes: _Optional[int] = ..., checksums: _Optional[bytes] = ..., digest: _Optional[bytes] = ...) -> None: ...
