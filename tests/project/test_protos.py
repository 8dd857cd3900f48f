"""The wire format: field numbers, generated modules, and agreement with TensorFlow's classes."""

import importlib.util
import re

import pytest
from google.protobuf import any_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st
from places import PROTOS

from ckpt_jax.graph._proto import (
    checkpoint_state_pb2,
    index_pb2,
    manifest_pb2,
    saved_object_graph_pb2,
    tensor_bundle_pb2,
    trackable_object_graph_pb2,
)

MODULES = {
    module.DESCRIPTOR.name.rpartition("/")[2]: module
    for module in (
        checkpoint_state_pb2,
        index_pb2,
        manifest_pb2,
        saved_object_graph_pb2,
        tensor_bundle_pb2,
        trackable_object_graph_pb2,
    )
}

# Below 100 the fields are these and no others: number, name, type; "*" is repeated.
TENSORFLOW = """
TrackableObjectGraph
  1 nodes TrackableObject*
TrackableObjectGraph.TrackableObject
  1 children ObjectReference*
  2 attributes SerializedTensor*
  3 slot_variables SlotVariableReference*
  4 registered_saver RegisteredSaver
  5 has_checkpoint_values BoolValue
TrackableObjectGraph.TrackableObject.ObjectReference
  1 node_id int32
  2 local_name string
TrackableObjectGraph.TrackableObject.SerializedTensor
  1 name string
  2 full_name string
  3 checkpoint_key string
TrackableObjectGraph.TrackableObject.SlotVariableReference
  1 original_variable_node_id int32
  2 slot_name string
  3 slot_variable_node_id int32
RegisteredSaver
  1 name string
  2 object_name string
CheckpointState
  1 model_checkpoint_path string
  2 all_model_checkpoint_paths string*
  3 all_model_checkpoint_timestamps double*
  4 last_preserved_timestamp double
SavedObjectGraph
  1 nodes SavedObject*
  2 concrete_functions ConcreteFunctionsEntry*
SavedObject
  1 children ObjectReference*
  15 dependencies ObjectReference*
  3 slot_variables SlotVariableReference*
  4 user_object SavedUserObject
  5 asset SavedAsset
  6 function SavedFunction
  7 variable SavedVariable
  8 bare_concrete_function SavedBareConcreteFunction
  9 constant SavedConstant
  10 resource SavedResource
  12 captured_tensor CapturedTensor
  11 saveable_objects SaveableObjectsEntry*
  13 registered_name string
  14 serialized_user_proto Any
  16 registered_saver string
SaveableObject
  2 save_function int32
  3 restore_function int32
SavedVariable
  1 dtype DataType
  2 shape TensorShapeProto
  3 trainable bool
  4 synchronization VariableSynchronization
  5 aggregation VariableAggregation
  6 name string
  7 device string
  8 experimental_distributed_variable_components SavedVariable*
VersionDef
  1 producer int32
  2 min_consumer int32
  3 bad_consumers int32*
TensorShapeProto
  2 dim Dim*
  3 unknown_rank bool
TensorShapeProto.Dim
  1 size int64
  2 name string
BundleHeaderProto
  1 num_shards int32
  2 endianness Endianness
  3 version VersionDef
BundleEntryProto
  1 dtype DataType
  2 shape TensorShapeProto
  3 shard_id int32
  4 offset int64
  5 size int64
  6 crc32c fixed32
  7 slices TensorSliceProto*
TensorSliceProto
  1 extent Extent*
TensorSliceProto.Extent
  1 start int64
  2 length int64
"""

ADDITIONS = """
TrackableObjectGraph
  100 format_version uint32
  101 leaf_specs LeafSpec*
  102 shardings ShardingSpec*
  1000 checksum fixed32
TrackableObjectGraph.TrackableObject
  100 container string
  101 type_name string
TrackableObjectGraph.TrackableObject.ObjectReference
  100 key_kind KeyKind
  101 key_parts Key*
  102 enum_class string
  103 numpy_type string
TrackableObjectGraph.TrackableObject.SerializedTensor
  100 leaf_spec uint32
  101 sharding uint32
SavedObjectGraph
  100 format_version uint32
  1000 checksum fixed32
"""

