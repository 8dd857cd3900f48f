from google.protobuf import wrappers_pb2 as _wrappers_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TrackableObjectGraph(_message.Message):
    __slots__ = ("nodes", "format_version", "leaf_specs", "shardings", "checksum")
    class TrackableObject(_message.Message):
        __slots__ = ("children", "attributes", "slot_variables", "registered_saver", "has_checkpoint_values", "container", "type_name")
        class ObjectReference(_message.Message):
            __slots__ = ("node_id", "local_name", "key_kind", "key_parts", "enum_class", "numpy_type")
            class KeyKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
                __slots__ = ()
                STRING: _ClassVar[TrackableObjectGraph.TrackableObject.ObjectReference.KeyKind]
                INT: _ClassVar[TrackableObjectGraph.TrackableObject.ObjectReference.KeyKind]
                BOOL: _ClassVar[TrackableObjectGraph.TrackableObject.ObjectReference.KeyKind]
                FLOAT: _ClassVar[TrackableObjectGraph.TrackableObject.ObjectReference.KeyKind]
                BYTES: _ClassVar[TrackableObjectGraph.TrackableObject.ObjectReference.KeyKind]
                NONE: _ClassVar[TrackableObjectGraph.TrackableObject.ObjectReference.KeyKind]
                TUPLE: _ClassVar[TrackableObjectGraph.TrackableObject.ObjectReference.KeyKind]
                ENUM: _ClassVar[TrackableObjectGraph.TrackableObject.ObjectReference.KeyKind]
            STRING: TrackableObjectGraph.TrackableObject.ObjectReference.KeyKind
            INT: TrackableObjectGraph.TrackableObject.ObjectReference.KeyKind
            BOOL: TrackableObjectGraph.TrackableObject.ObjectReference.KeyKind
            FLOAT: TrackableObjectGraph.TrackableObject.ObjectReference.KeyKind
            BYTES: TrackableObjectGraph.TrackableObject.ObjectReference.KeyKind
            NONE: TrackableObjectGraph.TrackableObject.ObjectReference.KeyKind
            TUPLE: TrackableObjectGraph.TrackableObject.ObjectReference.KeyKind
            ENUM: TrackableObjectGraph.TrackableObject.ObjectReference.KeyKind
            class Key(_message.Message):
                __slots__ = ("text", "kind", "parts", "enum_class", "numpy_type")
                TEXT_FIELD_NUMBER: _ClassVar[int]
                KIND_FIELD_NUMBER: _ClassVar[int]
                PARTS_FIELD_NUMBER: _ClassVar[int]
                ENUM_CLASS_FIELD_NUMBER: _ClassVar[int]
                NUMPY_TYPE_FIELD_NUMBER: _ClassVar[int]
                text: str
                kind: TrackableObjectGraph.TrackableObject.ObjectReference.KeyKind
                parts: _containers.RepeatedCompositeFieldContainer[TrackableObjectGraph.TrackableObject.ObjectReference.Key]
                enum_class: str
                numpy_type: str
                def __init__(self, text: _Optional[str] = ..., kind: _Optional[_Union[TrackableObjectGraph.TrackableObject.ObjectReference.KeyKind, str]] = ..., parts: _Optional[_Iterable[_Union[TrackableObjectGraph.TrackableObject.ObjectReference.Key, _Mapping]]] = ..., enum_class: _Optional[str] = ..., numpy_type: _Optional[str] = ...) -> None: ...
            NODE_ID_FIELD_NUMBER: _ClassVar[int]
            LOCAL_NAME_FIELD_NUMBER: _ClassVar[int]
            KEY_KIND_FIELD_NUMBER: _ClassVar[int]
            KEY_PARTS_FIELD_NUMBER: _ClassVar[int]
            ENUM_CLASS_FIELD_NUMBER: _ClassVar[int]
            NUMPY_TYPE_FIELD_NUMBER: _ClassVar[int]
            node_id: int
            local_name: str
            key_kind: TrackableObjectGraph.TrackableObject.ObjectReference.KeyKind
            key_parts: _containers.RepeatedCompositeFieldContainer[TrackableObjectGraph.TrackableObject.ObjectReference.Key]
            enum_class: str
            numpy_type: str
            def __init__(self, node_id: _Optional[int] = ..., local_name: _Optional[str] = ..., key_kind: _Optional[_Union[TrackableObjectGraph.TrackableObject.ObjectReference.KeyKind, str]] = ..., key_parts: _Optional[_Iterable[_Union[TrackableObjectGraph.TrackableObject.ObjectReference.Key, _Mapping]]] = ..., enum_class: _Optional[str] = ..., numpy_type: _Optional[str] = ...) -> None: ...
        class SerializedTensor(_message.Message):
            __slots__ = ("name", "full_name", "checkpoint_key", "leaf_spec", "sharding")
            NAME_FIELD_NUMBER: _ClassVar[int]
            FULL_NAME_FIELD_NUMBER: _ClassVar[int]
            CHECKPOINT_KEY_FIELD_NUMBER: _ClassVar[int]
            LEAF_SPEC_FIELD_NUMBER: _ClassVar[int]
            SHARDING_FIELD_NUMBER: _ClassVar[int]
            name: str
            full_name: str
            checkpoint_key: str
            leaf_spec: int
            sharding: int
            def __init__(self, name: _Optional[str] = ..., full_name: _Optional[str] = ..., checkpoint_key: _Optional[str] = ..., leaf_spec: _Optional[int] = ..., sharding: _Optional[int] = ...) -> None: ...
        class SlotVariableReference(_message.Message):
            __slots__ = ("original_variable_node_id", "slot_name", "slot_variable_node_id")
            ORIGINAL_VARIABLE_NODE_ID_FIELD_NUMBER: _ClassVar[int]
            SLOT_NAME_FIELD_NUMBER: _ClassVar[int]
            SLOT_VARIABLE_NODE_ID_FIELD_NUMBER: _ClassVar[int]
            original_variable_node_id: int
            slot_name: str
            slot_variable_node_id: int
            def __init__(self, original_variable_node_id: _Optional[int] = ..., slot_name: _Optional[str] = ..., slot_variable_node_id: _Optional[int] = ...) -> None: ...
        CHILDREN_FIELD_NUMBER: _ClassVar[int]
        ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
        SLOT_VARIABLES_FIELD_NUMBER: _ClassVar[int]
        REGISTERED_SAVER_FIELD_NUMBER: _ClassVar[int]
        HAS_CHECKPOINT_VALUES_FIELD_NUMBER: _ClassVar[int]
        CONTAINER_FIELD_NUMBER: _ClassVar[int]
        TYPE_NAME_FIELD_NUMBER: _ClassVar[int]
        children: _containers.RepeatedCompositeFieldContainer[TrackableObjectGraph.TrackableObject.ObjectReference]
        attributes: _containers.RepeatedCompositeFieldContainer[TrackableObjectGraph.TrackableObject.SerializedTensor]
        slot_variables: _containers.RepeatedCompositeFieldContainer[TrackableObjectGraph.TrackableObject.SlotVariableReference]
        registered_saver: RegisteredSaver
        has_checkpoint_values: _wrappers_pb2.BoolValue
        container: str
        type_name: str
        def __init__(self, children: _Optional[_Iterable[_Union[TrackableObjectGraph.TrackableObject.ObjectReference, _Mapping]]] = ..., attributes: _Optional[_Iterable[_Union[TrackableObjectGraph.TrackableObject.SerializedTensor, _Mapping]]] = ..., slot_variables: _Optional[_Iterable[_Union[TrackableObjectGraph.TrackableObject.SlotVariableReference, _Mapping]]] = ..., registered_saver: _Optional[_Union[RegisteredSaver, _Mapping]] = ..., has_checkpoint_values: _Optional[_Union[_wrappers_pb2.BoolValue, _Mapping]] = ..., container: _Optional[str] = ..., type_name: _Optional[str] = ...) -> None: ...
    NODES_FIELD_NUMBER: _ClassVar[int]
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    LEAF_SPECS_FIELD_NUMBER: _ClassVar[int]
    SHARDINGS_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    nodes: _containers.RepeatedCompositeFieldContainer[TrackableObjectGraph.TrackableObject]
    format_version: int
    leaf_specs: _containers.RepeatedCompositeFieldContainer[LeafSpec]
    shardings: _containers.RepeatedCompositeFieldContainer[ShardingSpec]
    checksum: int
    def __init__(self, nodes: _Optional[_Iterable[_Union[TrackableObjectGraph.TrackableObject, _Mapping]]] = ..., format_version: _Optional[int] = ..., leaf_specs: _Optional[_Iterable[_Union[LeafSpec, _Mapping]]] = ..., shardings: _Optional[_Iterable[_Union[ShardingSpec, _Mapping]]] = ..., checksum: _Optional[int] = ...) -> None: ...

