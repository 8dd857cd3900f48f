"""The object graph as bytes: round trips, agreement with TensorFlow's layout, damage."""

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, wrappers_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_jax.errors import CorruptCheckpointError, UnsupportedFormatError
from ckpt_jax.graph._proto import trackable_object_graph_pb2 as pb
from ckpt_jax.graph.codec import decode, encode
from ckpt_jax.graph.labels import VARIABLE_VALUE, attribute_key, local_name
from ckpt_jax.graph.nodes import (
    FORMAT_VERSION,
    Attribute,
    Node,
    ObjectGraph,
    SaverRef,
    Slot,
    object_keys,
)
from ckpt_jax.graph.specs import LeafSpec, ShardingSpec

TEXT = st.text(max_size=4)
LABELS = st.one_of(
    TEXT,
    st.integers(-(10**20), 10**20),
    st.booleans(),
    st.floats(allow_nan=False),
    st.binary(max_size=3),
    st.none(),
)
SPECS = st.builds(
    LeafSpec,
    kind=st.sampled_from(["array", "numpy", "prng_key", ""]),
    dtype=st.sampled_from(["float32", "int64", ""]),
    shape=st.lists(st.integers(0, 2**40), max_size=3).map(tuple),
    weak_type=st.booleans(),
    prng_impl=st.sampled_from(["", "threefry2x32"]),
) | st.sampled_from(
    [LeafSpec("int", "int64"), LeafSpec("int", "bytes"), LeafSpec("python_state", "bytes")]
)
SHARDINGS = st.builds(
    ShardingSpec,
    kind=TEXT,
    axis_names=st.lists(TEXT, max_size=2).map(tuple),
    mesh_shape=st.lists(st.integers(1, 9), max_size=2).map(tuple),
    partitions=st.lists(st.lists(TEXT, max_size=2).map(tuple), max_size=2).map(tuple),
    num_devices=st.integers(1, 8),
    memory_kind=TEXT,
    text=TEXT,
)
ATTRIBUTES = st.builds(
    Attribute,
    name=TEXT,
    key=TEXT,
    spec=SPECS,
    sharding=st.none() | SHARDINGS,
    full_name=TEXT,
)


@st.composite
def graphs(draw):
    """Any graph at all: sharing, cycles, slots, nodes that nothing leads to."""
    count = draw(st.integers(1, 5))
    ids = st.integers(0, count - 1)
    edges = st.lists(st.tuples(LABELS, ids), max_size=4, unique_by=lambda edge: edge[0])
    nodes = [
        draw(
            st.builds(
                Node,
                container=st.sampled_from(["", "leaf", "dict", "list", "none"]),
                type_name=TEXT,
                children=edges.map(tuple),
                attributes=st.lists(ATTRIBUTES, max_size=2).map(tuple),
                slots=st.lists(st.builds(Slot, ids, TEXT, ids), max_size=2).map(tuple),
                saver=st.none() | st.builds(SaverRef, TEXT, TEXT),
                has_values=st.none() | st.booleans(),
            )
        )
        for _ in range(count)
    ]
    return ObjectGraph(tuple(nodes), object_keys(nodes))


def leaf(key, kind="array"):
    name = VARIABLE_VALUE
    attribute = Attribute(name, attribute_key(key, name), LeafSpec(kind, "float32", (2,)))
    return Node("leaf", "jax.Array", (), (attribute,), (), None, True)


def optimizer_graph():
    """root -> {model -> {w}, opt}; opt has the slot "m" for w."""
    nodes = (
        Node("", "Checkpoint", (("model", 1), ("opt", 2)), has_values=True),
        Node("", "Model", (("w", 3), (0, 3)), has_values=True),
        Node("", "Adam", slots=(Slot(3, "m", 4),), has_values=True),
        leaf("model/w"),
        leaf("model/w/.OPTIMIZER_SLOT/opt/m"),
    )
    return ObjectGraph(nodes, object_keys(nodes))


# --- round trips ------------------------------------------------------------------------


@settings(max_examples=60)
@given(graphs())
def test_decoding_gives_back_every_graph_that_was_encoded(graph):
    again = decode(encode(graph))
    assert again == graph
    # 0, False and 0.0 are equal, but they are three labels.
    assert repr(again) == repr(graph)


@settings(max_examples=40)
@given(graphs())
def test_one_graph_has_one_encoding(graph):
    assert encode(decode(encode(graph))) == encode(graph)


def test_equal_specs_and_shardings_are_stored_once():
    spec = LeafSpec("array", "float32", (4, 4))
    sharding = ShardingSpec("NamedSharding", ("x",), (8,), (("x",),), 8)
    attributes = tuple(Attribute(f"a{i}", f"k{i}", spec, sharding) for i in range(50))
    nodes = (Node(attributes=attributes),)
    message = pb.TrackableObjectGraph()
    message.ParseFromString(encode(ObjectGraph(nodes, object_keys(nodes))))
    assert (len(message.leaf_specs), len(message.shardings)) == (1, 1)