# The messages that TensorFlow does not have, and that checkpoints are opened with.
OWN = """
Manifest
  1 format_version uint32
  2 parts Part*
  1000 checksum fixed32
Part
  1 name string
  2 file string
  3 nbytes uint64
  4 digest bytes
Index
  1 format_version uint32
  2 tables Table*
  3 shards Shard*
  1000 checksum fixed32
Table
  1 keys string*
  2 layouts Layout*
  3 key bytes
  4 layout bytes
  5 offset bytes
Layout
  1 dtype string
  2 shape uint64*
  3 extent uint64*
  4 nbytes uint64
Shard
  1 directory string
  2 table uint32
  3 starts uint64*
  4 nbytes uint64
  5 chunk_nbytes uint64
  6 block_nbytes uint64
  7 file_nbytes uint64
  8 compression string
  9 stored_nbytes uint64
  10 checksums bytes
  11 digest bytes
Entry
  1 shard Shard
  2 table bytes
"""

# tf.train.Checkpoint(v=tf.Variable(1.0)) after one save, as TensorFlow 2.21 wrote it.
TENSORFLOW_GRAPH = bytes.fromhex(
    "0a1d0a0508011201760a100802120c736176655f636f756e7465722a0208010a3e12380a0e5641524941424c"
    "455f56414c554512085661726961626c651a1c762f2e415454524942555445532f5641524941424c455f5641"
    "4c55452a0208010a4d12470a0e5641524941424c455f56414c5545120c736176655f636f756e7465721a2773"
    "6176655f636f756e7465722f2e415454524942555445532f5641524941424c455f56414c55452a020801"
)


def table(text: str) -> dict[str, set[str]]:
    blocks = re.findall(r"^(\S+)\n((?: .*\n)*)", text, re.MULTILINE)
    return {message: {line.strip() for line in lines.splitlines()} for message, lines in blocks}


def type_name(field: FieldDescriptor) -> str:
    of = field.message_type or field.enum_type
    names = {n: k[5:].lower() for k, n in vars(FieldDescriptor).items() if k.startswith("TYPE_")}
    return of.name if of else names[field.type]


def is_repeated(field: FieldDescriptor) -> bool:
    return field.default_value == []  # the property of that name is younger than protobuf 6.30


def fields_of(descriptor: Descriptor) -> dict[int, str]:
    return {
        field.number: f"{field.number} {field.name} {type_name(field)}{'*' * is_repeated(field)}"
        for field in descriptor.fields
    }


def messages_of(module) -> dict[str, Descriptor]:
    found, todo = {}, list(module.DESCRIPTOR.message_types_by_name.values())
    for descriptor in todo:
        found[descriptor.full_name.removeprefix("ckpt_jax.")] = descriptor
        todo += [d for d in descriptor.nested_types if not d.GetOptions().map_entry]
    return found


ALL_MESSAGES = {k: v for module in MODULES.values() for k, v in messages_of(module).items()}


@pytest.mark.parametrize("name", table(TENSORFLOW))
def test_fields_below_100_are_those_of_tensorflow(name):
    fields = fields_of(ALL_MESSAGES[name])
    assert {line for number, line in fields.items() if number < 100} == table(TENSORFLOW)[name]


@pytest.mark.parametrize("name", table(TENSORFLOW))
def test_fields_from_100_up_are_the_documented_additions(name):
    fields = fields_of(ALL_MESSAGES[name])
    added = {line for number, line in fields.items() if number >= 100}
    assert added == table(ADDITIONS).get(name, set())


@pytest.mark.parametrize("name", table(OWN))
def test_fields_of_manifest_and_index_keep_their_numbers(name):
    assert set(fields_of(ALL_MESSAGES[name]).values()) == table(OWN)[name]


def test_key_kinds_keep_their_numbers():
    reference = ALL_MESSAGES["TrackableObjectGraph.TrackableObject.ObjectReference"]
    assert {v.name: v.number for v in reference.enum_types_by_name["KeyKind"].values} == {
        "STRING": 0, "INT": 1, "BOOL": 2, "FLOAT": 3, "BYTES": 4, "NONE": 5,
        "TUPLE": 6, "ENUM": 7,
    }  # fmt: skip


def test_the_removed_field_of_a_serialized_tensor_is_reserved_and_skipped():
    tensor = trackable_object_graph_pb2.TrackableObjectGraph.TrackableObject.SerializedTensor
    source = (PROTOS / "trackable_object_graph.proto").read_text(encoding="utf-8")
    body = source[source.index("message SerializedTensor") :]
    assert re.match(r'[^}]*reserved 4;\s*reserved "optional_restore";', body)
    assert tensor.FromString(b"\x0a\x01n\x20\x01").name == "n"


