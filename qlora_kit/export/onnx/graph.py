"""The graph that ONNX Runtime runs: traced by torch, its weights then stored as they were trained, or in fewer bits."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...errors import KitError
from ...quantization.backend import FourBits
from .plain import Probabilities, Trained

if TYPE_CHECKING:
    from onnx import ModelProto

# Numbers of an embedding's row that share a scale, where its table is stored in 8 bits.
GROUP = 32
# Parts of a step that the second 8 bits of a known token's number count: half a step is 127 of them.
PARTS = 254
# Protobuf, in which ONNX files are written, has no longer messages.
MOST_BYTES = 2**31 - 2**20


def traced(model: Any, pad_token_id: int, name: str) -> ModelProto:
    """Return a classifier as a graph from token ids to logits and probabilities.

    Args:
        model: As `plain_model` returns it.
        pad_token_id: A token that the model has an embedding for.
        name: What the model is called, for messages.

    Returns:
        The graph in fp32. Inputs `input_ids` and `attention_mask`, int64 `[batch, length]`; outputs `logits` and
        `probabilities`, float32 `[batch, classes]`. Batch and length are free.

    Raises:
        KitError: When torch cannot trace the model for any batch and length, or the graph is larger than a file of ONNX
            may be.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    if size > MOST_BYTES:
        raise KitError(f"{name} has {size / 2**30:.1f} GiB of weights in fp32, and one ONNX file holds at most 2")
    ids = torch.full((2, 8), pad_token_id, dtype=torch.long)
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    try:
        with _silent():
            program = torch.onnx.export(
                Probabilities(model).eval(),
                (ids, torch.ones_like(ids)),
                dynamo=True,
                input_names=["input_ids", "attention_mask"],
                output_names=["logits", "probabilities"],
                dynamic_shapes={"input_ids": free, "attention_mask": free},
                verbose=False,
            )
            assert program is not None
            proto = program.model_proto
    except Exception as error:  # torch has no one class for what it cannot trace
        first = " ".join(str(error).split())[:200]
        raise KitError(f"{name} ({type(model).__name__}) cannot be written as ONNX: {first}") from error
    fixed = [given.name for given in proto.graph.input for dim in given.type.tensor_type.shape.dim if not dim.dim_param]
    if fixed:
        raise KitError(
            f"{name} ({type(model).__name__}) cannot be written as ONNX: its code takes the shape of {fixed[0]} for a "
            "constant, so the graph would hold for one number of texts or one length alone"
        )
    _forget_where(proto)
    return proto


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep torch's exporter from printing its steps and its warnings about its own code."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _forget_where(proto: ModelProto) -> None:
    """Delete what torch notes on each node: lines of source and paths of this machine."""
    del proto.metadata_props[:], proto.graph.metadata_props[:], proto.graph.value_info[:]
    for item in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del item.metadata_props[:]
        item.doc_string = ""


# --- weights as they were trained -------------------------------------------------------------------------------


def keep_as_trained_(proto: ModelProto, layers: Mapping[str, Trained]) -> None:
    """Replace the weights of quantized and adapted layers by what they were trained as, in place.

    A weight in four bits becomes its codes, two per byte, its sixteen levels and its blocks' scales; an adapter becomes
    its two matrices. Operations of plain ONNX make the weight of them. Their inputs are constants, so ONNX Runtime
    runs them once, when it opens the file, and then multiplies as for any model in fp32.

    Args:
        proto: As `traced` returns it.
        layers: As `plain_model` returns them.
    """
    made = _Additions(proto)
    for name, layer in layers.items():
        weight = f"model.{name}.weight"
        made.drop(weight)
        made.decoded(layer, weight)
    made.put_first()