def test_keys_of_objects_follow_from_the_edges():
    graph = decode(encode(optimizer_graph()))
    assert graph.object_keys == ("", "model", "opt", "model/w", "model/w/.OPTIMIZER_SLOT/opt/m")


def test_an_unset_flag_for_values_is_not_a_false_one():
    for flag in (None, False, True):
        nodes = (Node(has_values=flag),)
        assert decode(encode(ObjectGraph(nodes, ("",)))).nodes[0].has_values is flag


# --- TensorFlow's layout ----------------------------------------------------------------


@pytest.fixture(scope="module")
def tensorflow_graph():
    """TensorFlow's TrackableObjectGraph: fields 1 to 5 and no others."""
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    file = descriptor_pb2.FileDescriptorProto(
        name="tensorflow.proto",
        package="tensorflow",
        syntax="proto3",
        dependency=[wrappers_pb2.DESCRIPTOR.name],
    )
    field = descriptor_pb2.FieldDescriptorProto

    def add(message, number, name, kind, repeated=False):
        message.field.add(
            name=name,
            number=number,
            label=field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL,
            type=field.TYPE_MESSAGE if isinstance(kind, str) else kind,
            type_name=kind if isinstance(kind, str) else None,
        )

    def message(parent, name, *fields):
        parent.name = name
        for number, field_name, kind, *repeated in fields:
            add(parent, number, field_name, kind, *repeated)

    graph = file.message_type.add(name="TrackableObjectGraph")
    scope = ".tensorflow.TrackableObjectGraph.TrackableObject"
    add(graph, 1, "nodes", scope, True)
    node = graph.nested_type.add()
    message(
        node,
        "TrackableObject",
        (1, "children", f"{scope}.ObjectReference", True),
        (2, "attributes", f"{scope}.SerializedTensor", True),
        (3, "slot_variables", f"{scope}.SlotVariableReference", True),
        (4, "registered_saver", ".tensorflow.RegisteredSaver"),
        (5, "has_checkpoint_values", ".google.protobuf.BoolValue"),
    )
    int32, string = field.TYPE_INT32, field.TYPE_STRING
    message(
        node.nested_type.add(), "ObjectReference", (1, "node_id", int32), (2, "local_name", string)
    )
    message(
        node.nested_type.add(),
        "SerializedTensor",
        (1, "name", string),
        (2, "full_name", string),
        (3, "checkpoint_key", string),
    )
    message(
        node.nested_type.add(),
        "SlotVariableReference",
        (1, "original_variable_node_id", int32),
        (2, "slot_name", string),
        (3, "slot_variable_node_id", int32),
    )
    message(
        file.message_type.add(), "RegisteredSaver", (1, "name", string), (2, "object_name", string)
    )
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(
        pool.FindMessageTypeByName("tensorflow.TrackableObjectGraph")
    )


@settings(max_examples=40)
@given(graphs())
def test_tensorflows_layout_parses_what_we_write(tensorflow_graph, graph):
    theirs = tensorflow_graph()
    theirs.ParseFromString(encode(graph))
    assert len(theirs.nodes) == len(graph.nodes)
    for node, their in zip(graph.nodes, theirs.nodes, strict=True):
        assert [(child.local_name, child.node_id) for child in their.children] == [
            (local_name(label), child) for label, child in node.children
        ]
        assert [(a.name, a.full_name, a.checkpoint_key) for a in their.attributes] == [
            (a.name, a.full_name, a.key) for a in node.attributes
        ]
        assert [
            (s.original_variable_node_id, s.slot_name, s.slot_variable_node_id)
            for s in their.slot_variables
        ] == [(s.variable, s.name, s.node) for s in node.slots]
        saver = their.registered_saver if their.HasField("registered_saver") else None
        assert (saver and SaverRef(saver.name, saver.object_name)) == node.saver
        flag = their.has_checkpoint_values
        has_values = flag.value if their.HasField("has_checkpoint_values") else None
        assert has_values is node.has_values


VERSION = pb.TrackableObjectGraph(format_version=1).SerializeToString()  # to append to a message