class RegisteredSaver(_message.Message):
    __slots__ = ("name", "object_name")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OBJECT_NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    object_name: str
    def __init__(self, name: _Optional[str] = ..., object_name: _Optional[str] = ...) -> None: ...

class LeafSpec(_message.Message):
    __slots__ = ("kind", "dtype", "shape", "weak_type", "prng_impl", "enum_class", "cast_from")
    KIND_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    WEAK_TYPE_FIELD_NUMBER: _ClassVar[int]
    PRNG_IMPL_FIELD_NUMBER: _ClassVar[int]
    ENUM_CLASS_FIELD_NUMBER: _ClassVar[int]
    CAST_FROM_FIELD_NUMBER: _ClassVar[int]
    kind: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    weak_type: bool
    prng_impl: str
    enum_class: str
    cast_from: str
    def __init__(self, kind: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., weak_type: bool = ..., prng_impl: _Optional[str] = ..., enum_class: _Optional[str] = ..., cast_from: _Optional[str] = ...) -> None: ...

class ShardingSpec(_message.Message):
    __slots__ = ("kind", "axis_names", "mesh_shape", "partitions", "num_devices", "memory_kind", "text")
    class Partition(_message.Message):
        __slots__ = ("axis_names",)
        AXIS_NAMES_FIELD_NUMBER: _ClassVar[int]
        axis_names: _containers.RepeatedScalarFieldContainer[str]
        def __init__(self, axis_names: _Optional[_Iterable[str]] = ...) -> None: ...
    KIND_FIELD_NUMBER: _ClassVar[int]
    AXIS_NAMES_FIELD_NUMBER: _ClassVar[int]
    MESH_SHAPE_FIELD_NUMBER: _ClassVar[int]
    PARTITIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_DEVICES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    kind: str
    axis_names: _containers.RepeatedScalarFieldContainer[str]
    mesh_shape: _containers.RepeatedScalarFieldContainer[int]
    partitions: _containers.RepeatedCompositeFieldContainer[ShardingSpec.Partition]
    num_devices: int
    memory_kind: str
    text: str
    def __init__(self, kind: _Optional[str] = ..., axis_names: _Optional[_Iterable[str]] = ..., mesh_shape: _Optional[_Iterable[int]] = ..., partitions: _Optional[_Iterable[_Union[ShardingSpec.Partition, _Mapping]]] = ..., num_devices: _Optional[int] = ..., memory_kind: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...