class _Additions:
    """Nodes and constants that are added to a graph, before all others."""

    def __init__(self, proto: ModelProto) -> None:
        self.graph = proto.graph
        self.nodes: list[Any] = []
        self.constants = {tensor.name for tensor in proto.graph.initializer}

    def drop(self, name: str) -> None:
        """Delete a constant.

        Raises:
            KeyError: When the graph has none of this name.
        """
        places = {tensor.name: place for place, tensor in enumerate(self.graph.initializer)}
        del self.graph.initializer[places[name]]
        self.constants.discard(name)

    def constant(self, name: str, values: Any) -> str:
        """Add a constant, once; return its name."""
        from onnx import numpy_helper

        if name not in self.constants:
            self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
            self.constants.add(name)
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Add a node; return its output's name."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def decoded(self, layer: Trained, name: str) -> None:
        """Add what makes a layer's weight `[in_features, out_features]`, under a name."""
        if layer.codes is None:
            weight = self.constant(f"{name}.frozen", layer.dense.numpy())
        else:
            weight = self._from_codes(layer.codes, layer.dense.shape, name)
        if layer.a is not None and layer.b is not None:
            adapter = self.node(
                "MatMul",
                [
                    self.constant(f"{name}.lora_B", layer.b.numpy()),
                    self.constant(f"{name}.lora_A", layer.a.numpy()),
                ],
                f"{name}.product",
            )
            scaling = self.constant(f"{name}.scaling", np.float32(layer.scaling))
            scaled = self.node("Mul", [adapter, scaling], f"{name}.adapter")
            weight = self.node("Add", [weight, scaled], f"{name}.sum")
        self.node("Transpose", [weight], name, perm=[1, 0])

    def _from_codes(self, codes: FourBits, shape: torch.Size, name: str) -> str:
        """Add what makes `[out_features, in_features]` of codes; return its name."""
        from onnx import TensorProto

        size, block = shape.numel(), codes.block_size
        packed = np.zeros(len(codes.scales) * block // 2, np.uint8)
        packed[: codes.packed.numel()] = codes.packed.numpy()
        levels = codes.levels.numpy()
        byte = np.arange(256)
        pairs = np.stack((levels[byte >> 4], levels[byte & 15]), axis=1)
        # Equal levels have one table of pairs for all layers.
        table = self.constant(f"pairs_{hashlib.sha256(pairs.tobytes()).hexdigest()[:8]}", pairs)
        index = self.node("Cast", [self.constant(f"{name}.codes", packed)], f"{name}.bytes", to=TensorProto.INT32)
        numbers = self.node("Gather", [table, index], f"{name}.levels", axis=0)
        blocks = self.node(
            "Reshape", [numbers, self.constant(f"blocks_of_{block}", np.array([-1, block]))], f"{name}.blocks"
        )
        scales = self.constant(f"{name}.scales", codes.scales.numpy()[:, None])
        values = self.node("Mul", [blocks, scales], f"{name}.values")
        if size % block:
            flat = self.node("Reshape", [values, self.constant("flat", np.array([-1]))], f"{name}.flat")
            ends = [self.constant("first", np.array([0])), self.constant(f"first_{size}", np.array([size]))]
            values = self.node("Slice", [flat, *ends], f"{name}.cut")
        wanted = self.constant(f"shape_{shape[0]}_{shape[1]}", np.array(shape))
        return self.node("Reshape", [values, wanted], f"{name}.dequantized")

    def put_first(self) -> None:
        """Write the nodes into the graph, before all others."""
        rest = list(self.graph.node)
        del self.graph.node[:]
        self.graph.node.extend([*self.nodes, *rest])


# --- fewer bits -------------------------------------------------------------------------------------------------


def embeddings_in_8_bits_(proto: ModelProto, table: str, known: np.ndarray) -> None:
    """Store an embedding's table in 8 bits, in place: a look-up takes the rows' codes and multiplies by their scales.

    Rows of known tokens have 8 bits more, in a second table that is as long as there are such tokens: texts like those
    of the training keep their labels, and rows that hardly a text needs take one byte a number.

    Args:
        proto: As `traced` returns it.
        table: The table's name in the graph.
        known: Ids of tokens, each once, int64 `[tokens]`.

    Raises:
        KitError: When the graph does not look rows up in it.
    """
    from onnx import TensorProto, numpy_helper

    graph = proto.graph
    values = next((numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name == table), None)
    readers = [place for place, node in enumerate(graph.node) if table in node.input]
    look_ups = [graph.node[place] for place in readers]
    if values is None or len(look_ups) != 1 or look_ups[0].op_type != "Gather" or look_ups[0].input[0] != table:
        raise KitError(
            "embeddings='int8' stores a table whose rows are looked up in one place, and this base uses its table of "
            "words in another way: use embeddings='fp32'"
        )
    rows, width = values.shape
    group = next(size for size in (GROUP, width) if width % size == 0)
    groups = values.reshape(rows, -1, group)
    # Rounded up to 16 bits, so that no code is over 127.
    scales = np.nextafter((np.abs(groups).max(axis=2, keepdims=True) / 127).astype(np.float16), np.float16(np.inf))
    in_steps = groups / scales.astype(np.float32)
    codes = np.rint(in_steps).astype(np.int8)
    # What rounding left of the known tokens' numbers, at most half a step, in parts of a step. Row 0 is the others'.
    finer = np.zeros((len(known) + 1, *codes.shape[1:]), np.int8)
    finer[1:] = np.rint((in_steps[known] - codes[known]) * PARTS)
    places = np.zeros(rows, np.int32)
    places[known] = np.arange(1, len(known) + 1)
    made = _Additions(proto)
    made.drop(table)
    (ids, output), place = (look_ups[0].input[1], look_ups[0].output[0]), readers[0]
    found = made.node("Gather", [made.constant(f"{table}.codes", codes), ids], f"{table}.rows", axis=0)
    numbers = made.node("Cast", [found], f"{table}.numbers", to=TensorProto.FLOAT)
    found = made.node("Gather", [made.constant(f"{table}.scales", scales), ids], f"{table}.scales_found", axis=0)
    factors = made.node("Cast", [found], f"{table}.factors", to=TensorProto.FLOAT)
    where = made.node("Gather", [made.constant(f"{table}.places", places), ids], f"{table}.where", axis=0)
    rest_of = made.node("Gather", [made.constant(f"{table}.finer", finer), where], f"{table}.rest_found", axis=0)
    parts = made.node("Cast", [rest_of], f"{table}.parts", to=TensorProto.FLOAT)
    left = made.node("Div", [parts, made.constant(f"{table}.parts_of_a_step", np.float32(PARTS))], f"{table}.left")
    exact = made.node("Add", [numbers, left], f"{table}.steps")
    product = made.node("Mul", [exact, factors], f"{table}.product")
    made.node("Reshape", [product, made.constant("rows_of_groups", np.array([0, 0, -1]))], output)
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*rest[:place], *made.nodes, *rest[place + 1 :]])


def products_in_8_bits(proto: ModelProto) -> ModelProto:
    """Return a graph whose matrix products are those of 8-bit integers, by ONNX Runtime's own dynamic quantization.

    Weights are rounded once, a scale for each output; inputs are rounded at each call, a scale for each batch.

    Args:
        proto: As `traced` returns it.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, _silent():
        made = Path(folder) / "int8.onnx"
        quantize_dynamic(
            proto, made, op_types_to_quantize=["MatMul", "Gemm"], per_channel=True, weight_type=QuantType.QInt8
        )
        return onnx.load(made)