def test_tensorflows_fields_are_read_but_not_a_graph_without_format_version(tensorflow_graph):
    theirs = tensorflow_graph()
    root, child = theirs.nodes.add(), theirs.nodes.add()
    root.children.add(node_id=1, local_name="v")
    child.attributes.add(name=VARIABLE_VALUE, full_name="v:0", checkpoint_key="v/.ATTRIBUTES/x")
    data = theirs.SerializeToString()
    graph = decode(data + VERSION)
    assert graph.nodes[0].children == (("v", 1),)
    assert graph.nodes[1].attributes == (
        Attribute(VARIABLE_VALUE, "v/.ATTRIBUTES/x", LeafSpec(), None, "v:0"),
    )
    assert graph.carries_values(1) and graph.nodes[1].has_values is None
    with pytest.raises(CorruptCheckpointError, match="no format version"):
        decode(data)


def test_old_files_with_the_reserved_field_are_read():
    """`optional_restore` (field 4 of a value) is skipped."""
    node = pb.TrackableObjectGraph.TrackableObject()
    value = node.attributes.add(name="x", checkpoint_key="k").SerializeToString() + b"\x20\x01"
    nodes = b"\x12" + bytes([len(value)]) + value
    data = b"\x0a" + bytes([len(nodes)]) + nodes
    assert decode(data + VERSION).nodes[0].attributes == (Attribute("x", "k"),)


# --- damage -----------------------------------------------------------------------------


def read_or_refuse(data):
    """Decodes bytes; an error of any other class than the two that are promised gets out."""
    try:
        return decode(data)
    except (CorruptCheckpointError, UnsupportedFormatError):
        return None


@settings(max_examples=60)
@given(graphs(), st.data())
def test_damaged_bytes_are_refused_or_read_but_never_crash(graph, data):
    damaged = bytearray(encode(graph))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(damaged)))
    for part in (bytes(damaged), bytes(damaged[:end])):
        found = read_or_refuse(part)
        assert found is None or len(found.object_keys) == len(found.nodes) > 0


@given(st.binary(max_size=60))
def test_bytes_of_no_meaning_are_refused_or_read_but_never_crash(data):
    found = read_or_refuse(data + VERSION)
    assert found is None or found.nodes


def message_of(graph):
    message = pb.TrackableObjectGraph()
    message.ParseFromString(encode(graph))
    return message


def broken(change):
    message = message_of(optimizer_graph())
    change(message)
    return message.SerializeToString()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: m.ClearField("nodes"), "no nodes"),
        (lambda m: m.ClearField("format_version"), "no format version"),
        (lambda m: setattr(m.nodes[0].children[0], "node_id", 5), "node 0 refers to a node"),
        (lambda m: setattr(m.nodes[0].children[0], "node_id", -1), "node 0 refers to a node"),
        (
            lambda m: setattr(m.nodes[2].slot_variables[0], "slot_variable_node_id", 9),
            "node 2 refers to a node",
        ),
        (
            lambda m: setattr(m.nodes[2].slot_variables[0], "original_variable_node_id", -2),
            "node 2 refers to a node",
        ),
        (lambda m: setattr(m.nodes[0].children[1], "local_name", "model"), "two edges"),
        (lambda m: setattr(m.nodes[3].attributes[0], "leaf_spec", 7), "contradicts itself"),
        (lambda m: setattr(m.nodes[3].attributes[0], "sharding", 1), "contradicts itself"),
        (lambda m: setattr(m.nodes[1].children[1], "local_name", "00"), "not how the label"),
        (lambda m: setattr(m.nodes[1].children[1], "local_name", "x"), "contradicts itself"),
        (lambda m: setattr(m.nodes[1].children[1], "key_kind", 99), "contradicts itself"),
    ],
)
def test_a_graph_that_contradicts_itself_is_corrupt(change, complaint):
    with pytest.raises(CorruptCheckpointError, match=complaint):
        decode(broken(change))


def test_a_newer_format_is_refused_by_number():
    data = broken(lambda m: setattr(m, "format_version", FORMAT_VERSION + 1))
    with pytest.raises(
        UnsupportedFormatError, match=rf"format {FORMAT_VERSION + 1}.*up to {FORMAT_VERSION}"
    ):
        decode(data)


def test_a_cycle_in_the_file_is_no_problem():
    nodes = (Node(children=(("next", 1),)), Node(children=(("back", 0), ("self", 1))))
    graph = decode(encode(ObjectGraph(nodes, object_keys(nodes))))
    assert graph.object_keys == ("", "next")


@pytest.mark.parametrize(
    "spec",
    [
        LeafSpec("int", "float32"),
        LeafSpec("str", "int8"),
        LeafSpec("float", "float64", (2,)),
        LeafSpec("array", "bytes"),
        LeafSpec("surprise", "int64"),
    ],
)
def test_a_kind_that_is_not_stored_like_that_is_refused(spec):
    node = Node("leaf", "", (), (Attribute("x", "x", spec),))
    with pytest.raises(CorruptCheckpointError, match="contradicts itself"):
        decode(encode(ObjectGraph((node,), ("",))))