def test_presence_of_has_checkpoint_values_is_kept():
    node = trackable_object_graph_pb2.TrackableObjectGraph.TrackableObject
    assert not node.FromString(b"").HasField("has_checkpoint_values")
    assert node.FromString(b"\x2a\x00").HasField("has_checkpoint_values")


@pytest.mark.parametrize("name", ["TrackableObjectGraph", "SavedObjectGraph", "Index", "Manifest"])
def test_the_checksum_is_written_last_with_its_four_bytes_bare(name):
    module = next(m for m in MODULES.values() if hasattr(m, name))
    message = getattr(module, name)(format_version=1, checksum=0x04030201)
    assert message.SerializeToString()[-6:] == b"\xc5\x3e\x01\x02\x03\x04"


def test_a_graph_from_tensorflow_reads_with_all_additions_absent():
    graph = trackable_object_graph_pb2.TrackableObjectGraph.FromString(TENSORFLOW_GRAPH)
    root, variable, counter = graph.nodes
    assert [(c.node_id, c.local_name, c.key_kind) for c in root.children] == [
        (1, "v", 0),
        (2, "save_counter", 0),
    ]
    assert [a.checkpoint_key for a in variable.attributes] == ["v/.ATTRIBUTES/VARIABLE_VALUE"]
    assert variable.attributes[0].name == "VARIABLE_VALUE"
    assert (variable.attributes[0].leaf_spec, variable.attributes[0].sharding) == (0, 0)
    assert (variable.container, variable.type_name) == ("", "")
    assert counter.has_checkpoint_values.value
    assert (graph.format_version, graph.checksum) == (0, 0)
    assert graph.SerializeToString(deterministic=True) == TENSORFLOW_GRAPH


# --- the generated modules ----------------------------------------------------------------


def load_generator():
    spec = importlib.util.spec_from_file_location("generate", PROTOS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_modules_are_up_to_date():
    stale = load_generator().stale()
    assert not stale, f"stale: {stale}; run: python protos/generate.py"


def test_staleness_shows_for_sources_modules_and_additional_files(tmp_path):
    generator = load_generator()
    for folder in (generator.SOURCES, generator.MODULES):
        (tmp_path / folder).mkdir(parents=True)
    source = tmp_path / generator.SOURCES / "a.proto"
    module = tmp_path / generator.MODULES / "a_pb2.py"
    source.write_text("1")
    module.write_text("1")
    record = "\n".join(generator._record(tmp_path))
    (tmp_path / generator.RECORD).write_text(record)
    assert generator.stale(tmp_path) == []
    source.write_text("2")
    assert generator.stale(tmp_path) == ["protos/a.proto"]
    module.unlink()
    (tmp_path / generator.SOURCES / "b.proto").touch()
    assert generator.stale(tmp_path) == [
        "ckpt_jax/graph/_proto/a_pb2.py",
        "protos/a.proto",
        "protos/b.proto",
    ]


def test_every_proto_file_has_a_module_that_is_tested_here():
    assert {path.name for path in PROTOS.glob("*.proto")} == set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_files_are_registered_under_the_path_of_their_module(name):
    descriptor = MODULES[name].DESCRIPTOR
    assert descriptor.name == f"ckpt_jax/graph/_proto/{name}"
    assert descriptor.package == "ckpt_jax"


TOKEN = re.compile(r'"[^"]*"|[\w.]+|\S')


def fields_in_source(text: str) -> dict[str, set[str]]:
    """Fields by message, in the notation of the table; maps are left out."""
    tokens = TOKEN.findall(re.sub(r"//.*", "", text))
    found: dict[str, set[str]] = {}
    scopes: list[tuple[str, str]] = []
    statement: list[str] = []
    for token in tokens:
        if token == "{":
            scopes.append((statement[0], statement[1]))
            if statement[0] == "message":
                found[".".join(n for kind, n in scopes if kind == "message")] = set()
            statement = []
        elif token == "}":
            scopes.pop()
        elif token != ";":
            statement.append(token)
        else:
            message = ".".join(n for kind, n in scopes if kind == "message")
            kinds = [kind for kind, _ in scopes]
            plain = statement[0] not in ("reserved", "option", "map")
            if plain and kinds and kinds[-1] in ("message", "oneof"):
                star = "*" * (statement[0] == "repeated")
                kind, name, _, number = statement[-4:]
                found[message].add(f"{number} {name} {kind.rpartition('.')[2]}{star}")
            statement = []
    return found


@pytest.mark.parametrize("name", MODULES)
def test_modules_have_exactly_the_fields_of_their_sources(name):
    in_module = {
        message: {
            line
            for number, line in fields_of(descriptor).items()
            if "Entry*" not in line  # maps
        }
        for message, descriptor in messages_of(MODULES[name]).items()
    }
    text = (PROTOS / name).read_text(encoding="utf-8")
    assert fields_in_source(text) == in_module


# --- TensorFlow's own classes -------------------------------------------------------------

SCALARS = {
    "string": st.text(max_size=5),
    "bool": st.booleans(),
    "int32": st.integers(-(2**31), 2**31 - 1),
    "int64": st.integers(-(2**63), 2**63 - 1),
    "sint64": st.integers(-(2**63), 2**63 - 1),
    "uint32": st.integers(0, 2**32 - 1),
    "fixed32": st.integers(0, 2**32 - 1),
    "double": st.floats(allow_nan=False),
    # Our opaque fields hold a StructuredValue; these are none, 1.5 and an empty list.
    "bytes": st.sampled_from(
        [b"", b"\x0a\x00", b"\x59" + b"\0" * 6 + b"\xf8\x3f", b"\x9a\x03\x00"]
    ),
}


@st.composite
def messages(draw, cls: type[Message], depth: int = 4):
    """A message with an arbitrary subset of its fields set, recursively."""
    message = cls()
    if cls.DESCRIPTOR.full_name == "google.protobuf.Any":
        return any_pb2.Any(type_url=draw(SCALARS["string"]), value=draw(st.binary(max_size=4)))
    fields = list(cls.DESCRIPTOR.fields)
    for field in draw(st.lists(st.sampled_from(fields), unique=True)) if fields else ():
        nested = field.message_type
        is_map = nested is not None and nested.GetOptions().map_entry
        if nested is None:
            values = SCALARS[type_name(field)] if field.enum_type is None else SCALARS["int32"]
        elif depth == 0 or nested.full_name == "tensorflow.TensorProto":
            continue
        else:
            made = nested.fields_by_name["value"].message_type if is_map else nested
            values = messages(made._concrete_class, depth - 1)
        if is_map:
            for key, value in draw(st.dictionaries(SCALARS["string"], values, max_size=2)).items():
                getattr(message, field.name)[key].CopyFrom(value)
        elif is_repeated(field):
            getattr(message, field.name).extend(draw(st.lists(values, max_size=2)))
        elif nested is not None:
            getattr(message, field.name).CopyFrom(draw(values))
        else:
            setattr(message, field.name, draw(values))
    return message


def tensorflow_class(name: str) -> type[Message]:
    pytest.importorskip(
        "tensorflow", reason="TensorFlow is not installed. scripts/interop runs this test with it."
    )
    from tensorflow.core.protobuf import saved_object_graph_pb2 as saved
    from tensorflow.core.protobuf import tensor_bundle_pb2 as bundle
    from tensorflow.core.protobuf import trackable_object_graph_pb2 as trackable
    from tensorflow.python.training import checkpoint_state_pb2 as state

    return next(getattr(m, name) for m in (saved, trackable, bundle, state) if hasattr(m, name))


OURS = [
    trackable_object_graph_pb2.TrackableObjectGraph,
    saved_object_graph_pb2.SavedObjectGraph,
    checkpoint_state_pb2.CheckpointState,
    tensor_bundle_pb2.BundleHeaderProto,
    tensor_bundle_pb2.BundleEntryProto,
]


@pytest.mark.parametrize("ours", OURS, ids=lambda cls: cls.__name__)
def test_tensorflow_reads_our_bytes_and_gives_them_back_unchanged(ours):
    theirs = tensorflow_class(ours.__name__)

    @given(messages(ours))
    def check(message):
        data = message.SerializeToString(deterministic=True)
        parsed = theirs.FromString(data)
        assert ours.FromString(parsed.SerializeToString()) == message
        assert parsed.SerializeToString(deterministic=True) == data

    check()


@pytest.mark.parametrize("ours", OURS, ids=lambda cls: cls.__name__)
def test_we_read_the_bytes_of_tensorflow_and_give_them_back_unchanged(ours):
    theirs = tensorflow_class(ours.__name__)

    @given(messages(theirs))
    def check(message):
        data = message.SerializeToString(deterministic=True)
        parsed = ours.FromString(data)
        assert theirs.FromString(parsed.SerializeToString()) == message
        assert parsed.SerializeToString(deterministic=True) == data

    check()
